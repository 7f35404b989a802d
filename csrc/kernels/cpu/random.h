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

// Rounds `first` ... 9, and then value[b][j] lane i is word j of counter i of batch b as a uniform. A batch is one long
// chain of dependent instructions, so that two side by side take hardly longer than one.
template <int first = 0, int kBatches>
CALM_INLINE void uniforms(Counters (&c)[kBatches], const Keys& keys, Float (&value)[kBatches][4]) {
  const Pair multiplier0 = splat<Pair>(uint64_t{kPhiloxMultiplier0});
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
#pragma GCC unroll 10
  for (int round = first; round < 10; ++round) {
#pragma GCC unroll 2
    for (int b = 0; b < kBatches; ++b) {
      auto& word = c[b].word;
      for (int odd = 0; odd < 2; ++odd) {
        Pair p0 = multiply_low(word[0][odd], multiplier0), p1 = multiply_low(word[2][odd], multiplier1);
        word[0][odd] = (p1 >> 32) ^ word[1][odd] ^ keys.word[round][0];
        word[1][odd] = p1;
        word[2][odd] = (p0 >> 32) ^ word[3][odd] ^ keys.word[round][1];
        word[3][odd] = p0;
      }
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < kBatches; ++b) {
    for (int j = 0; j < 4; ++j) value[b][j] = uniform(interleave(c[b].word[j][0], c[b].word[j][1]));
  }
}

// The uniforms of one batch: value[j] lane i is word j of counter i.
CALM_INLINE void uniforms(const Counters& counters, const Keys& keys, Float (&value)[4]) {
  Counters batch[] = {counters};
  Float values[1][4];
  uniforms(batch, keys, values);
  for (int j = 0; j < 4; ++j) value[j] = values[0][j];
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

// The uniforms of those groups in draws draw ... draw + kDraws - 1.
template <int kDraws>
CALM_INLINE void finish_uniforms(const float* known, uint32_t draw, int64_t row, const Keys& keys,
                                 Float (&value)[kDraws][4]) {
  const uint32_t of_row = multiply_high(kPhiloxMultiplier1, static_cast<uint32_t>(row));
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
  Counters c[kDraws];
#pragma GCC unroll 2
  for (int d = 0; d < kDraws; ++d) {
    const uint32_t word = of_row ^ (draw + static_cast<uint32_t>(d)) ^ static_cast<uint32_t>(keys.word[0][0]);
    const uint64_t product = static_cast<uint64_t>(kPhiloxMultiplier0) * word;
    for (int odd = 0; odd < 2; ++odd) {
      const float* from = known + odd * kLanes;
      const Pair of_draw = multiply_low(load_pair(from) ^ (product >> 32), multiplier1);
      c[d].word[0][odd] = (of_draw >> 32) ^ load_pair(from + 2 * kLanes);
      c[d].word[1][odd] = of_draw;
      c[d].word[2][odd] = load_pair(from + 4 * kLanes) ^ (product & 0xffffffffu);
      c[d].word[3][odd] = load_pair(from + 6 * kLanes);
    }
  }
  uniforms<3>(c, keys, value);
}

// ---- normals ----

// Entry `index mod 16` of a table, lane by lane.
CALM_INLINE Float look_up(const float (&table)[16], Int index) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), _mm512_load_ps(table)));
#elif defined(__AVX2__)
  const __m256i at = reinterpret_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), at);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), at);
  return reinterpret_cast<Float>(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
#else
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i] & 15];
  return v;
#endif
}

// 1 / c to 12 bits for c = 3/4, 25/32 ... 31/32, 1, 17/16 ... 23/16, and 2 log of it.
alignas(64) constexpr float kReciprocal[16] = {1.333496094f,  1.279785156f,  1.230957031f,  1.185058594f,
                                               1.143066406f,  1.103515625f,  1.066894531f,  1.032226562f,
                                               1.f,           0.9411621094f, 0.8889160156f, 0.8420410156f,
                                               0.8000488281f, 0.7619628906f, 0.7272949219f, 0.6955566406f};
alignas(64) constexpr float kTwiceLogReciprocal[16] = {
    0.5756082535f,  0.4933844209f, 0.4155838788f,  0.33958444f,    0.2674289644f, 0.1970022172f,  0.1295042485f,
    0.06343635917f, 0.f,           -0.1212797612f, -0.2355050445f, -0.343853116f, -0.4461650252f, -0.5437148213f,
    -0.6368464231f, -0.7260856628f};

// -2 log(x) for a normal positive x, within 2 ulp: x = 2^e m with m near the c of a table, and log(m / c) by a series.
CALM_INLINE Float minus_twice_logarithm(Float x) {
  const Int bits = reinterpret_cast<Int>(x), above = bits - 0x3f3c0000;  // 3/4 less half the way to 25/32
  const Int power = above & ~0x007fffff;
  const Float m = reinterpret_cast<Float>(bits - power);
  const Int index = above >> 19;
  const Float reciprocal = look_up(kReciprocal, index);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Float r = m * reciprocal - 1.f;
#else  // without rounding the product: 12 bits of m by 12
  const Float leading = reinterpret_cast<Float>(reinterpret_cast<Int>(m) & ~0x0fff);
  const Float r = (leading * reciprocal - 1.f) + (m - leading) * reciprocal;
#endif
  Float p = splat<Float>(0.50046223f);
  p = p * r - 0.66699151f;
  p = p * r + 0.99999987f;
  const Float start = __builtin_convertvector(power, Float) * -1.6525916e-7f + look_up(kTwiceLogReciprocal, index);
  return p * (r * r) + (r * -2.f + start);
}
CALM_INLINE double minus_twice_logarithm(double x) { return -2 * __builtin_log(x); }

// The sine of sixteenths of a turn.
alignas(64) constexpr float kSine[16] = {
    0.f, 0.38268343237f,  0.70710678119f,  0.92387953251f,  1.f,  0.92387953251f,  0.70710678119f,  0.38268343237f,
    0.f, -0.38268343237f, -0.70710678119f, -0.92387953251f, -1.f, -0.92387953251f, -0.70710678119f, -0.38268343237f};

// sin(2 pi u) and cos(2 pi u) for u in [0, 1): the reduction to the nearest sixteenth of a turn is exact, the error
// below 1e-7.
CALM_INLINE void sin_cos_turns(Float u, Float& sine, Float& cosine) {
  const Float magic = splat<Float>(12582912.f);  // added, it rounds to whole numbers, which its low bits then hold
  const Float shifted = u * 16.f + magic;
  const Int index = reinterpret_cast<Int>(shifted);
  const Float r = u * 16.f - (shifted - magic), z = r * r;
  Float s = splat<Float>(7.77176854e-5f);
  s = s * z - 1.00931790e-2f;
  s = (s * z + 3.92699082e-1f) * r;  // sin(pi r / 8)
  Float c = splat<Float>(9.8911224e-4f);
  c = (c * z - 7.710615e-2f) * z;  // cos(pi r / 8) - 1
  const Float sine_at = look_up(kSine, index), cosine_at = look_up(kSine, index + 4);
  sine = sine_at + (cosine_at * s + sine_at * c);
  cosine = cosine_at + (cosine_at * c - sine_at * s);
}
CALM_INLINE void sin_cos_turns(double u, double& sine, double& cosine) {
  sine = __builtin_sin(6.283185307179586477 * u);
  cosine = __builtin_cos(6.283185307179586477 * u);
}

// Normals from uniforms by Box-Muller on pairs of them, cosine first.
template <class V>
CALM_INLINE void box_muller(V (&value)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    V radius = quick_square_root(minus_twice_logarithm(value[pair] + kUniformStep)), sine, cosine;
    sin_cos_turns(value[pair + 1], sine, cosine);
    value[pair] = radius * cosine;
    value[pair + 1] = radius * sine;
  }
}

}  // namespace calm_rt::CALM_ISA
