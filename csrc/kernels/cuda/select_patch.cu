// Choice of a patch on the GPU: one block a pool, one thread a candidate.
//
// Each candidate counts its copies (candidates.cuh); one that an earlier one equals stops there and weighs nothing.
// Weights are made in parallel and added up by one thread, in the order of candidates, as on the CPU.
#include "common/philox.h"
#include "kernels/cuda/candidates.cuh"
#include "kernels/select_patch.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kMaxBlocks = 1 << 14;

// The largest value of any thread, known to all.
__device__ __forceinline__ int64_t block_max(int64_t value) {
  constexpr int kWarps = kThreads / kWarpSize;
  CALM_SHARED(int64_t, largest, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  if (lane == 0) largest[warp] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = max(value, largest[w]);
  return value;
}

__global__ void __launch_bounds__(kThreads, 2) select_patch_kernel(SelectPatch p) {
  CALM_SHARED(Keys, keys, (kKeyTile / kFour));
  CALM_SHARED(double, weights, kThreads);  // of a candidate a thread, then cumulative
  CALM_SHARED(double, total, 1);
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const Candidates candidates{p.tokens + row * p.pool * p.patch, p.pool, p.patch, p.patch};
    double* cumulative = p.workspace + row * p.pool;  // [S], counts at first
    int64_t most = 0;
    for (int64_t begin = 0; begin < p.pool; begin += kThreads) {
      const int64_t own = begin + threadIdx.x;
      const uint32_t key = own < p.pool ? candidates.key(own) : 0;
      int64_t count = own < p.pool ? 1 : 0;
      for (int64_t tile = 0; tile < p.pool; tile += kKeyTile) {
        if (begin == 0 || p.pool > kKeyTile) candidates.load_keys<kThreads>(keys, tile);
        if (count == 0) continue;
        candidates.each_copy(own, key, keys, tile, [&](int64_t s) {
          count = s < own ? 0 : count + 1;
          return s > own;
        });
      }
      if (own < p.pool) cumulative[own] = static_cast<double>(count);
      most = max(most, count);
    }
    most = block_max(most);
    const int64_t level = min(p.n, most);

    double sum = 0;  // of thread 0
    for (int64_t begin = 0; begin < p.pool; begin += kThreads) {
      const int64_t own = begin + threadIdx.x;
      const int64_t count = own < p.pool ? static_cast<int64_t>(cumulative[own]) : 0;
      weights[threadIdx.x] = count >= level ? patch_weight(count, most, level) : 0;
      __syncthreads();
      if (threadIdx.x == 0) {
#pragma unroll 8
        for (int i = 0; i < kThreads; ++i) {
          sum += weights[i];
          weights[i] = sum;
        }
        total[0] = sum;
      }
      __syncthreads();
      if (own < p.pool) cumulative[own] = weights[threadIdx.x];
    }
    __syncthreads();  // all cumulative weights are in memory

    const PhiloxWords words = philox(philox_counter(0, kChoice, 0, p.rows[row]), static_cast<uint64_t>(*p.seed));
    const double target = static_cast<double>(uniform(words.word[0])) * total[0];  // below the total, for u < 1
    for (int64_t own = threadIdx.x; own < p.pool; own += kThreads) {
      if (cumulative[own] > target && (own == 0 || cumulative[own - 1] <= target)) p.index[row] = own;
    }
  }
}

}  // namespace

void launch(Cuda device, const SelectPatch& p) {
  if (p.num_rows == 0) return;
  launch_kernel("select_patch_kernel", select_patch_kernel, grid_size(p.num_rows, 1, kMaxBlocks), kThreads, device, p);
}

}  // namespace calm_rt
