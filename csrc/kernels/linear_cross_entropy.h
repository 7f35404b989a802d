// Cross-entropy of a vocabulary projection, a few rows at a time.
//
//   loss[r] = log sum_v exp(logit[r, v]) - logit[r, target[r]],  logit = hidden weight^T
//   d loss[r] / d logit[r, v] = softmax(logit[r])[v] - (v == target[r])
//
// The library multiplies; RowLosses turns the logits of some rows in place into the gradient of sum_r scale[r] loss[r],
// which the library multiplies by weight and by hidden; AddProduct adds up such products in the accumulation type;
// SumLosses adds up the losses of all rows. A row with ignore_index for a target has loss and gradient 0, one with any
// other target outside [0, V) has NaN for both and is not looked up.
//
// The logits lie in blocks of the vocabulary, one after the other, each of them [R, N] with nothing between its rows:
// whatever V is, the library's operands are dense and, but for the last block, aligned.
//
// A CPU that multiplies 16-bit types slower than float gets them as floats (WidenValues), block by block.
//
// RowLosses reads R*V logits twice (a row of them at a time, so that the second time they come from a cache) and writes
// them once. AddProduct reads two values and writes one for each element.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

template <class T>
struct RowLosses {
  T* logits;                       // [R, V] in blocks; the gradient afterwards
  const int64_t* target;           // [R]
  const AccumulateType<T>* scale;  // [R], or nullptr for 1
  AccumulateType<T>* loss;         // [R]
  int64_t num_rows;                // R
  int64_t vocabulary;              // V
  int64_t block;                   // N of all blocks but the last, which may be narrower
  int64_t ignore_index;
  bool need_grad;  // logits are only read otherwise
};

template <class T>
struct AddProduct {
  const T* product;        // [count]
  AccumulateType<T>* sum;  // [count]
  int64_t count;
  bool first;  // sum = product, otherwise sum += product
};

template <class T>
struct WidenValues {
  const T* in;  // [count]
  float* out;   // [count]
  int64_t count;
};

template <class T>
struct SumLosses {
  const AccumulateType<T>* loss;  // [R]
  AccumulateType<T>* total;       // [1]
  int64_t num_rows;               // R
};

template <class T>
void launch(Cpu device, const RowLosses<T>& p);  // T float, double, bfloat16, half
template <class T>
void launch(Cpu device, const AddProduct<T>& p);
template <class T>
void launch(Cpu device, const WidenValues<T>& p);  // bfloat16, half
template <class T>
void launch(Cpu device, const SumLosses<T>& p);
template <class T>
void launch(Cuda device, const RowLosses<T>& p);  // T float, bfloat16, half
template <class T>
void launch(Cuda device, const AddProduct<T>& p);
template <class T>
void launch(Cuda device, const SumLosses<T>& p);

}  // namespace calm_rt
