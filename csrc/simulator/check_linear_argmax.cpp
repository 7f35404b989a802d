// Ids against the first largest exact score, from scores that are as far off as the screen may be.
#include "simulator/argmax_operands.h"

namespace calm_rt {
namespace {

// The screen moves every score by half of what it may, against the entry that ought to win and for the others.
template <class T>
std::vector<int64_t> scan(const Operands<T>& x, const std::vector<int64_t>& winner, const WantedRows& wanted = {}) {
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
                                           .size = size,
                                           .wanted = wanted});
  }
  check_best(x, best, id, "scan_scores");
  return id;
}

template <class T>
void check_operands(const Operands<T>& x) {
  check_ids(x, "scan_scores", [&](const std::vector<int64_t>& winner) { return scan(x, winner); });
}

template <class T>
void check_type() {
  for (const Sizes& sizes : {Sizes{1, 1, 1}, Sizes{3, 37, 5}, Sizes{4, 300, 24, 64}, Sizes{2, 301, 35, 77}}) {
    check_operands(random_operands<T>(sizes));
  }
  const auto check = [](const Operands<T>& x) { check_operands(x); };
  each_special<T>({3, 40, 6, 16}, check);
  check(near_ties<T>({2, 90, 16}));
  check(near_ties<T>({2, 90, 16, 40}));
}

void check_wanted() {
  const Operands<float> x = random_operands<float>({4, 300, 24, 64});
  const std::vector<int64_t> expected = exact_ids(x);
  for (const int64_t count : {7, 9, 11}) {  // of which seven were in earlier launches
    const std::vector<int64_t> id = scan(x, expected, {&count, 7});
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t wanted = r < count - 7 ? expected[r] : -1;
      check(id[r] == wanted, "wanted", "scan_scores", r, static_cast<double>(id[r]), static_cast<double>(wanted));
    }
  }
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
  check_wanted();
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
