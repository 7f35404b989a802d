// The autoencoder's layer, a residual gated MLP on a normalised input:
//
//   out = x + down (silu(gate n) * up n),  n = x / sqrt(mean(x^2) + eps) * norm_weight,  silu(z) = z / (1 + exp(-z))
//
// The library multiplies; these kernels are what stands between the products. T is the type of the products, X that of
// x and out: T, or float where autocast multiplies 16-bit matrices on a float residual stream. Arithmetic is in the
// accumulation type, each output is rounded once.
//
// Backwards, with d for the gradient of a sum of out:
//
//   d gated = d out down,  d gate n = d gated * up n * silu'(gate n),  d up n = d gated * silu(gate n)
//   d n = d (gate n) gate + d (up n) up,  d norm_weight = sum over rows of d n * x / rms
//   d x = d out + (norm_weight * d n - x / rms * mean(norm_weight * d n * x / rms)) / rms
//
// RmsNorm reads R*H values twice, the second time from a cache, and writes them once; SwiGlu reads two values and
// writes one for each of R*I elements, AddResidual as much for each of R*H. SwiGluBackward reads three and writes
// three, RmsNormBackward reads four twice and writes one.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

template <class X, class T = X>
struct RmsNorm {
  const X* x;                       // [R, H]
  const AccumulateType<X>* weight;  // [H]
  T* out;                           // [R, H]
  int64_t num_rows;                 // R
  int64_t size;                     // H
  double eps;
};

template <class T>
struct SwiGlu {
  const T* gate;  // [count]
  const T* up;    // [count]
  T* out;         // [count], silu(gate) * up; may be gate or up
  int64_t count;
};

template <class X, class T = X>
struct AddResidual {
  const X* x;        // [count]
  const T* product;  // [count]
  X* out;            // [count], x + product; may be x
  int64_t count;
};

template <class T>
struct SwiGluBackward {
  const T* gate;        // [count]
  const T* up;          // [count]
  const T* grad_gated;  // [count]
  T* grad_gate;         // [count]
  T* grad_up;           // [count]
  T* gated;             // [count], silu(gate) * up once more; may be grad_gated
  int64_t count;
};

constexpr int64_t kPartialRows = 32;  // whose gradients of the norm's weight one partial sum holds

template <class X, class T = X>
struct RmsNormBackward {
  const X* x;                       // [R, H]
  const AccumulateType<X>* weight;  // [H]
  const T* grad_normal[2];          // [R, H], two terms
  const X* grad_out;                // [R, H], what comes by the residual
  X* grad_x;                        // [R, H]
  AccumulateType<X>* partial;       // [ceil(R / kPartialRows), H], sums of the weight's gradient
  int64_t num_rows;                 // R
  int64_t size;                     // H
  double eps;
};

template <class Wide>
struct SumRows {
  const Wide* in;    // [N, H]
  Wide* out;         // [H]
  int64_t num_rows;  // N
  int64_t size;      // H
};

template <class X, class T>
void launch(Cpu device, const RmsNorm<X, T>& p);  // X = T of float, double, bfloat16, half, or float with a 16-bit T
template <class T>
void launch(Cpu device, const SwiGlu<T>& p);
template <class X, class T>
void launch(Cpu device, const AddResidual<X, T>& p);
template <class T>
void launch(Cpu device, const SwiGluBackward<T>& p);
template <class X, class T>
void launch(Cpu device, const RmsNormBackward<X, T>& p);
template <class Wide>
void launch(Cpu device, const SumRows<Wide>& p);  // float, double
template <class X, class T>
void launch(Cuda device, const RmsNorm<X, T>& p);  // the same without double
template <class T>
void launch(Cuda device, const SwiGlu<T>& p);
template <class X, class T>
void launch(Cuda device, const AddResidual<X, T>& p);
template <class T>
void launch(Cuda device, const SwiGluBackward<T>& p);
template <class X, class T>
void launch(Cuda device, const RmsNormBackward<X, T>& p);
template <class Wide>
void launch(Cuda device, const SumRows<Wide>& p);  // float

}  // namespace calm_rt
