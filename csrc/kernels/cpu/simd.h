// The one SIMD layer: float vectors on compiler vector extensions, as wide as this file's instruction set.
//
// Every kernel source of this folder is compiled once per instruction set (CALM_ISA = portable, avx2, avx512), each in
// a namespace of its own. Such a file may include own headers and intrinsics only: an inline std function compiled for
// AVX-512 could be the copy that the linker keeps for everybody. The double overloads (one lane) let one kernel source
// serve float64.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "common/types.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

// Declares a function in the namespace of every instruction set that this build has.
#ifdef __x86_64__
#define CALM_EACH_ISA(...) \
  namespace portable {     \
  __VA_ARGS__              \
  }                        \
  namespace avx2 {         \
  __VA_ARGS__              \
  }                        \
  namespace avx512 {       \
  __VA_ARGS__              \
  }
#else
#define CALM_EACH_ISA(...) \
  namespace portable {     \
  __VA_ARGS__              \
  }
#endif

#define CALM_INLINE static inline __attribute__((always_inline))

namespace calm_rt::CALM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Pair __attribute__((vector_size(4 * kLanes)));

// The vector that a kernel computes in: Float for float, one lane of double for double.
template <class T>
struct VectorOf {
  using type = Float;
};
template <>
struct VectorOf<double> {
  using type = double;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class V>
constexpr int lanes = sizeof(V) == sizeof(double) ? 1 : kLanes;

// ---- memory ----

CALM_INLINE Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CALM_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
CALM_INLINE double load(const double* p) { return *p; }
CALM_INLINE void store(double* p, double v) { *p = v; }

template <class V, class T>
CALM_INLINE V splat(T x) {
  return V{} + x;
}

CALM_INLINE float widen(float x) { return x; }
CALM_INLINE double widen(double x) { return x; }
CALM_INLINE float widen(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
CALM_INLINE float widen(half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }

CALM_INLINE void narrow(float x, float* out) { *out = x; }
CALM_INLINE void narrow(double x, double* out) { *out = x; }
CALM_INLINE void narrow(float x, bfloat16* out) {  // to nearest even; NaN stays NaN
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
CALM_INLINE void narrow(float x, half* out) { out->bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }

// kLanes elements of a 16-bit type as floats, and back.
CALM_INLINE Float load(const bfloat16* p) {
  uint16_t bits __attribute__((vector_size(2 * kLanes)));
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Float>(__builtin_convertvector(bits, Word) << 16);
}
CALM_INLINE void store(bfloat16* p, Float v) {
  typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));
  const Word bits = reinterpret_cast<Word>(v);
  const Word rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Short out = __builtin_convertvector(v == v ? rounded : (bits >> 16 | 0x40u), Short);
  std::memcpy(p, &out, sizeof out);
}
CALM_INLINE Float load(const half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
CALM_INLINE void store(half* p, Float v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
#endif
}

// The first `count` of a vector's elements, zeros after them.
template <class V, class T>
CALM_INLINE V load_some(const T* from, int64_t count) {
  if (count == lanes<V>) return load(from);
  T part[lanes<V>] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}
template <class V, class T>
CALM_INLINE void store_some(T* to, V v, int64_t count) {
  if (count == lanes<V>) return store(to, v);
  T part[lanes<V>];
  store(part, v);
  std::memcpy(to, part, static_cast<size_t>(count) * sizeof(T));
}

// Calls body(i, count) for elements i ... i + count - 1 of all of [begin, end), a vector of them at a time.
template <class V, class Body>
CALM_INLINE void each_run(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + lanes<V> <= end; i += lanes<V>) body(i, int64_t{lanes<V>});
  if (i < end) body(i, end - i);
}

// ---- arithmetic ----

CALM_INLINE Float select(Int mask, Float a, Float b) { return mask ? a : b; }

CALM_INLINE float sum(Float v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
CALM_INLINE double sum(double v) { return v; }

CALM_INLINE Float square_root(Float x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Float>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  Float root;
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}
CALM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// To the nearest integer, ties to even, for |x| < 2^22.
CALM_INLINE Float round_to_even(Float x) {
  const Float magic = splat<Float>(12582912.f);
  return (x + magic) - magic;
}

// Natural logarithm of a normal positive x, within 0.7 ulp (coefficients of Cephes' logf).
CALM_INLINE Float logarithm(Float x) {
  Int bits = reinterpret_cast<Int>(x);
  Int exponent = (bits >> 23) - 126;
  Float m = reinterpret_cast<Float>((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Int small = m < splat<Float>(0.707106781f);                           // -1 where true
  exponent += small;
  m = select(small, m + m, m) - 1.f;
  Float z = m * m;
  Float p = splat<Float>(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Float e = __builtin_convertvector(exponent, Float);
  Float y = p * m * z;
  y = e * -2.12194440e-4f + y;
  y = z * -0.5f + y;
  return e * 0.693359375f + (m + y);
}
CALM_INLINE double logarithm(double x) { return __builtin_log(x); }

// e^x for any x, within 1 ulp, also where the result is subnormal, 0, infinite or NaN (coefficients of Cephes' expf).
CALM_INLINE Float exponential(Float x) {
  x = select(x > splat<Float>(89.f), splat<Float>(89.f), x);  // infinite from 88.73 on
  x = select(x < splat<Float>(-104.f), splat<Float>(-104.f), x);
  Float n = round_to_even(x * 1.44269504f);
  Float near = x - n * 0.693359375f;  // exact
  Float r = near - n * -2.12194440e-4f;
  Float lost = (near - r) - n * -2.12194440e-4f;  // what rounding r has lost
  Float p = splat<Float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Float y = 1.f + (r + (p * (r * r) + lost));
  Int power = __builtin_convertvector(n, Int), half_power = power >> 1;  // 2^n in two steps, either of them normal
  y *= reinterpret_cast<Float>((half_power + 127) << 23);
  return y * reinterpret_cast<Float>((power - half_power + 127) << 23);
}
CALM_INLINE double exponential(double x) { return __builtin_exp(x); }

// sin(2 pi u) and cos(2 pi u) for u in [0, 1): the reduction to a quarter turn is exact, the error below 1e-7.
CALM_INLINE void sin_cos_turns(Float u, Float& sine, Float& cosine) {
  Float quarter = round_to_even(u * 4.f);
  Float r = (u * 4.f - quarter) * 1.57079632679f;
  Int k = __builtin_convertvector(quarter, Int);
  Float z = r * r;
  Float s = splat<Float>(-1.9515295891e-4f);
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * (z * r) + r;
  Float c = splat<Float>(2.443315711809948e-5f);
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * (z * z) + (1.f - 0.5f * z);
  Int swap = (k & 1) != 0;
  sine = reinterpret_cast<Float>(reinterpret_cast<Int>(select(swap, c, s)) ^ ((k & 2) << 30));
  cosine = reinterpret_cast<Float>(reinterpret_cast<Int>(select(swap, s, c)) ^ (((k + 1) & 2) << 30));
}
CALM_INLINE void sin_cos_turns(double u, double& sine, double& cosine) {
  sine = __builtin_sin(6.283185307179586477 * u);
  cosine = __builtin_cos(6.283185307179586477 * u);
}

// ---- random numbers: common/philox.h, one counter a lane ----

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

// value[j] lane i is word j of counter i as a uniform.
CALM_INLINE void uniforms(Counters c, uint64_t seed, Float (&value)[4]) {
  const Pair multiplier0 = splat<Pair>(uint64_t{kPhiloxMultiplier0});
  const Pair multiplier1 = splat<Pair>(uint64_t{kPhiloxMultiplier1});
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int odd = 0; odd < 2; ++odd) {
      Pair p0 = multiply_low(c.word[0][odd], multiplier0), p1 = multiply_low(c.word[2][odd], multiplier1);
      c.word[0][odd] = (p1 >> 32) ^ c.word[1][odd] ^ uint64_t { key0 };
      c.word[1][odd] = p1;
      c.word[2][odd] = (p0 >> 32) ^ c.word[3][odd] ^ uint64_t { key1 };
      c.word[3][odd] = p0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  for (int j = 0; j < 4; ++j) {
    value[j] = uniform(reinterpret_cast<Word>((c.word[j][0] & 0xffffffffu) | (c.word[j][1] << 32)));
  }
}

// The uniforms of groups group ... group + lanes - 1: value[j] lane i belongs to position 4 (group + i) + j.
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, uint64_t seed,
                          Float (&value)[4]) {
  const PhiloxWords first = philox_counter(group, stream, draw, row);
  Counters c;
  for (int odd = 0; odd < 2; ++odd) {
    for (int i = 0; i < kLanes / 2; ++i) c.word[0][odd][i] = first.word[0] + static_cast<uint32_t>(2 * i + odd);
    for (int j = 1; j < 4; ++j) c.word[j][odd] = splat<Pair>(uint64_t{first.word[j]});
  }
  uniforms(c, seed, value);
}
CALM_INLINE void uniforms(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, uint64_t seed,
                          double (&value)[4]) {
  PhiloxWords words = philox(philox_counter(group, stream, draw, row), seed);
  for (int j = 0; j < 4; ++j) value[j] = calm_rt::uniform(words.word[j]);
}

// Normals from uniforms by Box-Muller on pairs of them, cosine first.
template <class V>
CALM_INLINE void box_muller(V (&value)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    V radius = square_root(-2.f * logarithm(value[pair] + kUniformStep)), sine, cosine;
    sin_cos_turns(value[pair + 1], sine, cosine);
    value[pair] = radius * cosine;
    value[pair + 1] = radius * sine;
  }
}

// The normals of the same positions as those of `uniforms`.
template <class V>
CALM_INLINE void normals(uint32_t group, uint32_t stream, uint32_t draw, int64_t row, uint64_t seed, V (&value)[4]) {
  uniforms(group, stream, draw, row, seed, value);
  box_muller(value);
}

}  // namespace calm_rt::CALM_ISA
