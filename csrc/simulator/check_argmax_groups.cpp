// Bounds of groups against exact scores, which they must cover and be near, and ids from them.
#include "simulator/argmax_operands.h"

namespace calm_rt {
namespace {

template <class T>
double norm(const T* row, int64_t size) {
  return std::sqrt(product(row, row, size));
}

constexpr uint32_t kEntryBits = kGroup - 1;

float without_entry(float bound) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, bound) & ~kEntryBits);
}

template <class T>
struct Rounded {
  std::vector<float> hidden_norm, weight_norm;
  std::vector<bfloat16> hidden, weight;

  explicit Rounded(const Operands<T>& x) : hidden_norm(x.sizes.rows, NAN), weight_norm(x.sizes.entries, NAN) {
    hidden = round_rows(x.hidden, x.sizes.size, hidden_norm);
    weight = round_rows(x.weight, x.sizes.size, weight_norm);
  }
};

// Entries first ... first + count - 1.
template <class T>
std::vector<GroupBound> bound_groups(const Operands<T>& x, const Rounded<T>& rounded, int64_t first, int64_t count,
                                     const WantedRows& wanted = {}) {
  std::vector<GroupBound> bounds(x.sizes.rows * num_groups(count), {NAN, NAN});
  launch(Cuda{}, BoundGroups{.hidden = rounded.hidden.data(),
                             .weight = rounded.weight.data() + first * x.sizes.size,
                             .hidden_norm = rounded.hidden_norm.data(),
                             .weight_norm = rounded.weight_norm.data() + first,
                             .bounds = bounds.data(),
                             .num_rows = x.sizes.rows,
                             .block = count,
                             .size = x.sizes.size,
                             .exact = std::is_same_v<T, bfloat16>,
                             .wanted = wanted});
  return bounds;
}

template <class T>
std::vector<int64_t> search(const Operands<T>& x) {
  const auto [rows, entries, size, block] = x.sizes;
  const Rounded<T> rounded(x);
  std::vector<double> best(rows, NAN);  // what a new tensor may hold
  std::vector<int64_t> id(rows, -1);
  for (int64_t first = 0; first < entries; first += block) {
    const int64_t count = std::min(block, entries - first);
    const std::vector<GroupBound> bounds = bound_groups(x, rounded, first, count);
    launch(Cuda{}, SearchGroups<T>{.bounds = bounds.data(),
                                   .hidden = x.hidden.data(),
                                   .weight = x.weight.data() + first * size,
                                   .best = best.data(),
                                   .id = id.data(),
                                   .first_id = first,
                                   .num_rows = rows,
                                   .block = count,
                                   .size = size});
  }
  check_best(x, best, id, "search_groups");
  return id;
}

template <class T>
void check_operands(const Operands<T>& x) {
  check_ids(x, "search_groups", [&](const std::vector<int64_t>&) { return search(x); });
}

// A group's largest bound is not below any exact score, its next not below any but that of the entry which the largest
// names, and neither is above all scores by more than twice what a score may be off.
template <class T>
void check_bounds(const Operands<T>& x) {
  const auto [rows, entries, size, block] = x.sizes;
  const Rounded<T> rounded(x);
  std::vector<GroupBound> bounds;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    check_same(bound_groups(x, rounded, 0, entries), bounds, schedule, "bound differs under schedule", "bound_groups");
  }
  const double rounding = (std::is_same_v<T, bfloat16> ? 0 : kOperandRounding) + 1.5e-7 * static_cast<double>(size);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < num_groups(entries); ++g) {
      const GroupBound bound = bounds[r * num_groups(entries) + g];
      const double largest = without_entry(bound.largest), next = without_entry(bound.next);
      const int64_t named = g * kGroup + (__builtin_bit_cast(uint32_t, bound.largest) & kEntryBits);
      double highest = -INFINITY, second = -INFINITY;  // of what the bounds may be
      for (int64_t v = g * kGroup; v < std::min(entries, (g + 1) * kGroup); ++v) {
        const T *hidden = x.hidden.data() + r * size, *weight = x.weight.data() + v * size;
        const double exact = product(hidden, weight, size);
        const double off = 2.2 * rounding * norm(hidden, size) * norm(weight, size) + 1e-4 * std::fabs(exact);
        check(largest >= exact, "largest", "bound_groups", v, largest, exact);
        check(v == named || next >= exact, "next", "bound_groups", v, next, exact);
        second = std::max(second, std::min(highest, exact + off));
        highest = std::max(highest, exact + off);
      }
      check(largest <= highest, "largest", "bound_groups", g, largest, highest);
      check(next <= second, "next", "bound_groups", g, next, second);
      check(named < entries, "entry", "bound_groups", g, static_cast<double>(named), static_cast<double>(entries));
    }
  }
}

// The first rows are those of a launch of all; tiles of rows behind them, and their ids, are as they were.
template <class T>
void check_wanted(const Operands<T>& x, int64_t tile) {
  const auto [rows, entries, size, block] = x.sizes;
  const Rounded<T> rounded(x);
  const std::vector<GroupBound> whole = bound_groups(x, rounded, 0, entries);
  const std::vector<int64_t> expected = exact_ids(x);
  for (const int64_t wanted : {int64_t{-3}, int64_t{0}, int64_t{1}, tile, tile + 1, rows, int64_t{1} << 40}) {
    const int64_t count = wanted + 5, live = std::clamp<int64_t>(wanted, 0, rows), groups = num_groups(entries);
    const std::vector<GroupBound> bounds = bound_groups(x, rounded, 0, entries, {&count, 5});
    std::vector<double> best(rows, NAN);
    std::vector<int64_t> id(rows, -1);
    launch(Cuda{}, SearchGroups<T>{.bounds = whole.data(),
                                   .hidden = x.hidden.data(),
                                   .weight = x.weight.data(),
                                   .best = best.data(),
                                   .id = id.data(),
                                   .first_id = 0,
                                   .num_rows = rows,
                                   .block = entries,
                                   .size = size,
                                   .wanted = {&count, 5}});
    for (int64_t r = 0; r < rows; ++r) {
      check(id[r] == (r < live ? expected[r] : -1), "wanted id", "search_groups", r, static_cast<double>(id[r]), -1);
      for (int64_t g = r * groups; g < (r + 1) * groups; ++g) {
        const bool same = std::memcmp(&bounds[g], &whole[g], sizeof bounds[g]) == 0;
        check(r >= live || same, "wanted", "bound_groups", g, bounds[g].largest, whole[g].largest);
        const bool spared = r >= (live + tile - 1) / tile * tile;
        check(!spared || std::isnan(bounds[g].largest), "spared", "bound_groups", g, bounds[g].largest, NAN);
      }
    }
  }
}

// Both operands lose as much as rounding may take, all in the same direction; with an entry that goes the other way.
Operands<float> worst_rounding(const Sizes& sizes) {
  const float down = 1 + 0x1.fep-9f, up = 1 + 0x1.02p-8f;  // just below and above half a step of bfloat16
  Operands<float> x{sizes, std::vector<float>(sizes.rows * sizes.size, down), {}};
  for (int64_t v = 0; v < sizes.entries; ++v) x.weight.insert(x.weight.end(), sizes.size, v % 3 == 0 ? -up : down);
  return x;
}

// Every row is an entry too, so that scores are as large as their operands let them be, and have all their bits.
Operands<bfloat16> parallel(const Sizes& sizes) {
  Operands<bfloat16> x{sizes, {}, {}};
  for (int64_t i = 0; i < sizes.entries * sizes.size; ++i)
    x.weight.push_back(convert<bfloat16>(1 + random_value() / 2));
  x.hidden.assign(x.weight.end() - sizes.rows * sizes.size, x.weight.end());
  return x;
}

template <class T>
void check_type() {
  // one band, two, four; a ring that goes round; tiles, groups and rows that are not whole
  for (const Sizes& sizes : {Sizes{1, 1, 8}, Sizes{3, 37, 16}, Sizes{70, 200, 200}, Sizes{257, 70, 40}}) {
    check_bounds(random_operands<T>(sizes));
  }
  check_operands(random_operands<T>({70, 300, 24, 128}));
  check_operands(random_operands<T>({2, 301, 40, 77}));
  const auto check = [](const Operands<T>& x) { check_operands(x); };
  each_special<T>({3, 140, 8, 67}, check);
  check(near_ties<T>({2, 90, 16}));
  check(near_ties<T>({2, 90, 16, 66}));
}

}  // namespace

// More rows than one band of the other kernel: tiles that are not whole, and two of four slices for a block, so that
// the stage of the last slice of the first is filled again.
void check_argmax_warpgroups() {
  simulator::set_capability(90);
  for (const Sizes& sizes : {Sizes{65, 1, 8}, Sizes{200, 70, 72}, Sizes{70, 600, 40}, Sizes{130, 257, 200}}) {
    check_bounds(random_operands<float>(sizes));
  }
  check_bounds(parallel({80, 80, 8}));
  check_operands(random_operands<bfloat16>({129, 300, 24, 128}));
  check_operands(random_operands<half>({66, 301, 40, 77}));
  each_special<bfloat16>({66, 70, 8}, [](const Operands<bfloat16>& x) { check_operands(x); });
  check_operands(near_ties<float>({66, 90, 16}));
  check_wanted(random_operands<bfloat16>({300, 300, 8}), 128);
  simulator::set_capability(80);
}

void check_argmax_groups() {
  check_type<float>();
  check_type<bfloat16>();
  check_type<half>();
  check_bounds(worst_rounding({2, 130, 64}));
  check_bounds(parallel({40, 64, 8}));
  check_wanted(random_operands<float>({520, 70, 8}), 256);
  for (const float scale : {1e19f, 1e-19f, 1e-22f}) {  // beyond a float's largest, and products that underflow
    Operands<float> x = random_operands<float>({3, 70, 40, 32});
    for (float& value : x.hidden) value *= scale;
    for (float& value : x.weight) value *= scale;
    check_operands(x);
  }
  Operands<bfloat16> panels = random_operands<bfloat16>({2, 33000, 8});  // two, of which the second's entries are lower
  for (size_t i = 40 * 8; i < panels.weight.size(); ++i) panels.weight[i].bits = 0;
  check_operands(panels);
}

}  // namespace calm_rt
