// From scores to the bounds of groups that the kernels of BoundGroups share: after a matrix product four lanes have the
// scores of a row, lane l of them entries 8 j + 2 (l % 4) and the next. Each keeps the largest bound and the next, and
// the four put theirs together. An entry's number takes the lowest six bits of its bound.
#pragma once
#include <limits>

#include "kernels/cuda/primitives.cuh"
#include "kernels/linear_argmax.h"

namespace calm_rt {

constexpr int kGroupPairs = kGroup / 8;      // of a lane in a group
constexpr uint32_t kEntryBits = kGroup - 1;  // of a bound
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The bound without the entry's number. What that takes from a positive bound, kRelative has given; 0 is 0 again.
__device__ __forceinline__ float without_entry(float bound) { return float_of(bits_of(bound) & ~kEntryBits); }

// The two largest bounds of a row's part of a group.
struct TopTwo {
  float largest = -kInfinity, next = -kInfinity;

  __device__ __forceinline__ void add(float bound) {
    next = fmaxf(next, fminf(largest, bound));
    largest = max_nan(largest, bound);
  }
  __device__ __forceinline__ void add(const TopTwo& other) {
    next = fmaxf(fmaxf(next, other.next), fminf(largest, other.largest));
    largest = max_nan(largest, other.largest);
  }
};

// A lane's part of the group that begins at `first`, which the block of the vocabulary reaches.
struct GroupEntries {
  int64_t first;
  int limit;  // entries of the group that there are
  Pack<float, 2> norm[kGroupPairs];
};

__device__ __forceinline__ GroupEntries load_entries(const BoundGroups& p, int64_t first, int lane) {
  GroupEntries entries{first, static_cast<int>(min(p.block - first, static_cast<int64_t>(kGroup))), {}};
#pragma unroll
  for (int j = 0; j < kGroupPairs; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int entry = j * 8 + lane % 4 * 2 + e;
      entries.norm[j].value[e] = entry < entries.limit ? p.weight_norm[first + entry] : 0;
    }
  }
  return entries;
}

// Writes the bounds of a row from score(j, e) of entries 8 j + 2 (l % 4) + e.
template <class Score>
__device__ __forceinline__ void store_bounds(const BoundGroups& p, const GroupEntries& entries, int64_t row,
                                             float factor, int lane, const Score& score_of) {
  const float row_factor = row < p.num_rows ? factor * p.hidden_norm[row] : 0;
  TopTwo top;
#pragma unroll
  for (int j = 0; j < kGroupPairs; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int entry = j * 8 + lane % 4 * 2 + e;
      const float score = score_of(j, e);
      const float bound = fmaf(BoundGroups::kRelative, fabsf(score), fmaf(row_factor, entries.norm[j].value[e], score));
      if (entry < entries.limit) top.add(float_of((bits_of(bound) & ~kEntryBits) | static_cast<uint32_t>(entry)));
    }
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    top.add({__shfl_xor_sync(kFullMask, top.largest, offset), __shfl_xor_sync(kFullMask, top.next, offset)});
  }
  if (lane % 4 == 0 && row < p.num_rows) {
    store_pack(Pack<float, 2>{top.largest, top.next},
               &p.bounds[row * num_groups(p.block) + entries.first / kGroup].largest);
  }
}

// Whether the warpgroups of a device of compute capability 9.0 have taken the work (argmax_warpgroups.cu).
bool launch_warpgroups(Cuda device, const BoundGroups& p);

}  // namespace calm_rt
