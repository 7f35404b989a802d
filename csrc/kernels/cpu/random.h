// Random numbers by logical position (common/philox.h) in vectors, one counter a lane.
#pragma once
#include "common/philox.h"
#include "kernels/cpu/simd.h"

namespace calm_rt::CALM_ISA {

// The 64-bit products of the low halves.
CALM_INLINE Pair multiply_low(Pair a, Pair b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Pair>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Pair>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Pair>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

CALM_INLINE Float uniform(Word word) {
  return __builtin_convertvector(reinterpret_cast<Int>(word >> 8), Float) * kUniformStep;
}

// A counter for each lane: its words in the low halves of 64-bit lanes, even and odd lanes apart. The high halves hold
// what they may: the multiply reads low halves only, so a product needs no unpacking.
struct Counters {
  Pair word[4][2];
};

// The keys of all rounds, which depend on the seed alone.
struct Keys {
  uint64_t seed;
  uint64_t word[10][2];

  explicit Keys(uint64_t from) : seed(from) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (auto& round : word) {
      round[0] = key0;
      round[1] = key1;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }
};

// value[j] lane i is word j of counter i as a uniform.
CALM_INLINE void uniforms(Counters c, const Keys& keys, Float (&value)[4]) {
  const Pair multiplier0 = splat<Pair>(uint64_t{kPhiloxMultiplier0});
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int odd = 0; odd < 2; ++odd) {
      Pair p0 = multiply_low(c.word[0][odd], multiplier0), p1 = multiply_low(c.word[2][odd], multiplier1);
      c.word[0][odd] = (p1 >> 32) ^ c.word[1][odd] ^ keys.word[round][0];
      c.word[1][odd] = p1;
      c.word[2][odd] = (p0 >> 32) ^ c.word[3][odd] ^ keys.word[round][1];
      c.word[3][odd] = p0;
    }
  }
  for (int j = 0; j < 4; ++j) {
    value[j] = uniform(reinterpret_cast<Word>((c.word[j][0] & 0xffffffffu) | (c.word[j][1] << 32)));
  }
}

// The uniforms of groups group ... group + lanes - 1: value[j] lane i belongs to position 4 (group + i) + j.
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, const Keys& keys,
                          Float (&value)[4]) {
  const PhiloxWords first = philox_counter(group, stream, draw, row);
  Counters c;
  for (int odd = 0; odd < 2; ++odd) {
    for (int i = 0; i < kLanes / 2; ++i) c.word[0][odd][i] = first.word[0] + static_cast<uint32_t>(2 * i + odd);
    for (int j = 1; j < 4; ++j) c.word[j][odd] = splat<Pair>(uint64_t{first.word[j]});
  }
  uniforms(c, keys, value);
}
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, const Keys& keys,
                          double (&value)[4]) {
  PhiloxWords words = philox(philox_counter(group, stream, draw, row), keys.seed);
  for (int j = 0; j < 4; ++j) value[j] = calm_rt::uniform(words.word[j]);
}

// Normals from uniforms by Box-Muller on pairs of them, cosine first.
template <class V>
CALM_INLINE void box_muller(V (&value)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    V radius = quick_square_root(-2.f * logarithm(value[pair] + kUniformStep)), sine, cosine;
    sin_cos_turns(value[pair + 1], sine, cosine);
    value[pair] = radius * cosine;
    value[pair + 1] = radius * sine;
  }
}

}  // namespace calm_rt::CALM_ISA
