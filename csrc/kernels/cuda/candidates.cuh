// Candidates of a pool that begin alike, by a block: each is compared with all others through 32-bit keys in shared
// memory, 4 bytes a candidate whatever K is; tokens are read again only where keys agree.
#pragma once
#include "kernels/cuda/primitives.cuh"
#include "kernels/select_patch.h"

namespace calm_rt {

constexpr int kKeyTile = 4096;  // candidates whose keys are in shared memory at once

using Keys = Pack<uint32_t, kFour>;  // of four candidates

// A pool, of whose candidates the first `depth` tokens count.
struct Candidates {
  const int64_t* tokens;  // [S, K]
  int64_t pool, patch, depth;

  __device__ __forceinline__ uint32_t key(int64_t s) const {
    return static_cast<uint32_t>(patch_hash(tokens + s * patch, depth));
  }

  // The keys of candidates tile ... tile + kKeyTile - 1, by a block of THREADS threads.
  template <int THREADS>
  __device__ __forceinline__ void load_keys(Keys* keys, int64_t tile) const {
    __syncthreads();  // the keys before these have been read
    for (int64_t s = threadIdx.x; s < kKeyTile; s += THREADS) {
      keys[s / kFour].value[s % kFour] = tile + s < pool ? key(tile + s) : 0;
    }
    __syncthreads();
  }

  // Calls visit(s) for the tile's candidates that are like `own`, itself left out, in order until it returns false.
  template <class Visit>
  __device__ __forceinline__ void each_copy(int64_t own, uint32_t own_key, const Keys* keys, int64_t tile,
                                            const Visit& visit) const {
    const int packs = static_cast<int>((min(pool - tile, static_cast<int64_t>(kKeyTile)) + kFour - 1) / kFour);
    for (int i = 0; i < packs; ++i) {
      bool any = false;
#pragma unroll
      for (int e = 0; e < kFour; ++e) any |= keys[i].value[e] == own_key;
      if (!any) continue;
      for (int e = 0; e < kFour; ++e) {
        const int64_t s = tile + i * kFour + e;
        if (keys[i].value[e] != own_key || s >= pool || s == own) continue;
        if (same_patch(tokens + own * patch, tokens + s * patch, depth) && !visit(s)) return;
      }
    }
  }
};

}  // namespace calm_rt
