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

// The low halves of both, the first at even places.
CALM_INLINE Word interleave(Pair even, Pair odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<Word>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(even), 0xAAAA,
                                                          reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
#else
  return reinterpret_cast<Word>((even & 0xffffffffu) | (odd << 32));
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

// Rounds `first` ... 9, and then value[j] lane i is word j of counter i as a uniform.
template <int first = 0>
CALM_INLINE void uniforms(Counters c, const Keys& keys, Float (&value)[4]) {
  const Pair multiplier0 = splat<Pair>(uint64_t{kPhiloxMultiplier0});
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
#pragma GCC unroll 10
  for (int round = first; round < 10; ++round) {
    for (int odd = 0; odd < 2; ++odd) {
      Pair p0 = multiply_low(c.word[0][odd], multiplier0), p1 = multiply_low(c.word[2][odd], multiplier1);
      c.word[0][odd] = (p1 >> 32) ^ c.word[1][odd] ^ keys.word[round][0];
      c.word[1][odd] = p1;
      c.word[2][odd] = (p0 >> 32) ^ c.word[3][odd] ^ keys.word[round][1];
      c.word[3][odd] = p0;
    }
  }
  for (int j = 0; j < 4; ++j) {
    value[j] = uniform(interleave(c.word[j][0], c.word[j][1]));
  }
}

// The counters of groups group ... group + lanes - 1 before the first round.
CALM_INLINE Counters counters(uint32_t group, uint32_t stream, uint32_t draw, int64_t row) {
  const PhiloxWords first = philox_counter(group, stream, draw, row);
  Counters c;
  for (int odd = 0; odd < 2; ++odd) {
    for (int i = 0; i < kLanes / 2; ++i) c.word[0][odd][i] = first.word[0] + static_cast<uint32_t>(2 * i + odd);
    for (int j = 1; j < 4; ++j) c.word[j][odd] = splat<Pair>(uint64_t{first.word[j]});
  }
  return c;
}

// The uniforms of groups group ... group + lanes - 1: value[j] lane i belongs to position 4 (group + i) + j.
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, const Keys& keys,
                          Float (&value)[4]) {
  uniforms(counters(group, stream, draw, row), keys, value);
}
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, const Keys& keys,
                          double (&value)[4]) {
  PhiloxWords words = philox(philox_counter(group, stream, draw, row), keys.seed);
  for (int j = 0; j < 4; ++j) value[j] = calm_rt::uniform(words.word[j]);
}

// What the first three rounds make of kLanes groups of a row, whatever the draw: of them, a draw changes one word
// before the first round, so one word of all lanes alike before the second, and half of each product of the third. For
// the draws of one row a fifth of the work is spared. Kept in memory as 8 vectors: even and odd lanes of the second
// round's c2 but for the high word of the draw's product; of the third round's c0 but for its product of c2, of its c2
// but for the low word of the draw's product, and of its c3.
constexpr int kRowCounters = 8 * kLanes;  // floats

CALM_INLINE Pair load_pair(const float* from) {
  Pair v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
CALM_INLINE void store_pair(float* to, Pair v) { std::memcpy(to, &v, sizeof v); }

CALM_INLINE void start_uniforms(uint32_t group, uint32_t stream, int64_t row, const Keys& keys, float* known) {
  const Counters c = counters(group, stream, 0, row);
  const Pair multiplier0 = splat<Pair>(uint64_t{kPhiloxMultiplier0});
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
  for (int odd = 0; odd < 2; ++odd) {
    const Pair of_group = multiply_low(c.word[0][odd], multiplier0), of_row = multiply_low(c.word[2][odd], multiplier1);
    const Pair second = multiply_low((of_group >> 32) ^ c.word[3][odd] ^ keys.word[0][1], multiplier1);
    const Pair third = multiply_low((second >> 32) ^ of_row ^ keys.word[1][0], multiplier0);
    float* to = known + odd * kLanes;
    store_pair(to, of_group ^ keys.word[1][1]);
    store_pair(to + 2 * kLanes, second ^ keys.word[2][0]);
    store_pair(to + 4 * kLanes, (third >> 32) ^ keys.word[2][1]);
    store_pair(to + 6 * kLanes, third);
  }
}

// The uniforms of those groups in one draw.
CALM_INLINE void finish_uniforms(const float* known, uint32_t draw, int64_t row, const Keys& keys, Float (&value)[4]) {
  const uint32_t of_row = multiply_high(kPhiloxMultiplier1, static_cast<uint32_t>(row));
  const uint32_t word = of_row ^ draw ^ static_cast<uint32_t>(keys.word[0][0]);
  const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier0) * word;
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
  Counters c;
  for (int odd = 0; odd < 2; ++odd, known += kLanes) {
    const Pair of_draw = multiply_low(load_pair(known) ^ (product >> 32), multiplier1);
    c.word[0][odd] = (of_draw >> 32) ^ load_pair(known + 2 * kLanes);
    c.word[1][odd] = of_draw;
    c.word[2][odd] = load_pair(known + 4 * kLanes) ^ (product & 0xffffffffu);
    c.word[3][odd] = load_pair(known + 6 * kLanes);
  }
  uniforms<3>(c, keys, value);
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
