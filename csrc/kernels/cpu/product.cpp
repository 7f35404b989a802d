// A product of float matrices on one CPU thread, after Goto and van de Geijn (2008): a block of b is packed into panels
// that stay in the second cache, rows of a into a strip that stays in the first, and a tile of sums in registers meets
// both front to back.
#include "kernels/product.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(void product_kernel(const MatrixProduct& p);)

namespace CALM_ISA {
namespace {

// A tile's sums, two vectors of b and one number of a fill the registers: 32 with AVX-512, otherwise 16.
#if defined(__AVX512F__)
constexpr int kRows = 14;
#else
constexpr int kRows = 6;
#endif
constexpr bool kManyRegisters = kRows > 6;
constexpr int kColumns = 2 * kLanes;
constexpr int kStrip = (kRows + kLanes - 1) / kLanes * kLanes;  // a row of packed a
// 384 KB of b and 14 KB of a. On a Xeon with 2 MB of second cache 192 to 384 deep and 384 to 640 wide differ by 3 %.
constexpr int64_t kDepth = 256, kWidth = 384;

// Turns kCount rows of kLanes numbers, `row` apart, into as many columns, `to_row` apart, zeros behind them.
template <int kCount>
CALM_INLINE void transpose(const float* from, int64_t row, float* to, int64_t to_row) {
  Float v[kLanes] = {};
  Int lane;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) v[i] = load(from + i * row);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {  // swaps squares of this size across the diagonal
    const Int lower = (lane & half) != 0 ? lane - half + kLanes : lane;
    const Int upper = (lane & half) != 0 ? lane + kLanes : lane + half;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & half) continue;
      const Float a = v[i], b = v[i + half];
      v[i] = __builtin_shuffle(a, b, lower);
      v[i + half] = __builtin_shuffle(a, b, upper);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_row, v[i]);
}

// Packs up to kStep rows of `depth` numbers: number k of row r goes to to[k * kStride + r], and zeros behind the last.
template <int kStep, int kStride>
CALM_INLINE void pack(const float* from, int64_t row, int64_t column, int64_t count, int64_t depth, float* to) {
  static_assert(kStride % kLanes == 0 && kStep <= kStride);
  int64_t k = 0;
  if (count == kStep && row == 1) {
    for (; k < depth; ++k) std::memcpy(to + k * kStride, from + k * column, kStep * sizeof(float));
  } else if (count == kStep && column == 1) {
    for (; k + kLanes <= depth; k += kLanes) {
      int r = 0;
#pragma GCC unroll 4
      for (; r + kLanes <= kStep; r += kLanes)
        transpose<kLanes>(from + r * row + k, row, to + k * kStride + r, kStride);
      if constexpr (kStep % kLanes != 0) {
        transpose<kStep % kLanes>(from + r * row + k, row, to + k * kStride + r, kStride);
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t r = 0; r < kStep; ++r) to[k * kStride + r] = r < count ? from[r * row + k * column] : 0;
  }
}

// The sums of kCount rows and kColumns columns, to[r * kColumns + n]. A function of its own that does no more than
// this, or the compiler keeps sums in memory (on a Zen 4 that cost 6 %).
template <int kCount>
static __attribute__((noinline)) void add_tile(const float* a, const float* b, int64_t depth, float* to) {
  Float sum[kCount][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kStrip, b += kColumns) {
    const Float first = load(b), second = load(b + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kCount; ++r) {
      const Float x = a[r] - Float{};  // x + 0 would be an addition: it turns -0 into 0
      sum[r][0] += x * first;
      sum[r][1] += x * second;
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kCount; ++r) {
    store(to + r * kColumns, sum[r][0]);
    store(to + r * kColumns + kLanes, sum[r][1]);
  }
}

template <int kCount = kRows>
CALM_INLINE void add_rows(int64_t count, const float* a, const float* b, int64_t depth, float* to) {
  if (count == kCount) return add_tile<kCount>(a, b, depth, to);
  if constexpr (kCount > 1) add_rows<kCount - 1>(count, a, b, depth, to);
}

CALM_INLINE int64_t at_most(int64_t limit, int64_t count) { return count < limit ? count : limit; }

// A product of kCount <= kFewProductRows rows, where b's columns and a's rows are runs of memory.
template <int kCount = int{kFewProductRows}>
CALM_INLINE void multiply_few(const MatrixProduct& p) {
  if constexpr (kCount > 1) {
    if (p.rows < kCount) return multiply_few<kCount - 1>(p);
  }
  constexpr int kTogether = 4;  // columns
  for (int64_t n = 0; n < p.columns; n += kTogether) {
    const int64_t count = at_most(kTogether, p.columns - n);
    const float* column[kTogether];
    for (int i = 0; i < kTogether; ++i) column[i] = p.b + (n + (i < count ? i : 0)) * p.b_column;
    Float sums[kCount][kTogether] = {};
    each_run<Float>(0, p.depth, [&](int64_t k, int64_t lanes) {
      Float b[kTogether];
      for (int i = 0; i < kTogether; ++i) b[i] = load_some<Float>(column[i] + k, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const Float a = load_some<Float>(p.a + r * p.a_row + k, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) sums[r][i] += a * b[i];
      }
    });
    for (int r = 0; r < kCount; ++r) {
      for (int i = 0; i < count; ++i) {
        p.out[r * p.out_row + n + i] = sum(sums[r][i]) + (p.bias ? p.bias[n + i] : 0);
      }
    }
  }
}

// Up to which depth b stays in the first cache, 64 columns of it at a time, so that packing it gains nothing: 1,024 by
// 256 numbers that sum up 16 products take 83 us, and 103 packed; 64 products 308 and 351 (Zen 4). With 16 registers
// packing is as fast.
constexpr int64_t kShallow = kManyRegisters ? 64 : 0;

// kVectors vectors of columns from n on, of which the last has `lanes` columns, of kCount rows from m on.
template <int kCount, int kVectors>
CALM_INLINE void multiply_along_rows(const MatrixProduct& p, int64_t m, int64_t n, int64_t lanes) {
  Float sums[kCount][kVectors] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    const float* a = p.a + m * p.a_row + k * p.a_column;
    Float b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load_some<Float>(p.b + k * p.b_row + n + v * kLanes, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r * p.a_row] * b[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = n + v * kLanes;
      const Float bias = p.bias ? load_some<Float>(p.bias + column, lanes) : Float{};
      store_some(p.out + (m + r) * p.out_row + column, sums[r][v] + bias, lanes);
    }
  }
}

// A product where b's rows are runs of memory, of kCount <= kFewProductRows rows from m on.
template <int kCount = int{kFewProductRows}>
CALM_INLINE void multiply_few_along_rows(const MatrixProduct& p, int64_t m, int64_t count) {
  if constexpr (kCount > 1) {
    if (count < kCount) return multiply_few_along_rows<kCount - 1>(p, m, count);
  }
  constexpr int kTogether = kManyRegisters ? 4 : 2;  // vectors: kFewProductRows rows of sums that stay in registers
  int64_t n = 0;
  for (; n + kTogether * kLanes <= p.columns; n += kTogether * kLanes) {
    multiply_along_rows<kCount, kTogether>(p, m, n, kLanes);
  }
  each_run<Float>(n, p.columns, [&](int64_t i, int64_t lanes) { multiply_along_rows<kCount, 1>(p, m, i, lanes); });
}

}  // namespace

void product_kernel(const MatrixProduct& p) {
  if (p.rows == 0) return;
  if (p.rows <= kFewProductRows && p.b_row == 1 && p.a_column == 1) return multiply_few(p);
  if (p.b_column == 1 && (p.rows <= kFewProductRows || p.depth <= kShallow)) {
    for (int64_t m = 0; m < p.rows; m += kFewProductRows)
      multiply_few_along_rows(p, m, at_most(kFewProductRows, p.rows - m));
    return;
  }
  alignas(64) float panels[kDepth * kWidth], strip[kDepth * kStrip], sums[kRows * kColumns];
  const int64_t blocks = (p.columns + kWidth - 1) / kWidth;  // as wide as each other, or a narrow last one costs a pass
  const int64_t block = blocks == 0 ? kWidth : ((p.columns + blocks - 1) / blocks + kColumns - 1) / kColumns * kColumns;
  for (int64_t n0 = 0; n0 < p.columns; n0 += block) {
    const int64_t width = at_most(block, p.columns - n0);
    for (int64_t k0 = 0; k0 == 0 || k0 < p.depth; k0 += kDepth) {  // once also for depth 0
      const int64_t depth = at_most(kDepth, p.depth - k0);
      const float* b = p.b + k0 * p.b_row + n0 * p.b_column;
      for (int64_t n = 0; n < width; n += kColumns) {
        pack<kColumns, kColumns>(b + n * p.b_column, p.b_column, p.b_row, at_most(kColumns, width - n), depth,
                                 panels + n * kDepth);
      }
      for (int64_t m = 0; m < p.rows; m += kRows) {
        const int64_t count = at_most(kRows, p.rows - m);
        pack<kRows, kStrip>(p.a + m * p.a_row + k0 * p.a_column, p.a_row, p.a_column, count, depth, strip);
        for (int64_t n = 0; n < width; n += kColumns) {
          add_rows(count, strip, panels + n * kDepth, depth, sums);
          for (int64_t r = 0; r < count; ++r) {
            float* out = p.out + (m + r) * p.out_row + n0 + n;
            const float* before = k0 > 0 ? out : p.bias ? p.bias + n0 + n : nullptr;
            each_run<Float>(0, at_most(kColumns, width - n), [&](int64_t i, int64_t lanes) {
              const Float sum = load(sums + r * kColumns + i);
              store_some(out + i, before ? sum + load_some<Float>(before + i, lanes) : sum, lanes);
            });
          }
        }
      }
    }
  }
}

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
void launch(Cpu, const MatrixProduct& p) { CALM_SELECT(product_kernel)(p); }
#endif

}  // namespace calm_rt
