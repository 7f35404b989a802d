// Random numbers by logical position (Salmon et al. 2011, Philox4x32-10), one source for host and device.
//
//   key     = the 64-bit seed
//   counter = (position / 4 | stream << 24, draw, low half of the row id, high half of the row id)
//
// The four words of a counter belong to positions 4 (position / 4) ... + 3 of the row. A word w becomes a uniform
// (w >> 8) 2^-24 in [0, 1); normals are Box-Muller on words (0, 1) and (2, 3), cosine first, with 2^-24 added below the
// logarithm. calm_rt/reference.py states the same in PyTorch.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace calm_rt {

// Which use of randomness a number belongs to; the same table stands in calm_rt/reference.py.
enum Stream : uint32_t {
  kTarget = 0,
  kHead = 1,
  kChoice = 2,
  kAcceptance = 3,
  kTokenMask = 4,
  kLatent = 5,
  kDropout = 6,
  kOrder = 7,
  kProbe = 8,
  kTuple = 9,
};

struct PhiloxWords {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr float kUniformStep = 5.9604644775390625e-8f;  // 2^-24

CALM_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);  // from the 64-bit product nvcc 13 makes two instructions more a round
#else
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

CALM_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  auto [c0, c1, c2, c3] = counter.word;
  for (int round = 0; round < 10; ++round) {
    uint32_t high0 = multiply_high(kPhiloxMultiplier0, c0), low0 = kPhiloxMultiplier0 * c0;
    uint32_t high1 = multiply_high(kPhiloxMultiplier1, c2), low1 = kPhiloxMultiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The counter of group `position / 4` of a row.
CALM_HOST_DEVICE PhiloxWords philox_counter(uint32_t group, uint32_t stream, uint32_t draw, int64_t row) {
  return {{group | stream << 24, draw, static_cast<uint32_t>(row),
           static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)}};
}

CALM_HOST_DEVICE float uniform(uint32_t word) { return static_cast<float>(word >> 8) * kUniformStep; }

}  // namespace calm_rt
