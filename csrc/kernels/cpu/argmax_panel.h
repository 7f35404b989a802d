// The screen's right factor: a panel of the vocabulary, its entries rounded to whole numbers that stay in the first
// cache.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/linear_argmax.h"

namespace calm_rt {

// Numbers of a row as the screen stores it.
CALM_INLINE int64_t pad_row(int64_t size) { return (size + 63) / 64 * 64; }

namespace CALM_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4, kTileVectors = kLanes == 16 ? 3 : 2;  // sums that registers hold
constexpr int kPanel = kTileVectors * kLanes;
constexpr float kLargest = 1e30f;  // up to which nothing that the screen computes overflows
constexpr float kMost = 127, kSlack = 2e-6f;
constexpr float kSmallest = 1e-30f;    // with a largest value below it a row counts as zeros, and an error
constexpr double kAdditions = 1.2e-7;  // what a sum in float may lose, for each of its terms
constexpr int64_t kAhead = 8192;       // bytes from what is read to what memory is asked for

// w = scale * (q + e) for each of kPanel consecutive entries, in memory that somebody else owns.
struct Panel {
  float* scale;     // [kPanel]
  float* norm;      // [kPanel], at least |w|; NaN for an entry that the screen cannot bound, or that is none
  float* error;     // [kPanel], at least |scale e|, and room for all that rounding does to a bound
  int32_t* start;   // [kPanel], what undoes the bias of the left factor
  Quantum* quanta;  // [padded_size / kQuanta, kPanel, kQuanta]

  explicit Panel(void* data)
      : scale(static_cast<float*>(data)),
        norm(scale + kPanel),
        error(norm + kPanel),
        start(reinterpret_cast<int32_t*>(error + kPanel)),
        quanta(reinterpret_cast<Quantum*>(start + kPanel)) {}

  static constexpr int64_t bytes(int64_t padded_size) {
    return kPanel * (4 * static_cast<int64_t>(sizeof(float)) + padded_size * static_cast<int64_t>(sizeof(Quantum)));
  }
};

// One entry of the panel; `row` [padded_size] is room for it.
template <class T>
CALM_INLINE void round_entry(const T* weight, int64_t size, int64_t padded_size, int place, Quantum* row,
                             const Panel& panel) {
  Float magnitudes{};  // never NaN, which the sums will show
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    prefetch(weight + k, kAhead / static_cast<int64_t>(sizeof(T)));
    magnitudes = larger(absolute(load_some<Float>(weight + k, count)), magnitudes);
  });
  const float most = largest(magnitudes);
  const bool tiny = most < kSmallest;
  const float scale = tiny ? 0 : most / kMost, inverse = tiny ? 0 : kMost / most;
  Float squares{}, errors{};
  Word digits{};  // wraps around where there are NaN or inf, whose sum means nothing
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    const Float u = load_some<Float>(weight + k, count) * inverse, q = round_to_even(u), e = u - q;
    squares += u * u;
    errors += e * e;
    const Int whole = __builtin_convertvector(q, Int);
    digits += reinterpret_cast<Word>(whole);
    typedef Quantum Quanta __attribute__((vector_size(kLanes * sizeof(Quantum))));
    const Quanta narrow = __builtin_convertvector(whole, Quanta);
    std::memcpy(row + k, &narrow, sizeof narrow);
  });
  for (int64_t k = (size + kLanes - 1) / kLanes * kLanes; k < padded_size; ++k) row[k] = 0;
  const float length = sum(squares);
  const bool odd = !(most <= kLargest && length <= kLargest);
  int32_t digit_sum = 0;  // of numbers that mean something
  for (int i = 0; i < kLanes && !odd; ++i) digit_sum += static_cast<int32_t>(digits[i]);
  // the sums' own rounding, and that of u
  const float sum_slack = 1 + static_cast<float>(size) * static_cast<float>(kAdditions);
  const float root = __builtin_sqrtf(static_cast<float>(size));
  const float tiny_norm = most > 0 ? root * kSmallest : 0;
  const float norm = tiny ? tiny_norm : scale * __builtin_sqrtf(length) * sum_slack * (1 + kSlack);
  const float error = tiny ? tiny_norm : scale * (__builtin_sqrtf(sum(errors)) * sum_slack + root * 2e-5f);
  panel.scale[place] = scale;
  panel.norm[place] = odd ? __builtin_nanf("") : norm;
  panel.error[place] = error + kSlack * norm;
  panel.start[place] = -kQuantumBias * digit_sum;
  for (int64_t k = 0; k < padded_size; k += kQuanta)
    std::memcpy(panel.quanta + k * kPanel + place * kQuanta, row + k, 4);
}

// `count` entries from `first` on; the others of the panel are none.
template <class T>
CALM_INLINE void round_panel(const T* weight, int64_t size, int64_t padded_size, int64_t first, int64_t count,
                             Quantum* row, const Panel& panel) {
  for (int place = 0; place < count; ++place) {
    round_entry(weight + (first + place) * size, size, padded_size, place, row, panel);
  }
  for (int place = static_cast<int>(count); place < kPanel; ++place) {
    panel.norm[place] = __builtin_nanf("");
    panel.scale[place] = panel.error[place] = 0;
    panel.start[place] = 0;
    for (int64_t k = 0; k < padded_size; k += kQuanta) std::memset(panel.quanta + k * kPanel + place * kQuanta, 0, 4);
  }
}

}  // namespace
}  // namespace CALM_ISA
}  // namespace calm_rt
