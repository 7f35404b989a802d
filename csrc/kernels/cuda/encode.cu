// Sums of table rows on the GPU: one block a row, its threads take every kThreads-th column, so reads are coalesced.
#include "kernels/cuda/primitives.cuh"
#include "kernels/encode.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 16;

template <class T>
__global__ void __launch_bounds__(kThreads) gather_sum_kernel(GatherSum<T> p) {
  for (int64_t r = blockIdx.x; r < p.num_rows; r += gridDim.x) {
    const int64_t* ids = p.ids + r * p.num_tables;
    bool known = true;
    for (int64_t j = 0; j < p.num_tables; ++j) known = known && ids[j] >= 0 && ids[j] < p.vocabulary;
    for (int64_t l = threadIdx.x; l < p.size; l += kThreads) {
      float total = known ? 0.0f : NAN;
      for (int64_t j = 0; known && j < p.num_tables; ++j) {
        total += widen(p.tables[(j * p.vocabulary + ids[j]) * p.size + l]);
      }
      narrow(total, p.out[r * p.size + l]);
    }
  }
}

}  // namespace

template <class T>
void launch(Cuda device, const GatherSum<T>& p) {
  if (p.num_rows == 0) return;
  launch_kernel("gather_sum_kernel", gather_sum_kernel<T>, grid_size(p.num_rows, 1, kMaxBlocks), kThreads, device, p);
}

template void launch(Cuda, const GatherSum<float>&);
template void launch(Cuda, const GatherSum<bfloat16>&);
template void launch(Cuda, const GatherSum<half>&);

}  // namespace calm_rt
