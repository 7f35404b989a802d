// The one SIMD layer: float vectors on compiler vector extensions, as wide as this file's instruction set.
//
// Every kernel source of this folder is compiled once per instruction set (CALM_ISA = portable, avx2, avx512), each in
// a namespace of its own. Such a file may include own headers and intrinsics only: an inline std function compiled for
// AVX-512 could be the copy that the linker keeps for everybody. The double overloads (one lane) let one kernel source
// serve float64.
#pragma once
#include <cstdint>
#include <cstring>

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

// Asks for the cache line `ahead` elements from here, which may lie beyond the end of what is read.
template <class T>
CALM_INLINE void prefetch(const T* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + ahead * sizeof(T)));
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

// Lane i is the sum of v[i]: in 4 kLanes instructions what takes several times as many one by one. Overwrites v.
CALM_INLINE Float sums(Float (&v)[kLanes]) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const Int upper = (lane & half) != 0;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Float kept = select(upper, v[i + half], v[i]), given = select(upper, v[i], v[i + half]);
      v[i] = kept + __builtin_shuffle(given, lane ^ half);
    }
  }
  return v[0];
}

// a > b ? a : b, so b where one of them is NaN.
CALM_INLINE Float larger(Float a, Float b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Float>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Float>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
CALM_INLINE double larger(double a, double b) { return a > b ? a : b; }
CALM_INLINE float largest(Float v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
CALM_INLINE double largest(double v) { return v; }

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

// The same within 2 ulp for x = 0 or a normal x, in a quarter of the time: one Newton step from the estimate of
// 1 / sqrt(x).
CALM_INLINE Float quick_square_root(Float x) {
#if defined(__AVX2__)
  const Float positive = larger(x, splat<Float>(1e-30f));
#if defined(__AVX512F__)
  const Float estimate = reinterpret_cast<Float>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(positive)));
#else
  const Float estimate = reinterpret_cast<Float>(_mm256_rsqrt_ps(reinterpret_cast<__m256>(positive)));
#endif
  const Float root = x * estimate;
  return root + root * (0.5f - root * (0.5f * estimate));
#else
  return square_root(x);
#endif
}
CALM_INLINE double quick_square_root(double x) { return __builtin_sqrt(x); }

// To the nearest integer, ties to even, for |x| < 2^22.
CALM_INLINE Float round_to_even(Float x) {
  const Float magic = splat<Float>(12582912.f);
  return (x + magic) - magic;
}

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

template <class V>
CALM_INLINE V sigmoid(V z) {
  return 1 / (1 + exponential(-z));
}

CALM_INLINE float inverse_root(float x) { return 1 / __builtin_sqrtf(x); }
CALM_INLINE double inverse_root(double x) { return 1 / __builtin_sqrt(x); }

CALM_INLINE Float absolute(Float x) { return reinterpret_cast<Float>(reinterpret_cast<Int>(x) & 0x7fffffff); }
CALM_INLINE double absolute(double x) { return __builtin_fabs(x); }

// A bit for each lane of a comparison that holds, that of lane 0 lowest.
CALM_INLINE uint32_t lane_bits(Int mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
}
CALM_INLINE bool any(Int mask) { return lane_bits(mask) != 0; }

// ---- products of small whole numbers ----

// A 32-bit lane holds kQuanta consecutive numbers of a row, -127 to 127 each; those of the left factor are stored with
// kQuantumBias added.
#if defined(__AVX512VNNI__)
typedef int8_t Quantum;
constexpr int kQuantumBias = 128;
#else
typedef int16_t Quantum;
constexpr int kQuantumBias = 0;
#endif
constexpr int kQuanta = 4 / sizeof(Quantum);

CALM_INLINE Int load_whole(const void* from) {
  Int v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// total + the sum of each lane's kQuanta products
CALM_INLINE Int multiply_add(Int left, Int right, Int total) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Int>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(left),
                                                   reinterpret_cast<__m512i>(right)));
#elif defined(__AVX512F__)
  return total +
         reinterpret_cast<Int>(_mm512_madd_epi16(reinterpret_cast<__m512i>(left), reinterpret_cast<__m512i>(right)));
#elif defined(__AVX2__)
  return total +
         reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(left), reinterpret_cast<__m256i>(right)));
#elif defined(__x86_64__)
  return total +
         reinterpret_cast<Int>(_mm_madd_epi16(reinterpret_cast<__m128i>(left), reinterpret_cast<__m128i>(right)));
#else
  return total + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
}

}  // namespace calm_rt::CALM_ISA
