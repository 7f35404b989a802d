// Survivors in the simulator, against the definition.
#include <algorithm>

#include "kernels/survivors.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

// tokens: [B, S, K]
void check_pools(const std::vector<int64_t>& tokens, const std::vector<int64_t>& kept, int64_t pool, int64_t patch,
                 int64_t depth) {
  const int64_t rows = static_cast<int64_t>(kept.size());
  std::vector<int64_t> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<uint8_t> alive(rows * pool, 7);
    std::vector<int64_t> totals(rows, -1), order(rows * pool + 1, -1);  // the count behind it
    launch(Cuda{}, Survivors{.tokens = tokens.data(),
                             .kept = kept.data(),
                             .alive = alive.data(),
                             .totals = totals.data(),
                             .order = order.data(),
                             .count = &order.back(),
                             .num_rows = rows,
                             .pool = pool,
                             .patch = patch,
                             .depth = depth});
    check_same(order, first, schedule, "order differs under schedule", "survivors");
  }
  std::vector<int64_t> expected, others;
  for (int64_t i = 0; i < rows * pool; ++i) {
    const int64_t b = i / pool, s = i % pool;
    bool alive = s == kept[b];
    for (int64_t other = b * pool; other < (b + 1) * pool; ++other) {
      const int64_t* own = tokens.data() + i * patch;
      alive |= other != i && std::equal(own, own + depth, tokens.data() + other * patch);
    }
    (alive ? expected : others).push_back(i);
  }
  const int64_t count = static_cast<int64_t>(expected.size());
  expected.insert(expected.end(), others.begin(), others.end());
  expected.push_back(count);
  for (size_t i = 0; i < expected.size(); ++i) {
    check(first[i] == expected[i], "order", "survivors", static_cast<int64_t>(i), static_cast<double>(first[i]),
          static_cast<double>(expected[i]));
  }
}

// Tokens from -kinds to kinds; every third pool keeps no candidate.
void check_random_pools(int64_t rows, int64_t pool, int64_t patch, int64_t depth, int64_t kinds) {
  std::vector<int64_t> tokens(rows * pool * patch), kept;
  for (int64_t& token : tokens) token = std::llround(static_cast<double>(random_value()) * static_cast<double>(kinds));
  for (int64_t b = 0; b < rows; ++b) kept.push_back(b % 3 == 2 ? pool : b * 7 % pool);
  check_pools(tokens, kept, pool, patch, depth);
}

}  // namespace

void check_survivors() {
  check_random_pools(6, 1, 1, 1, 9);
  check_random_pools(9, 20, 3, 2, 2);
  check_random_pools(530, 3, 2, 1, 2);      // more pools than threads
  check_random_pools(3, 600, 4, 3, 4);      // more candidates than threads, of which some survive
  check_random_pools(2, 4100, 1, 1, 1500);  // more candidates than keys in shared memory
  check_random_pools(2, 30, 2, 0, 1);       // nothing known: all are alike
  const auto [token, other] = tokens_of_one_key();
  check_pools({token, other, token, other, other, token, 1, 2}, {3, 4}, 4, 1, 1);
}

}  // namespace calm_rt
