// The last step of a sum over rows: a block owns 32 columns, its warps share out the rows and are added in their order.
#pragma once
#include "kernels/cuda/primitives.cuh"

namespace calm_rt {
namespace {

constexpr int kRowThreads = 512;

// out = the sum of rows; of two tensors where a row has more columns than the first.
template <class Out>
struct PartialRows {
  const float* in;  // [num_rows, columns]
  Out *out, *rest;  // [size], [columns - size]
  int64_t num_rows;
  int64_t columns, size;
};

template <class Out>
__global__ void __launch_bounds__(kRowThreads) sum_rows_kernel(PartialRows<Out> p) {
  CALM_SHARED(float, partial, kRowThreads);
  constexpr int kRowWarps = kRowThreads / kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = blockIdx.x * int64_t{kWarpSize} + lane;
  float sum = 0;
  if (column < p.columns) {
#pragma unroll 8
    for (int64_t row = warp; row < p.num_rows; row += kRowWarps) sum += p.in[row * p.columns + column];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.columns) return;
#pragma unroll
  for (int other = 1; other < kRowWarps; ++other) sum += partial[other * kWarpSize + lane];
  narrow(sum, column < p.size ? p.out[column] : p.rest[column - p.size]);
}

template <class Out>
void sum_rows(Cuda device, const PartialRows<Out>& p) {
  launch_kernel("sum_rows_kernel", sum_rows_kernel<Out>, grid_size(p.columns, kWarpSize, INT32_MAX), kRowThreads,
                device, p);
}

}  // namespace
}  // namespace calm_rt
