// Algorithm 2 of the paper at temperature 1 / n: one patch from a pool of S candidates a context.
//
//   level = min(n, the largest count of equal patches)
//   weight[patch] = C(count, level) / C(most, level), 0 for fewer than `level` copies
//   index = first occurrence of the first patch, in the order of first occurrence, whose cumulative weight exceeds
//           u * total
//
// u is one uniform from common/philox.h (stream kChoice, draw 0, position 0, row id rows[b]). Weights are products of
// ratios, because C(1000, 500) is beyond every double, and sums run over candidates in order: with the two functions
// below every device makes the same choice, bit for bit. Reads B*S*K + B values, writes B.
#pragma once
#include <cstdint>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

struct SelectPatch {
  const int64_t* tokens;  // [B, S, K]
  const int64_t* seed;    // []
  const int64_t* rows;    // [B], logical row ids
  double* workspace;      // [B, S] on CUDA, nullptr on the CPU
  int64_t* index;         // [B]
  int64_t n;              // at least 1
  int64_t num_rows;       // B
  int64_t pool;           // S >= 1
  int64_t patch;          // K >= 0
};

// C(count, level) / C(most, level) for level <= count <= most.
CALM_HOST_DEVICE double patch_weight(int64_t count, int64_t most, int64_t level) {
  double weight = 1;
  if (count == most) return weight;
  for (int64_t j = 0; j < level; ++j) weight *= static_cast<double>(count - j) / static_cast<double>(most - j);
  return weight;
}

// The same for equal patches, hardly ever for others: what may be equal is compared token by token.
CALM_HOST_DEVICE uint64_t patch_hash(const int64_t* tokens, int64_t patch) {
  uint64_t hash = 0;
  for (int64_t k = 0; k < patch; ++k) {
    hash = (hash ^ static_cast<uint64_t>(tokens[k])) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
    hash ^= hash >> 32;
  }
  return hash;
}

CALM_HOST_DEVICE bool same_patch(const int64_t* a, const int64_t* b, int64_t patch) {
  for (int64_t k = 0; k < patch; ++k) {
    if (a[k] != b[k]) return false;
  }
  return true;
}

// Slots of a hash table of a pool's patches on the CPU: a power of two, at most half of them full.
CALM_HOST_DEVICE int64_t patch_table_size(int64_t pool) {
  int64_t size = 2;
  while (size < 2 * pool) size *= 2;
  return size;
}

void launch(Cpu device, const SelectPatch& p);
void launch(Cuda device, const SelectPatch& p);

}  // namespace calm_rt
