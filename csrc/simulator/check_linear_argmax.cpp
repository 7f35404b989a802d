// Ids against the first largest exact score, from scores that are as far off as the screen may be.
#include <cstdlib>

#include "kernels/linear_argmax.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

struct Sizes {
  int64_t rows, entries, size;
  int64_t block = entries;  // of the vocabulary, that is scanned at a time
};

// [R, H] and [V, H]
template <class T>
struct Operands {
  Sizes sizes;
  std::vector<T> hidden, weight;
};

bfloat16 nearest(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <class T>
double product(const T* a, const T* b, int64_t size) {
  double sum = 0;
  for (int64_t k = 0; k < size; ++k) sum += static_cast<double>(widen(a[k])) * static_cast<double>(widen(b[k]));
  return sum;
}

// The rounded rows, or those given where T is the screen's type.
template <class T>
std::vector<bfloat16> round_rows(const std::vector<T>& in, int64_t size, std::vector<float>& norm) {
  const int64_t rows = static_cast<int64_t>(norm.size());
  constexpr bool kSame = std::is_same_v<T, bfloat16>;
  std::vector<bfloat16> out(kSame ? 0 : in.size());
  launch(Cuda{}, RoundRows<T, bfloat16>{in.data(), kSame ? nullptr : out.data(), norm.data(), rows, size});
  if constexpr (kSame) out = in;
  for (int64_t i = 0; i < static_cast<int64_t>(in.size()); ++i) {
    const bfloat16 expected = nearest(widen(in[i]));
    check(out[i].bits == expected.bits || kSame, "out", "round_rows", i, widen(out[i]), widen(expected));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double exact = std::sqrt(product(in.data() + r * size, in.data() + r * size, size));
    const bool is_bound = exact == 0 ? norm[r] == 0 : !(norm[r] < exact);
    const bool is_close = !std::isfinite(norm[r]) || norm[r] <= exact * (1 + 1e-6 * (size + 8)) + 1e-14;
    check(is_bound && is_close, "norm", "round_rows", r, norm[r], exact);
  }
  return out;
}

// The screen moves every score by half of what it may, against the entry that ought to win and for the others.
template <class T>
std::vector<int64_t> scan(const Operands<T>& x, const std::vector<int64_t>& winner) {
  const auto [rows, entries, size, block] = x.sizes;
  std::vector<float> hidden_norm(rows, NAN), weight_norm(entries, NAN);
  const std::vector<bfloat16> hidden = round_rows(x.hidden, size, hidden_norm);
  const std::vector<bfloat16> weight = round_rows(x.weight, size, weight_norm);
  std::vector<double> best(rows, NAN);  // what a new tensor may hold
  std::vector<int64_t> id(rows, -1);
  for (int64_t first = 0; first < entries; first += block) {
    const int64_t count = std::min(block, entries - first);
    std::vector<bfloat16> scores(rows * count);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < count; ++v) {
        const double exact = product(x.hidden.data() + r * size, x.weight.data() + (first + v) * size, size);
        const double shift = exact == 0 || !std::isfinite(exact)
                                 ? 0
                                 : std::sqrt(product(x.hidden.data() + r * size, x.hidden.data() + r * size, size)) *
                                       std::sqrt(product(x.weight.data() + (first + v) * size,
                                                         x.weight.data() + (first + v) * size, size));
        const double moved = exact + (first + v == winner[r] ? -kBfloat16Rounding : kBfloat16Rounding) * shift;
        scores[r * count + v] = nearest(static_cast<float>(moved));
      }
    }
    launch(Cuda{}, ScanScores<T, bfloat16>{.scores = scores.data(),
                                           .hidden = x.hidden.data(),
                                           .weight = x.weight.data() + first * size,
                                           .hidden_norm = hidden_norm.data(),
                                           .weight_norm = weight_norm.data() + first,
                                           .best = best.data(),
                                           .id = id.data(),
                                           .first_id = first,
                                           .num_rows = rows,
                                           .block = count,
                                           .size = size});
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double exact = product(x.hidden.data() + r * size, x.weight.data() + id[r] * size, size);
    const bool same = best[r] == exact || (best[r] != best[r] && exact != exact);
    check(same || std::fabs(best[r] - exact) <= 1e-12 * (1 + std::fabs(exact)), "best", "scan_scores", r, best[r],
          exact);
  }
  return id;
}

template <class T>
void check_operands(const Operands<T>& x) {
  const auto [rows, entries, size, block] = x.sizes;
  std::vector<int64_t> expected(rows, 0), first;
  for (int64_t r = 0; r < rows; ++r) {
    double best = product(x.hidden.data() + r * size, x.weight.data(), size);
    for (int64_t v = 1; v < entries && best == best; ++v) {
      const double score = product(x.hidden.data() + r * size, x.weight.data() + v * size, size);
      if (score > best || score != score) {
        best = score;
        expected[r] = v;
      }
    }
  }
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    const std::vector<int64_t> id = scan(x, expected);
    check_same(id, first, schedule, "id differs under schedule", "scan_scores");
  }
  for (int64_t r = 0; r < rows; ++r) {
    check(first[r] == expected[r], "id", "scan_scores", r, static_cast<double>(first[r]),
          static_cast<double>(expected[r]));
  }
}

// Whole multiples of 1/8, so that every sum is exact in any order and ties are ties.
template <class T>
Operands<T> random_operands(const Sizes& sizes) {
  Operands<T> x{sizes, {}, {}};
  auto value = [] { return convert<T>(std::round(16 * random_value()) / 8); };
  for (int64_t i = 0; i < sizes.rows * sizes.size; ++i) x.hidden.push_back(value());
  for (int64_t i = 0; i < sizes.entries * sizes.size; ++i) x.weight.push_back(value());
  return x;
}

// Every entry the same but for one element by the least step: bounds tell none apart.
template <class T>
void check_near_ties(const Sizes& sizes) {
  Operands<T> x = random_operands<T>(sizes);
  for (int64_t k = 0; k < sizes.size; ++k) x.hidden[k] = convert<T>(1);
  for (int64_t v = 1; v < sizes.entries; ++v) {
    std::copy_n(x.weight.begin(), sizes.size, x.weight.begin() + v * sizes.size);
  }
  T& element = x.weight[(sizes.entries * 2 / 3) * sizes.size + sizes.size - 1];
  element = convert<T>(widen(element) + 0x1p-3f);
  check_operands(x);
}

template <class T>
void check_special(const Sizes& sizes) {
  const float values[] = {NAN, INFINITY, -INFINITY, 0};
  for (const float value : values) {
    Operands<T> x = random_operands<T>(sizes);
    for (int64_t k = 0; k < sizes.size; ++k) x.hidden[k] = convert<T>(0);  // a row of ties
    x.weight[(sizes.entries / 2) * sizes.size] = convert<T>(value);
    x.weight[(sizes.entries - 1) * sizes.size + 1] = convert<T>(value);
    check_operands(x);
    x.hidden[sizes.size + 2] = convert<T>(value);  // an infinity of its own in a row
    check_operands(x);
  }
}

template <class T>
void check_type() {
  for (const Sizes& sizes : {Sizes{1, 1, 1}, Sizes{3, 37, 5}, Sizes{4, 300, 24, 64}, Sizes{2, 301, 35, 77}}) {
    check_operands(random_operands<T>(sizes));
  }
  check_special<T>({3, 40, 6, 16});
  check_near_ties<T>({2, 90, 16});
  check_near_ties<T>({2, 90, 16, 40});
}

// Scores far beyond a float's largest, and so small that their products underflow.
void check_range() {
  for (const float scale : {1e19f, 1e-19f, 1e-22f}) {
    Operands<float> x = random_operands<float>({3, 70, 40, 32});
    for (float& value : x.hidden) value *= scale;
    for (float& value : x.weight) value *= scale;
    check_operands(x);
  }
}

}  // namespace

void check_linear_argmax() {
  check_type<float>();
  check_type<bfloat16>();
  check_type<half>();
  check_range();
  Operands<bfloat16> two_nan = random_operands<bfloat16>({1, 2056, 2});
  for (int64_t entry : {40, 2048}) two_nan.weight[entry * 2] = convert<bfloat16>(NAN);  // the second is met first
  check_operands(two_nan);
  Operands<float> panels = random_operands<float>({2, 17000, 2});  // three panels, of which one can win
  for (size_t i = 8192 * 2; i < panels.weight.size(); ++i) panels.weight[i] /= 8;
  check_operands(panels);
  check_operands(random_operands<float>({1, 8200, 2}));     // two panels
  check_operands(random_operands<bfloat16>({1, 8203, 3}));  // that are not packed
  std::vector<float> norm((1 << 15) + 3, NAN);              // more rows than warps of the largest grid
  round_rows(std::vector<float>(norm.size(), 1.1f), 1, norm);
}

}  // namespace calm_rt
