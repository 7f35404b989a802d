// What the checks of linear_argmax's kernels share: operands, the ids that are right, and the rounding of rows, which
// is checked on the way.
#pragma once
#include <algorithm>

#include "kernels/linear_argmax.h"
#include "simulator/check.h"

namespace calm_rt {

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

inline bfloat16 nearest(float x) {
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

// The first largest exact scores.
template <class T>
std::vector<int64_t> exact_ids(const Operands<T>& x) {
  const auto [rows, entries, size, block] = x.sizes;
  std::vector<int64_t> id(rows, 0);
  for (int64_t r = 0; r < rows; ++r) {
    double best = product(x.hidden.data() + r * size, x.weight.data(), size);
    for (int64_t v = 1; v < entries && best == best; ++v) {
      const double score = product(x.hidden.data() + r * size, x.weight.data() + v * size, size);
      if (score > best || score != score) {
        best = score;
        id[r] = v;
      }
    }
  }
  return id;
}

// Whether `search`, which is told the ids that are right, finds them under every schedule.
template <class T, class Search>
void check_ids(const Operands<T>& x, const char* kernel, const Search& search) {
  const std::vector<int64_t> expected = exact_ids(x);
  std::vector<int64_t> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    check_same(search(expected), first, schedule, "id differs under schedule", kernel);
  }
  for (int64_t r = 0; r < x.sizes.rows; ++r) {
    check(first[r] == expected[r], "id", kernel, r, static_cast<double>(first[r]), static_cast<double>(expected[r]));
  }
}

// Whether the scores that a search has found best are those of its ids, -1 where it has looked for none.
template <class T>
void check_best(const Operands<T>& x, const std::vector<double>& best, const std::vector<int64_t>& id,
                const char* kernel) {
  const int64_t size = x.sizes.size;
  for (int64_t r = 0; r < x.sizes.rows; ++r) {
    if (id[r] < 0) continue;
    const double exact = product(x.hidden.data() + r * size, x.weight.data() + id[r] * size, size);
    const bool same = best[r] == exact || (best[r] != best[r] && exact != exact);
    check(same || std::fabs(best[r] - exact) <= 1e-12 * (1 + std::fabs(exact)), "best", kernel, r, best[r], exact);
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
Operands<T> near_ties(const Sizes& sizes) {
  Operands<T> x = random_operands<T>(sizes);
  for (int64_t k = 0; k < sizes.size; ++k) x.hidden[k] = convert<T>(1);
  for (int64_t v = 1; v < sizes.entries; ++v) {
    std::copy_n(x.weight.begin(), sizes.size, x.weight.begin() + v * sizes.size);
  }
  T& element = x.weight[(sizes.entries * 2 / 3) * sizes.size + sizes.size - 1];
  element = convert<T>(widen(element) + 0x1p-3f);
  return x;
}

// Calls check with NaN, infinities, zeros and rows of ties.
template <class T, class Check>
void each_special(const Sizes& sizes, const Check& check) {
  const float values[] = {NAN, INFINITY, -INFINITY, 0};
  for (const float value : values) {
    Operands<T> x = random_operands<T>(sizes);
    for (int64_t k = 0; k < sizes.size; ++k) x.hidden[k] = convert<T>(0);  // a row of ties
    x.weight[(sizes.entries / 2) * sizes.size] = convert<T>(value);
    x.weight[(sizes.entries - 1) * sizes.size + 1] = convert<T>(value);
    check(x);
    x.hidden[sizes.size + 2] = convert<T>(value);  // an infinity of its own in a row
    check(x);
  }
}

}  // namespace calm_rt
