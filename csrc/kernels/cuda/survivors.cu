// Survivors on the GPU, in two kernels: one block a pool and one thread a candidate in each.
//
// mark_survivors_kernel looks for a candidate that begins alike (candidates.cuh) and counts those alive in its pool.
// order_survivors_kernel adds up the pools before its own, and a candidate's place follows from how many before it are
// alive: no atomics, so the order is always the same.
#include "kernels/cuda/candidates.cuh"
#include "kernels/survivors.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 1 << 14;

// The sum of all threads' values, known to all.
__device__ __forceinline__ int64_t block_total(int64_t value) {
  CALM_SHARED(int64_t, partial, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  __syncthreads();  // the last call's sums have been read
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < kWarps; ++w) total += partial[w];
  return total;
}

__global__ void __launch_bounds__(kThreads, 2) mark_survivors_kernel(Survivors p) {
  CALM_SHARED(Keys, keys, (kKeyTile / kFour));
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const Candidates candidates{p.tokens + row * p.pool * p.patch, p.pool, p.patch, p.depth};
    int64_t count = 0;
    for (int64_t begin = 0; begin < p.pool; begin += kThreads) {
      const int64_t own = begin + threadIdx.x;
      const bool exists = own < p.pool;
      const uint32_t key = exists ? candidates.key(own) : 0;
      bool alive = exists && own == p.kept[row];
      for (int64_t tile = 0; tile < p.pool; tile += kKeyTile) {
        if (begin == 0 || p.pool > kKeyTile) candidates.load_keys<kThreads>(keys, tile);
        if (!exists || alive) continue;
        candidates.each_copy(own, key, keys, tile, [&](int64_t) {
          alive = true;
          return false;
        });
      }
      if (exists) p.alive[row * p.pool + own] = alive;
      count += alive;
    }
    count = block_total(count);
    if (threadIdx.x == 0) p.totals[row] = count;
  }
}

__global__ void __launch_bounds__(kThreads, 2) order_survivors_kernel(Survivors p) {
  CALM_SHARED(int, alive_of, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    int64_t before = 0, total = 0;
    for (int64_t b = threadIdx.x; b < p.num_rows; b += kThreads) {
      total += p.totals[b];
      before += b < row ? p.totals[b] : 0;
    }
    before = block_total(before), total = block_total(total);
    if (row == 0 && threadIdx.x == 0) *p.count = total;
    for (int64_t begin = 0; begin < p.pool; begin += kThreads) {
      const int64_t own = begin + threadIdx.x, number = row * p.pool + own;
      const bool alive = own < p.pool && p.alive[number] != 0;
      const uint32_t lanes = __ballot_sync(kFullMask, alive);
      __syncthreads();  // the counts before these have been read
      if (lane == 0) alive_of[warp] = __popc(lanes);
      __syncthreads();
      int64_t place = before + __popc(lanes & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        place += w < warp ? alive_of[w] : 0;
        before += alive_of[w];
      }
      if (own < p.pool) p.order[alive ? place : total + number - place] = number;
    }
  }
}

}  // namespace

void launch(Cuda device, const Survivors& p) {
  if (p.num_rows == 0) return;
  const unsigned blocks = grid_size(p.num_rows, 1, kMaxBlocks);
  launch_kernel("mark_survivors_kernel", mark_survivors_kernel, blocks, kThreads, device, p);
  launch_kernel("order_survivors_kernel", order_survivors_kernel, blocks, kThreads, device, p);
}

}  // namespace calm_rt
