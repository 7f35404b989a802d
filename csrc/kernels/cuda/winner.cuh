// The search for the best exact score that the kernels of linear_argmax share. What an entry's exact score is does not
// depend on who computes it, and the order among scores is total, so neither does the result.
#pragma once
#include <limits>

#include "kernels/cuda/reduce.cuh"

namespace calm_rt {

constexpr int kSums = 16;  // of an exact product, as on the CPU
constexpr float kLargestFloat = std::numeric_limits<float>::max();

// An exact score and whose it is.
struct Winner {
  double score;
  int64_t id;  // -1: none yet, and the score means nothing

  // NaN before all numbers as in torch, ties to the lowest id. Both of these are without branches, which would cost
  // the kernels registers for where threads meet again.
  __device__ __forceinline__ bool before(const Winner& other) const {
    const bool nan = isnan(score), other_nan = isnan(other.score), lower = id < other.id;
    const bool larger = (score > other.score) | ((score == other.score) & lower);
    return (id >= 0) & ((other.id < 0) | larger | (nan & (!other_nan | lower)));
  }

  // Whether an entry that has this bound, and no lower id than this, may come before. Rounding the score to a float
  // costs less than the bound has room for. A bound that overflowed stands for finite scores too; an exact score that
  // is NaN has a bound that is.
  __device__ __forceinline__ bool may_lose_to(float bound, int64_t entry_id) const {
    const float least = isinf(score) ? static_cast<float>(score) : min(static_cast<float>(score), kLargestFloat);
    const bool lower = entry_id < id, reaches = !(bound < least), exceeds = !(bound <= least);
    const bool may = isnan(score) ? isnan(bound) & lower : exceeds | (reaches & lower);
    return (id < 0) | may;
  }
};

// What comes first among the winners of the block's warps, known to all threads.
template <int THREADS>
__device__ __forceinline__ Winner block_winner(Winner mine) {
  constexpr int kWarps = THREADS / kWarpSize;
  CALM_SHARED(Winner, winners, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();  // the last call's winners have been read
  if (lane == 0) winners[warp] = mine;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (winners[w].before(mine)) mine = winners[w];
  }
  return mine;
}

// <a, b> for COUNT rows b that follow each other, by half a warp and known to all of it; the other half may have other
// rows. Products of the inputs are exact in double; the additions have the CPU kernel's order, which makes ids equal
// where rounding decides between scores that differ by less: lane i of the half adds up every 16th product from i on,
// and the sums are added one after the other to those of the last H % 16 elements.
template <int COUNT, class T>
__device__ __forceinline__ void exact_products(const T* a, const T* b, int size, double (&total)[COUNT]) {
  const int lane = threadIdx.x % kSums, half = threadIdx.x % kWarpSize / kSums * kSums;
  const int whole = size / kSums * kSums;
  double sum[COUNT] = {};
#pragma unroll(16 / COUNT)
  for (int k = lane; k < whole; k += kSums) {
    const double factor = static_cast<double>(widen(a[k]));
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      sum[c] += factor * static_cast<double>(widen(b[static_cast<int64_t>(c) * size + k]));
    }
  }
#pragma unroll
  for (int c = 0; c < COUNT; ++c) {
    total[c] = 0;
    for (int k = whole; k < size; ++k) {
      total[c] += static_cast<double>(widen(a[k])) * static_cast<double>(widen(b[static_cast<int64_t>(c) * size + k]));
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) total[c] += __shfl_sync(kFullMask, sum[c], half + i);
  }
}

// The same for one row, both halves of the warp alike.
template <class T>
__device__ __forceinline__ double exact_product(const T* a, const T* b, int size) {
  double total[1];
  exact_products(a, b, size, total);
  return total[0];
}

}  // namespace calm_rt
