// Sums over the threads of a warp or a block, always in the same order, so that results do not change from run to run,
// and maxima.
#pragma once
#include "kernels/cuda/primitives.cuh"

namespace calm_rt {

// The sum over a warp, known to all its lanes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// COUNT sums over a warp at once; lane l gets sum l / (32 / COUNT).
//
// While several sums are left, a lane keeps half of them and gives the other half to its partner: COUNT - 1 shuffles
// for that and log2(32 / COUNT) for the rest, 9 for 8 sums where one after the other would take 40. Overwrites value.
template <int COUNT>
__device__ __forceinline__ float warp_sum_many(float (&value)[COUNT]) {
  static_assert((COUNT & (COUNT - 1)) == 0 && COUNT <= kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  int offset = kWarpSize / 2;
#pragma unroll
  for (int kept = COUNT / 2; kept > 0; kept /= 2, offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      const float mine = upper ? value[k + kept] : value[k];
      const float given = upper ? value[k] : value[k + kept];
      value[k] = mine + __shfl_xor_sync(kFullMask, given, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) value[0] += __shfl_xor_sync(kFullMask, value[0], offset);
  return value[0];
}

// The sum over a block of THREADS threads, known to all of them.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value) {
  constexpr int kWarps = THREADS / kWarpSize;
  static_assert(THREADS % kWarpSize == 0 && kWarps <= kWarpSize);
  CALM_SHARED(float, partial, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // the last call's sums have been read
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_sum(lane < kWarps ? partial[lane] : 0.0f);
}

// The maximum over a warp, known to all its lanes; NaN if there is one.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max_nan(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// The maximum over a block of THREADS threads, known to all of them; NaN if there is one.
template <int THREADS>
__device__ __forceinline__ float block_max(float value) {
  constexpr int kWarps = THREADS / kWarpSize;
  static_assert(THREADS % kWarpSize == 0 && kWarps <= kWarpSize);
  CALM_SHARED(float, maxima, kWarps);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_max(value);
  __syncthreads();  // the last call's maxima have been read
  if (lane == 0) maxima[warp] = value;
  __syncthreads();
  return warp_max(maxima[lane % kWarps]);
}

// A running sum that keeps what rounding loses (Knuth's two-sum), so that a million targets cost no accuracy.
struct CompensatedSum {
  float sum = 0, lost = 0;

  __device__ __forceinline__ void add(float term) {
    const float next = sum + term, part = next - sum;
    lost += (sum - (next - part)) + (term - part);
    sum = next;
  }

  // Infinities and NaN are in the sum already, and what they lost means nothing.
  __device__ __forceinline__ float total() const { return isfinite(sum) ? sum + lost : sum; }
};

}  // namespace calm_rt
