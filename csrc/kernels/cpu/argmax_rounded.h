// The screen by products of whole numbers: rows of hidden, rounded to 8 bits, against panels of the vocabulary.
#pragma once
#include "common/isa.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/argmax_panel.h"
#include "kernels/cpu/argmax_search.h"

namespace calm_rt::CALM_ISA {
namespace {

// A float that is at least x >= 0.
CALM_INLINE float above(double x) { return static_cast<float>(x) * (1 + kSlack); }

// A row whose numbers are neither tiny nor huge, as most are; false for another.
template <class T>
CALM_INLINE bool round_row(const T* in, int64_t size, const ArgmaxScreen& screen, int64_t r) {
  Float magnitudes{};  // never NaN, which the sums will show
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    magnitudes = larger(absolute(load_some<Float>(in + k, count)), magnitudes);
  });
  const float most = largest(magnitudes);
  if (!(most >= kSmallest && most <= kLargest)) return false;
  const float inverse = kMost / most;
  Quantum* quanta = static_cast<Quantum*>(screen.rows) + r * screen.padded_size;
  Float squares{}, errors{};
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    const Float u = load_some<Float>(in + k, count) * inverse, q = round_to_even(u), e = u - q;
    squares += q * q;
    errors += e * e;
    typedef Quantum Quanta __attribute__((vector_size(kLanes * sizeof(Quantum))));
    const Quanta narrow = __builtin_convertvector(__builtin_convertvector(q, Int) + kQuantumBias, Quanta);
    std::memcpy(quanta + k, &narrow, sizeof narrow);
  });
  const double length = static_cast<double>(sum(squares));
  if (length != length) return false;
  for (int64_t k = (size + kLanes - 1) / kLanes * kLanes; k < screen.padded_size; ++k) {
    quanta[k] = static_cast<Quantum>(kQuantumBias);
  }
  // the sums' own rounding, and that of u
  const double sum_slack = 1 + static_cast<double>(size) * kAdditions;
  const double norm = __builtin_sqrt(length) * sum_slack, root = __builtin_sqrt(static_cast<double>(size));
  const double error = __builtin_sqrt(static_cast<double>(sum(errors))) * sum_slack;
  screen.unit[r] = static_cast<double>(most / kMost);
  screen.norm[r] = above(norm);
  screen.error[r] = above(error + static_cast<double>(kSlack) * (norm + root));
  return true;
}

// What the screen's products [kPanel] of row r with a panel say about its entries, which begin with `first`.
template <class T>
CALM_INLINE void weigh_row(const Search<T>& search, const Panel& panel, int64_t r, int64_t first,
                           const Int (&total)[kTileVectors]) {
  const float reached = search.winners.reached[r], error = search.screen.error[r], norm = search.screen.norm[r];
  Float score[kTileVectors], slack[kTileVectors];
  Int possible{};
#pragma GCC unroll 3
  for (int j = 0; j < kTileVectors; ++j) {
    score[j] = __builtin_convertvector(total[j], Float) * load(panel.scale + j * kLanes);
    slack[j] = error * load(panel.norm + j * kLanes) + norm * load(panel.error + j * kLanes);
    possible |= (Int)(score[j] + slack[j] > reached);
  }
  if (any(possible)) search.consider(r, first, score, slack);
}

// kTileRows rows from r on against the panel.
template <class T>
CALM_INLINE void scan_tile(const Search<T>& search, const Panel& panel, int64_t r, int64_t first) {
  const ArgmaxScreen& screen = search.screen;
  const Quantum* rows = static_cast<const Quantum*>(screen.rows) + r * screen.padded_size;
  Int total[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) total[i][j] = load_whole(panel.start + j * kLanes);
  }
  const Quantum* column = panel.quanta;
  for (int64_t k = 0; k < screen.padded_size; k += kQuanta, column += kPanel * kQuanta) {
    Int right[kTileVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) right[j] = load_whole(column + j * kLanes * kQuanta);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      int32_t word;
      std::memcpy(&word, rows + i * screen.padded_size + k, sizeof word);
      const Int left = splat<Int>(word);
#pragma GCC unroll 3
      for (int j = 0; j < kTileVectors; ++j) total[i][j] = multiply_add(left, right[j], total[i][j]);
    }
  }
  const int64_t left_rows = search.p.num_rows - r;
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= left_rows) break;
    weigh_row(search, panel, r + i, first, total[i]);
  }
}

#ifdef __AVX512VNNI__
// All rows against the panel by tiles, whose products come back through the first cache.
template <class T>
CALM_AMX void scan_rows_amx(const Search<T>& search, const Panel& panel, int64_t first) {
  const int64_t size = search.screen.padded_size, num_rows = search.p.num_rows;
  const Quantum* rows = static_cast<const Quantum*>(search.screen.rows);
  static_assert(kPanel == kAmxColumns);
  alignas(64) int32_t totals[kAmxRows][kPanel];
  take_tiles();
  for (int64_t r = 0; r < num_rows; r += kAmxRows) {
    multiply_tiles(rows + r * size, panel.quanta, panel.start, size, totals[0]);
    const int64_t count = num_rows - r < kAmxRows ? num_rows - r : kAmxRows;
    for (int64_t i = 0; i < count; ++i) {
      Int total[kTileVectors];
      std::memcpy(total, totals[i], sizeof total);
      weigh_row(search, panel, r + i, first, total);
    }
  }
  release_tiles();
}
#endif

// All rows against the panel.
template <class T>
void scan_rows(const Search<T>& search, const Panel& panel, int64_t first) {
#ifdef __AVX512VNNI__
  if (isa() == Isa::kAmx) return scan_rows_amx(search, panel, first);
#endif
  for (int64_t r = 0; r < search.p.num_rows; r += kTileRows) scan_tile(search, panel, r, first);
}

template <class T>
void scan_rounded(const Search<T>& search, void* scratch, int64_t begin, int64_t end) {
  const LinearArgmax<T>& p = search.p;
  const ArgmaxScreen& screen = search.screen;
  const int64_t panel_bytes = Panel::bytes(screen.padded_size);
  for (int64_t first = begin; first < end; first += kPanel) {
    const int64_t count = end - first < kPanel ? end - first : kPanel;
    void* data = scratch;
    if (p.panels) {
      data = static_cast<char*>(const_cast<void*>(p.panels)) + first / kPanel * panel_bytes;
    } else {
      Quantum* row = reinterpret_cast<Quantum*>(static_cast<char*>(scratch) + panel_bytes);
      round_panel(p.weight, p.size, screen.padded_size, first, count, row, Panel(scratch));
    }
    const Panel panel(data);
    scan_rows(search, panel, first);
    bool any_odd = false;
    for (int place = 0; place < count; ++place) any_odd |= panel.norm[place] != panel.norm[place];
    for (int64_t r = 0; r < p.num_rows; ++r) {
      const bool exact = screen.error[r] != screen.error[r];
      for (int place = 0; (exact || any_odd) && place < count; ++place) {
        if (exact || panel.norm[place] != panel.norm[place]) search.take(r, first + place);
      }
    }
  }
}

}  // namespace
}  // namespace calm_rt::CALM_ISA
