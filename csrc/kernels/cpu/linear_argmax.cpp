// Screened argmax on the CPU: threads share out the vocabulary, each keeps a winner for every row.
//
// A panel of kPanel entries, rounded here or long before, is multiplied by all rows, tile by tile; a tile's products
// stay in the registers, or in the first cache. They are turned into upper bounds there, and the rare entry whose bound
// exceeds what its row has reached is computed exactly.
#include "kernels/linear_argmax.h"

#include "kernels/cpu/argmax_rounded.h"
#include "kernels/cpu/argmax_search.h"
#include "kernels/cpu/select.h"

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
                                       const ArgmaxWinners& winners, void* scratch, int64_t begin, int64_t end);
              template <class T>
              void screen_vocabulary_kernel(const ScreenVocabulary<T>& p, int64_t begin, int64_t end);
              bool ends_with(const void* panels, int64_t vocabulary, int64_t padded_size); int64_t panel_entries();
              int64_t panel_bytes(int64_t padded_size);)

namespace CALM_ISA {
namespace {

constexpr float kLargestNorm = 1e18f;  // up to which no product of rows as they are overflows
constexpr int kDirectEntries = 4;      // a lane each

// A few rows as they are.
template <class T>
void scan_direct(const Search<T>& search, void* scratch, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const int64_t size = search.p.size, padded_size = search.screen.padded_size;
  constexpr bool kWidens = sizeof(T) == 2;
  static_assert(kDirectEntries <= kLanes);
  Wide* widened = static_cast<Wide*>(scratch);  // [kDirectEntries, padded_size] of a 16-bit weight
  const Wide* hidden = static_cast<const Wide*>(search.screen.rows);  // [R, padded_size]
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
    V squares[kDirectEntries] = {}, first_sums[kDirectEntries] = {};  // the latter of row 0, in passing
    each_run<V>(0, size, [&](int64_t k, int64_t width) {
      const V h = load(hidden + k);
#pragma GCC unroll 4
      for (int i = 0; i < kDirectEntries; ++i) {
        prefetch(narrow_weight[i] + k, kAhead / static_cast<int64_t>(sizeof(T)));
        const V x = load_some<V>(narrow_weight[i] + k, width);
        squares[i] += x * x;
        first_sums[i] += h * x;
        if constexpr (kWidens) store(widened + i * padded_size + k, x);
      }
    });
    for (int i = 0; i < count; ++i) {
      const double length = __builtin_sqrt(static_cast<double>(sum(squares[i])));
      odd[i] = !(length <= kLargestNorm);
      norm[i] = odd[i] ? __builtin_nanf("") : above(length * (1 + static_cast<double>(size) * kAdditions)) + kNormRoom;
    }
    for (int64_t r = 0; r < search.p.num_rows; ++r) {
      V sums[kDirectEntries];
      std::memcpy(sums, first_sums, sizeof sums);
      if (r > 0) {
        for (V& sum : sums) sum = V{};
        each_run<V>(0, size, [&](int64_t k, int64_t width) {
          const V x = load(hidden + r * padded_size + k);
#pragma GCC unroll 4
          for (int i = 0; i < kDirectEntries; ++i) sums[i] += x * load_some<V>(weight[i] + k, width);
        });
      }
      Float scores[1] = {splat<Float>(__builtin_nanf(""))}, slacks[1] = {scores[0]};
      bool possible = false;
      const bool exact = search.screen.error[r] != search.screen.error[r];
      for (int i = 0; i < count; ++i) {
        const float score = static_cast<float>(sum(sums[i])), slack = search.screen.error[r] * norm[i];
        scores[0][i] = score;
        slacks[0][i] = slack;
        possible |= score + slack > search.winners.reached[r];
      }
      if (possible) search.consider(r, first, scores, slacks);
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
    if constexpr (sizeof(AccumulateType<T>) == 4) {
      if (screen.rounded && round_row(in, p.size, screen, r)) continue;
    }
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

// Panels begin to end.
template <class T>
void screen_vocabulary_kernel(const ScreenVocabulary<T>& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(AccumulateType<T>) == 4) {
    const int64_t padded_size = pad_row(p.size);
    Quantum row[kLongestScreened];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kPanel, count = p.vocabulary - first < kPanel ? p.vocabulary - first : kPanel;
      const Panel panel(static_cast<char*>(p.panels) + i * Panel::bytes(padded_size));
      round_panel(p.weight, p.size, padded_size, first, count, row, panel);
    }
  }
}

// Whether the screen's last panel ends with entry V - 1: then no lane behind it has a bound, so that none is read.
bool ends_with(const void* panels, int64_t vocabulary, int64_t padded_size) {
  const int64_t last = (vocabulary - 1) / kPanel;
  const char* data = static_cast<const char*>(panels) + last * Panel::bytes(padded_size);
  const float* norm = reinterpret_cast<const float*>(data) + kPanel;
  for (int64_t place = vocabulary - last * kPanel; place < kPanel; ++place) {
    if (norm[place] == norm[place]) return false;
  }
  return true;
}

int64_t panel_entries() { return kPanel; }
int64_t panel_bytes(int64_t padded_size) { return Panel::bytes(padded_size); }

#define CALM_INSTANTIATE(T)                                                                                            \
  template void screen_rows_kernel(const LinearArgmax<T>&, const ArgmaxScreen&, int64_t, int64_t);                     \
  template void scan_entries_kernel(const LinearArgmax<T>&, const ArgmaxScreen&, const ArgmaxWinners&, void*, int64_t, \
                                    int64_t);                                                                          \
  template void screen_vocabulary_kernel(const ScreenVocabulary<T>&, int64_t, int64_t);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
namespace {

constexpr int64_t kFewRows = 8;  // up to which rows are multiplied as they are, where no panels are at hand
constexpr int64_t kWidestTile = 16;
constexpr int64_t kRowScratch = 32;  // bytes for each number of a row: four entries in double, or a rounded one

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
  const bool screens = !std::is_same_v<T, double> && p.size <= kLongestScreened;
  const bool rounded = screens && (p.num_rows > kFewRows || p.panels);
  const int64_t padded_size = pad_row(p.size);
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
  const int64_t width = CALM_SELECT(panel_entries)(), panel_size = CALM_SELECT(panel_bytes)(padded_size);
  const int64_t grain = 1 + (1 << 18) / (p.size * p.num_rows / 16 + 1) / width;  // about 20 us of work
  parallel_blocks(device, (p.vocabulary + width - 1) / width, grain, [&](Blocks& blocks) {
    const auto own_best = std::make_unique<double[]>(rows);
    const auto own_id = std::make_unique<int64_t[]>(rows);
    const auto reached = std::make_unique<float[]>(rows);
    for (size_t r = 0; r < rows; ++r) own_id[r] = -1, reached[r] = -__builtin_inff();
    const Aligned scratch(panel_size + kRowScratch * padded_size);
    const ArgmaxWinners winners{own_best.get(), own_id.get(), reached.get()};
    for (int64_t begin, end; blocks.take(begin, end);) {
      const int64_t last = end * width < p.vocabulary ? end * width : p.vocabulary;
      CALM_SELECT(scan_entries_kernel<T>)(p, screen, winners, scratch.data, begin * width, last);
    }
    const std::lock_guard lock(merging);
    for (size_t r = 0; r < rows; ++r) {
      if (before(own_best[r], own_id[r], best[r], p.id[r])) best[r] = own_best[r], p.id[r] = own_id[r];
    }
  });
}

PanelSizes panel_sizes(Cpu, int64_t vocabulary, int64_t size) {
  const int64_t entries = CALM_SELECT(panel_entries)();
  return {(vocabulary + entries - 1) / entries, CALM_SELECT(panel_bytes)(pad_row(size))};
}

bool screen_ends_with(Cpu, const void* panels, int64_t vocabulary, int64_t size) {
  return CALM_SELECT(ends_with)(panels, vocabulary, pad_row(size));
}

template <class T>
void launch(Cpu device, const ScreenVocabulary<T>& p) {
  parallel_rows(device, panel_sizes(device, p.vocabulary, p.size).num_panels, 1 + 4096 / (p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(screen_vocabulary_kernel<T>)(p, begin, end); });
}

template void launch(Cpu, const LinearArgmax<float>&);
template void launch(Cpu, const LinearArgmax<double>&);
template void launch(Cpu, const LinearArgmax<bfloat16>&);
template void launch(Cpu, const LinearArgmax<half>&);
template void launch(Cpu, const ScreenVocabulary<float>&);
template void launch(Cpu, const ScreenVocabulary<bfloat16>&);
template void launch(Cpu, const ScreenVocabulary<half>&);
#endif

}  // namespace calm_rt
