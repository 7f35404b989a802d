// Screened argmax on the CPU: threads share out the vocabulary, each keeps a winner for every row.
//
// A panel of kPanel entries is rounded to whole numbers that stay in the first cache, and multiplied by all rows, tile
// by tile; a tile's products never leave the registers. They are turned into upper bounds there, and the rare entry
// whose bound exceeds what its row has reached is computed exactly.
#include "kernels/linear_argmax.h"

#include "kernels/cpu/argmax_search.h"
#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

#ifdef CALM_ISA_PORTABLE
#include <memory>
#include <mutex>
#include <new>
#endif

namespace calm_rt {

CALM_EACH_ISA(template <class T>
              void screen_rows_kernel(const LinearArgmax<T>& p, const ArgmaxScreen& screen, int64_t begin, int64_t end);
              template <class T>
              void scan_entries_kernel(const LinearArgmax<T>& p, const ArgmaxScreen& screen,
                                       const ArgmaxWinners& winners, void* scratch, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4, kTileVectors = kLanes == 16 ? 3 : 2;  // sums that registers hold
constexpr int kPanel = kTileVectors * kLanes;
constexpr float kMost = 127, kSlack = 2e-6f;
constexpr float kSmallest = 1e-30f;    // with a largest value below it a row counts as zeros, and an error
constexpr float kLargestNorm = 1e18f;  // up to which no product of rows as they are overflows
constexpr double kAdditions = 1.2e-7;  // what a sum in float may lose, for each of its terms
constexpr int kDirectEntries = 4;
constexpr int64_t kAhead = 8192;  // bytes from what is read to what memory is asked for

// A float that is at least x >= 0.
CALM_INLINE float above(double x) { return static_cast<float>(x) * (1 + kSlack); }

// ---- rows rounded to whole numbers ----

// A panel of the vocabulary: w = scale * (q + e), lane i of vector j being entry first + j kLanes + i.
struct Panel {
  Float scale[kTileVectors];
  Float norm[kTileVectors];   // at least |w|; NaN for an entry that the screen cannot bound, or that is none
  Float error[kTileVectors];  // at least |scale e|, and room for all that rounding does to a bound
  Int start[kTileVectors];    // what undoes the bias of the left factor
  bool odd[kPanel];           // entries that are computed exactly for every row
  bool any_odd;
  Quantum* quanta;  // [padded_size / kQuanta, kPanel, kQuanta]
  Quantum* row;     // [padded_size]
};

// One entry of the panel.
template <class T>
CALM_INLINE void round_entry(const T* weight, int64_t size, int64_t padded_size, int place, Panel& panel) {
  Float magnitudes{};  // never NaN, which the sums will show
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    prefetch(weight + k, kAhead / static_cast<int64_t>(sizeof(T)));
    magnitudes = larger(absolute(load_some<Float>(weight + k, count)), magnitudes);
  });
  const float most = largest(magnitudes);
  const bool tiny = most < kSmallest;
  const float scale = tiny ? 0 : most / kMost, inverse = tiny ? 0 : kMost / most;
  Float squares{}, errors{};
  Int digits{};
  each_run<Float>(0, size, [&](int64_t k, int64_t count) {
    const Float u = load_some<Float>(weight + k, count) * inverse, q = round_to_even(u), e = u - q;
    squares += u * u;
    errors += e * e;
    const Int whole = __builtin_convertvector(q, Int);
    digits += whole;
    typedef Quantum Quanta __attribute__((vector_size(kLanes * sizeof(Quantum))));
    const Quanta narrow = __builtin_convertvector(whole, Quanta);
    std::memcpy(panel.row + k, &narrow, sizeof narrow);
  });
  for (int64_t k = (size + kLanes - 1) / kLanes * kLanes; k < padded_size; ++k) panel.row[k] = 0;
  const float length = sum(squares);
  const bool odd = !(most <= kLargest && length <= kLargest);
  int32_t digit_sum = 0;  // of numbers that mean something
  for (int i = 0; i < kLanes && !odd; ++i) digit_sum += digits[i];
  // the sums' own rounding, and that of u
  const float sum_slack = 1 + static_cast<float>(size) * static_cast<float>(kAdditions);
  const float root = __builtin_sqrtf(static_cast<float>(size));
  const float tiny_norm = most > 0 ? root * kSmallest : 0;
  const float norm = tiny ? tiny_norm : scale * __builtin_sqrtf(length) * sum_slack * (1 + kSlack);
  const float error = tiny ? tiny_norm : scale * (__builtin_sqrtf(sum(errors)) * sum_slack + root * 2e-5f);
  const int j = place / kLanes, i = place % kLanes;
  panel.scale[j][i] = scale;
  panel.norm[j][i] = odd ? __builtin_nanf("") : norm;
  panel.error[j][i] = error + kSlack * norm;
  panel.start[j][i] = -kQuantumBias * digit_sum;
  panel.odd[place] = odd;
  panel.any_odd |= odd;
  for (int64_t k = 0; k < padded_size; k += kQuanta) {
    std::memcpy(panel.quanta + k * kPanel + place * kQuanta, panel.row + k, 4);
  }
}

template <class T>
CALM_INLINE void round_panel(const LinearArgmax<T>& p, int64_t padded_size, int64_t first, int64_t count,
                             Panel& panel) {
  panel.any_odd = false;
  for (int place = 0; place < count; ++place) {
    round_entry(p.weight + (first + place) * p.size, p.size, padded_size, place, panel);
  }
  for (int place = static_cast<int>(count); place < kPanel; ++place) {
    panel.norm[place / kLanes][place % kLanes] = __builtin_nanf("");
    panel.odd[place] = false;
  }
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
    for (int j = 0; j < kTileVectors; ++j) total[i][j] = panel.start[j];
  }
  const Quantum* column = panel.quanta;
  for (int64_t k = 0; k < screen.padded_size; k += kQuanta, column += kPanel * kQuanta) {
    Int right[kTileVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) std::memcpy(&right[j], column + j * kLanes * kQuanta, sizeof(Int));
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
    const float reached = search.winners.reached[r + i], error = screen.error[r + i], norm = screen.norm[r + i];
    Float score[kTileVectors], slack[kTileVectors];
    Int possible{};
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) {
      score[j] = __builtin_convertvector(total[i][j], Float) * panel.scale[j];
      slack[j] = error * panel.norm[j] + norm * panel.error[j];
      possible |= (Int)(score[j] + slack[j] > reached);
    }
    if (!any(possible)) continue;
    float upper[kPanel], lower[kPanel];
    for (int j = 0; j < kTileVectors; ++j) {
      store(upper + j * kLanes, score[j] + slack[j]);
      store(lower + j * kLanes, score[j] - slack[j]);
    }
    search.consider(r + i, first, upper, lower, kPanel);
  }
}

template <class T>
void scan_rounded(const Search<T>& search, void* scratch, int64_t begin, int64_t end) {
  const ArgmaxScreen& screen = search.screen;
  const int64_t num_rows = search.p.num_rows;
  Panel panel;
  panel.quanta = static_cast<Quantum*>(scratch);
  panel.row = panel.quanta + kPanel * screen.padded_size;
  std::memset(scratch, 0, static_cast<size_t>(kPanel * screen.padded_size) * sizeof(Quantum));
  for (int j = 0; j < kTileVectors; ++j) {
    panel.scale[j] = panel.norm[j] = panel.error[j] = Float{};
    panel.start[j] = Int{};
  }
  for (int64_t first = begin; first < end; first += kPanel) {
    const int64_t count = end - first < kPanel ? end - first : kPanel;
    round_panel(search.p, screen.padded_size, first, count, panel);
    for (int64_t r = 0; r < num_rows; r += kTileRows) scan_tile(search, panel, r, first);
    for (int64_t r = 0; r < num_rows; ++r) {
      const bool exact = screen.error[r] != screen.error[r];
      for (int place = 0; (exact || panel.any_odd) && place < count; ++place) {
        if (exact || panel.odd[place]) search.take(r, first + place);
      }
    }
  }
}

// ---- a few rows as they are ----

template <class T>
void scan_direct(const Search<T>& search, void* scratch, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const int64_t size = search.p.size, padded_size = search.screen.padded_size;
  constexpr bool kWidens = sizeof(T) == 2;
  Wide* widened = static_cast<Wide*>(scratch);  // [kDirectEntries, padded_size] of a 16-bit weight
  for (int64_t first = begin; first < end; first += kDirectEntries) {
    const int count = static_cast<int>(end - first < kDirectEntries ? end - first : kDirectEntries);
    const T* narrow_weight[kDirectEntries];
    const Wide* weight[kDirectEntries];
    float norm[kDirectEntries];
    bool odd[kDirectEntries];
    for (int i = 0; i < kDirectEntries; ++i) {
      narrow_weight[i] = search.weight(i < count ? first + i : first);
      if constexpr (kWidens) {
        weight[i] = widened + i * padded_size;
      } else {
        weight[i] = narrow_weight[i];
      }
    }
    V squares[kDirectEntries] = {};
    each_run<V>(0, size, [&](int64_t k, int64_t width) {
#pragma GCC unroll 4
      for (int i = 0; i < kDirectEntries; ++i) {
        prefetch(narrow_weight[i] + k, kAhead / static_cast<int64_t>(sizeof(T)));
        const V x = load_some<V>(narrow_weight[i] + k, width);
        squares[i] += x * x;
        if constexpr (kWidens) store(widened + i * padded_size + k, x);
      }
    });
    for (int i = 0; i < count; ++i) {
      const double length = __builtin_sqrt(static_cast<double>(sum(squares[i])));
      odd[i] = !(length <= kLargestNorm);
      norm[i] = odd[i] ? __builtin_nanf("") : above(length * (1 + static_cast<double>(size) * kAdditions)) + kNormRoom;
    }
    for (int64_t r = 0; r < search.p.num_rows; ++r) {
      const Wide* hidden = static_cast<const Wide*>(search.screen.rows) + r * padded_size;
      V sums[kDirectEntries] = {};
      each_run<V>(0, size, [&](int64_t k, int64_t width) {
        const V x = load(hidden + k);
#pragma GCC unroll 4
        for (int i = 0; i < kDirectEntries; ++i) sums[i] += x * load_some<V>(weight[i] + k, width);
      });
      float upper[kDirectEntries], lower[kDirectEntries];
      bool possible = false;
      const bool exact = search.screen.error[r] != search.screen.error[r];
      for (int i = 0; i < count; ++i) {
        const float score = static_cast<float>(sum(sums[i])), slack = search.screen.error[r] * norm[i];
        upper[i] = score + slack;
        lower[i] = score - slack;
        possible |= upper[i] > search.winners.reached[r];
      }
      if (possible) search.consider(r, first, upper, lower, count);
      for (int i = 0; i < count; ++i) {
        if (exact || odd[i]) search.take(r, first + i);
      }
    }
  }
}

}  // namespace

template <class T>
void screen_rows_kernel(const LinearArgmax<T>& p, const ArgmaxScreen& screen, int64_t begin, int64_t end) {
  const double additions = static_cast<double>(p.size + 16) * kAdditions;
  for (int64_t r = begin; r < end; ++r) {
    const T* in = p.hidden + r * p.size;
    double most = 0, squares = 0, errors = 0, total = 0;
    for (int64_t k = 0; k < p.size; ++k) {
      const double x = __builtin_fabs(static_cast<double>(widen(in[k])));
      most = x > most ? x : most;
      squares += x * x;
      total += x;
    }
    const bool finite = total - total == 0;
    screen.unit[r] = 1;
    screen.norm[r] = 0;
    if (!screen.rounded) {
      AccumulateType<T>* out = static_cast<AccumulateType<T>*>(screen.rows) + r * screen.padded_size;
      for (int64_t k = 0; k < screen.padded_size; ++k) out[k] = k < p.size ? widen(in[k]) : 0;
      const double norm = __builtin_sqrt(squares);
      screen.error[r] = finite && norm <= static_cast<double>(kLargestNorm)
                            ? above(additions * (norm + (most > 0 ? static_cast<double>(kNormRoom) : 0)))
                            : __builtin_nanf("");
      continue;
    }
    Quantum* quanta = static_cast<Quantum*>(screen.rows) + r * screen.padded_size;
    if (finite && most > 0) screen.unit[r] = most / static_cast<double>(kMost);
    const double inverse = finite && most > 0 ? 1 / screen.unit[r] : 0;
    squares = 0;
    for (int64_t k = 0; k < p.size; ++k) {
      const double u = finite ? static_cast<double>(widen(in[k])) * inverse : 0, q = __builtin_rint(u);
      quanta[k] = static_cast<Quantum>(static_cast<int32_t>(q) + kQuantumBias);
      squares += q * q;
      errors += (u - q) * (u - q);
    }
    for (int64_t k = p.size; k < screen.padded_size; ++k) quanta[k] = static_cast<Quantum>(kQuantumBias);
    screen.norm[r] = above(__builtin_sqrt(squares));
    screen.error[r] = finite ? above(__builtin_sqrt(errors) + (most > 0 ? 1e-9 : 0)) : __builtin_nanf("");
  }
}

template <class T>
void scan_entries_kernel(const LinearArgmax<T>& p, const ArgmaxScreen& screen, const ArgmaxWinners& winners,
                         void* scratch, int64_t begin, int64_t end) {
  const Search<T> search{p, screen, winners};
  if constexpr (sizeof(AccumulateType<T>) == 4) {
    if (screen.rounded) return scan_rounded(search, scratch, begin, end);
  }
  scan_direct(search, scratch, begin, end);
}

#define CALM_INSTANTIATE(T)                                                                                            \
  template void screen_rows_kernel(const LinearArgmax<T>&, const ArgmaxScreen&, int64_t, int64_t);                     \
  template void scan_entries_kernel(const LinearArgmax<T>&, const ArgmaxScreen&, const ArgmaxWinners&, void*, int64_t, \
                                    int64_t);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
namespace {

constexpr int64_t kFewRows = 8;         // up to which rows are multiplied as they are
constexpr int64_t kLongestRow = 32768;  // whose whole products fit 32 bits
constexpr int64_t kWidestTile = 8, kWidestPanel = 48;

// Memory for vectors, without a constructor.
struct Aligned {
  explicit Aligned(int64_t bytes) : data(operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
  ~Aligned() { operator delete(data, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  void* data;
};

}  // namespace

template <class T>
void launch(Cpu device, const LinearArgmax<T>& p) {
  if (p.num_rows == 0) return;
  const auto rows = static_cast<size_t>(p.num_rows);
  const bool rounded = !std::is_same_v<T, double> && p.num_rows > kFewRows && p.size <= kLongestRow;
  const int64_t padded_size = (p.size + 63) / 64 * 64;
  const int64_t row_bytes = padded_size * static_cast<int64_t>(rounded ? sizeof(int16_t) : sizeof(AccumulateType<T>));
  const Aligned screened((p.num_rows + kWidestTile) * row_bytes);
  std::memset(screened.data, 0, static_cast<size_t>((p.num_rows + kWidestTile) * row_bytes));
  const auto bounds = std::make_unique<float[]>(2 * rows);
  const auto unit = std::make_unique<double[]>(rows), best = std::make_unique<double[]>(rows);
  const ArgmaxScreen screen{rounded, padded_size, screened.data, bounds.get(), bounds.get() + rows, unit.get()};
  parallel_rows(device, p.num_rows, 1 + 16384 / (p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(screen_rows_kernel<T>)(p, screen, begin, end); });

  for (size_t r = 0; r < rows; ++r) p.id[r] = -1;
  std::mutex merging;
  const int64_t grain = kWidestPanel + (1 << 18) / (p.size * p.num_rows / 16 + 1);  // about 20 us of work
  parallel_rows(device, p.vocabulary, grain, [&](int64_t begin, int64_t end) {
    const auto own_best = std::make_unique<double[]>(rows);
    const auto own_id = std::make_unique<int64_t[]>(rows);
    const auto reached = std::make_unique<float[]>(rows);
    for (size_t r = 0; r < rows; ++r) own_id[r] = -1, reached[r] = -__builtin_inff();
    const Aligned scratch((kWidestPanel + 2) * padded_size * 2);
    const ArgmaxWinners winners{own_best.get(), own_id.get(), reached.get()};
    CALM_SELECT(scan_entries_kernel<T>)(p, screen, winners, scratch.data, begin, end);
    const std::lock_guard lock(merging);
    for (size_t r = 0; r < rows; ++r) {
      if (before(own_best[r], own_id[r], best[r], p.id[r])) best[r] = own_best[r], p.id[r] = own_id[r];
    }
  });
}

template void launch(Cpu, const LinearArgmax<float>&);
template void launch(Cpu, const LinearArgmax<double>&);
template void launch(Cpu, const LinearArgmax<bfloat16>&);
template void launch(Cpu, const LinearArgmax<half>&);
#endif

}  // namespace calm_rt
