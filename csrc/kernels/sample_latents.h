// The energy head, S draws of the next latent vector for each of R contexts. Lines are (draw, context), line = s R + r:
//
//   x = norm(noise W + b),  c = norm(hidden W + b)                            noise uniform in [-0.5, 0.5)
//   x += silu(gate) * up W + b,  [gate | up] = silu(h W + b) W + b,  h = silu([norm(x) | c] W + b)     in each block
//   out = silu(norm(x) W + b) W + b,  norm(x) = (x - mean) / sqrt(var + eps) * weight + bias
//
// The library multiplies; these kernels are what stands between the products, biases included. A block's first product
// is split, [norm(x) | c] W + b = norm(x) W_x + (c W_c + b), and AddSilu adds the context's half, computed once a row.
// T is the type of the products; the stream x, its gradient and the weights of norms are in the accumulation type.
// Arithmetic is in the accumulation type too, and each output is rounded once.
//
// Every kernel reads and writes each of its tensors once, but for the lines of the norms, which stay in a cache.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

// out = uniform - 1/2 of lines first_line ... of [S, R].
template <class T>
struct HeadNoise {
  const int64_t* seed;  // []
  const int64_t* rows;  // [R], logical row ids
  T* out;               // [lines, N]
  int64_t first_line, num_lines;
  int64_t num_rows;  // R
  int64_t length;    // N
};

// What a norm takes: the sum of those that are there.
template <class T>
struct NormInput {
  const AccumulateType<T>* x;  // [lines, H] or nullptr
  const T* product;            // [lines, H] or nullptr
  const T* bias;               // [H] or nullptr
};

// out = norm(input); Out is T or the accumulation type.
template <class T, class Out = T>
struct LayerNorm {
  NormInput<T> input;
  AccumulateType<T>* sum;                 // [lines, H], the input, or nullptr; may be input.x
  const AccumulateType<T>*weight, *bias;  // [H]
  Out* out;                               // [lines, H]; may be input.product
  int64_t num_lines;
  int64_t size;  // H
  double eps;
};

// out = silu(product + added), line i taking row (first_line + i) % period of added.
template <class T>
struct AddSilu {
  const T* product;  // [lines, H]
  const T* added;    // [period, H]
  T* out;            // [lines, H]; may be product
  int64_t first_line, num_lines;
  int64_t period;  // R, or 1 for a bias
  int64_t size;    // H
};

// out = silu(gate) * up, [gate | up] = product + bias.
template <class T>
struct BiasSwiGlu {
  const T* product;  // [lines, 2 H]
  const T* bias;     // [2 H]
  T* out;            // [lines, H]
  int64_t num_lines;
  int64_t size;  // H
};

// ---- gradients ----

// grad_out = the gradient of the norm's input, plus residual; Grad is T or the accumulation type.
template <class T, class Grad = T>
struct LayerNormBackward {
  NormInput<T> input;
  const AccumulateType<T>* weight;    // [H]
  const Grad* grad;                   // [lines, H], of the norm's output
  const AccumulateType<T>* residual;  // [lines, H] or nullptr
  AccumulateType<T>* stream;          // [lines, H] or nullptr
  T* out;                             // [lines, H] or nullptr, the same rounded to T
  AccumulateType<T>* statistics;      // [lines, 2], mean and 1 / sqrt(var + eps)
  int64_t num_lines;
  int64_t size;  // H
  double eps;
};

// grad_product = grad * silu'(z), out = silu(z), z = product + added as in AddSilu.
template <class T>
struct AddSiluBackward {
  const T* product;  // [lines, H]
  const T* added;    // [period, H]
  const T* grad;     // [lines, H]
  T* grad_product;   // [lines, H]; may be grad
  T* out;            // [lines, H]
  int64_t first_line, num_lines;
  int64_t period;
  int64_t size;  // H
};

// The gradients of gate and up side by side, and out as in BiasSwiGlu.
template <class T>
struct BiasSwiGluBackward {
  const T* product;  // [lines, 2 H]
  const T* bias;     // [2 H]
  const T* grad;     // [lines, H]
  T* grad_product;   // [lines, 2 H]
  T* out;            // [lines, H]; may be grad
  int64_t num_lines;
  int64_t size;  // H
};

// How blocks of a GPU share out a sum over lines, by shapes alone: columns, and ranges of lines where the columns make
// too few blocks. More than one range leave a row of partial sums each, which are added in their order.
struct LineShares {
  static constexpr int64_t kThreads = 256, kColumnsOfThread = 8;
  static constexpr int64_t kBlocks = 1024, kMostRanges = 256;  // several blocks for a multiprocessor, few rows to add
  static constexpr int64_t kNarrow = 64, kWide = 256;          // columns of a block whose threads share lines
  static constexpr int64_t kWidest = kThreads * kColumnsOfThread;  // of a block whose threads share none
  static constexpr int64_t kLinesOfThread = 4;                     // below which ranges are not worth their row
  static constexpr int64_t kMostSums = kBlocks * kWide;            // num_ranges * columns where there is more than one

  int64_t block_columns;
  int64_t tiles;  // blocks beside each other
  int64_t num_ranges;

  LineShares(int64_t num_lines, int64_t columns) : block_columns(kNarrow), num_ranges(1) {
    while (block_columns < kWide && block_columns < columns) block_columns *= 2;
    if (columns >= kMostRanges * kWidest) block_columns = kWidest;  // blocks enough without ranges
    tiles = (columns + block_columns - 1) / block_columns;
    if (tiles == 0 || block_columns == kWidest) return;
    const int64_t least_lines = kLinesOfThread * kWidest / block_columns;
    num_ranges = num_lines / least_lines;
    if (num_ranges > kBlocks / tiles) num_ranges = kBlocks / tiles;
    if (num_ranges > kMostRanges) num_ranges = kMostRanges;
    if (num_ranges < 1) num_ranges = 1;
  }
};

// The sum of all lines: a bias's gradient, or [S, R H] over the draws.
template <class T>
struct ColumnSums {
  const T* x;  // [lines, columns]
  T* out;      // [columns]
  int64_t num_lines;
  int64_t columns;
  AccumulateType<T>* partial;  // [ranges, columns] if LineShares has several, on a GPU
};

// The gradients of a norm's weight and bias.
template <class T, class Grad = T>
struct NormGradients {
  NormInput<T> input;
  const AccumulateType<T>* statistics;  // [lines, 2], of LayerNormBackward
  const Grad* grad;                     // [lines, H], of the norm's output
  AccumulateType<T>*weight, *bias;      // [H]
  int64_t num_lines;
  int64_t size;                // H
  AccumulateType<T>* partial;  // [ranges, 2, H] if LineShares has several, on a GPU
};

// T of float, double, bfloat16, half; Out and Grad of T or the accumulation type. On Cuda without double.
#define CALM_DECLARE(Device)                                       \
  template <class T>                                               \
  void launch(Device device, const HeadNoise<T>& p);               \
  template <class T, class Out>                                    \
  void launch(Device device, const LayerNorm<T, Out>& p);          \
  template <class T>                                               \
  void launch(Device device, const AddSilu<T>& p);                 \
  template <class T>                                               \
  void launch(Device device, const BiasSwiGlu<T>& p);              \
  template <class T, class Grad>                                   \
  void launch(Device device, const LayerNormBackward<T, Grad>& p); \
  template <class T>                                               \
  void launch(Device device, const AddSiluBackward<T>& p);         \
  template <class T>                                               \
  void launch(Device device, const BiasSwiGluBackward<T>& p);      \
  template <class T>                                               \
  void launch(Device device, const ColumnSums<T>& p);              \
  template <class T, class Grad>                                   \
  void launch(Device device, const NormGradients<T, Grad>& p);
CALM_DECLARE(Cpu)
CALM_DECLARE(Cuda)
#undef CALM_DECLARE

}  // namespace calm_rt
