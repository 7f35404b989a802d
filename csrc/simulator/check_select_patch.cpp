// The choice of a patch in the simulator, against the definition.
#include <algorithm>
#include <unordered_map>

#include "common/philox.h"
#include "kernels/select_patch.h"
#include "simulator/check.h"

namespace calm_rt {
namespace {

// The choice for one pool [S, K], with weights as binomial coefficients' ratios and sums in the order of candidates.
int64_t expected_choice(const int64_t* tokens, int64_t pool, int64_t patch, int64_t n, double u) {
  auto equal = [&](int64_t a, int64_t b) {
    return std::equal(tokens + a * patch, tokens + (a + 1) * patch, tokens + b * patch);
  };
  std::vector<int64_t> counts(pool);  // at first occurrences
  for (int64_t s = 0; s < pool; ++s) {
    int64_t first = 0;
    while (!equal(first, s)) ++first;
    ++counts[first];
  }
  const int64_t most = *std::max_element(counts.begin(), counts.end()), level = std::min(n, most);
  std::vector<double> totals(pool);
  double total = 0;
  for (int64_t s = 0; s < pool; ++s) {
    double weight = counts[s] >= level;
    for (int64_t j = 0; j < level && weight > 0; ++j) weight *= static_cast<double>(counts[s] - j) / (most - j);
    totals[s] = total += weight;
  }
  return std::upper_bound(totals.begin(), totals.end(), u * total) - totals.begin();
}

void check_pools(const std::vector<int64_t>& tokens, int64_t rows, int64_t pool, int64_t patch, int64_t n) {
  const int64_t seed = -5;
  std::vector<int64_t> ids, first;
  for (int64_t r = 0; r < rows; ++r) ids.push_back((r << 33) - 7 * r + 2);
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<int64_t> index(rows, -1);
    std::vector<double> workspace(rows * pool, NAN);
    launch(Cuda{}, SelectPatch{.tokens = tokens.data(),
                               .seed = &seed,
                               .rows = ids.data(),
                               .workspace = workspace.data(),
                               .index = index.data(),
                               .n = n,
                               .num_rows = rows,
                               .pool = pool,
                               .patch = patch});
    check_same(index, first, schedule, "index differs under schedule", "select_patch");
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double u = reference_noise(false, seed, ids[r], 0, 0, kChoice);
    const int64_t expected = expected_choice(tokens.data() + r * pool * patch, pool, patch, n, u);
    check(first[r] == expected, "index", "select_patch", r, static_cast<double>(first[r]),
          static_cast<double>(expected));
  }
}

// Pools of tokens below and above 0, from -kinds to kinds.
void check_random_pools(int64_t rows, int64_t pool, int64_t patch, int64_t n, int64_t kinds) {
  std::vector<int64_t> tokens(rows * pool * patch);
  for (int64_t& token : tokens) token = std::llround(static_cast<double>(random_value()) * static_cast<double>(kinds));
  check_pools(tokens, rows, pool, patch, n);
}

// Two patches that share their key and are not equal, in turn.
void check_one_key() {
  const auto [token, other] = tokens_of_one_key();
  std::vector<int64_t> tokens;
  for (int64_t r = 0; r < 8; ++r) tokens.insert(tokens.end(), {token, other, token, other, token});
  check_pools(tokens, 8, 5, 1, 1);
}

}  // namespace

std::pair<int64_t, int64_t> tokens_of_one_key() {
  std::unordered_map<uint32_t, int64_t> seen;
  int64_t token = 0;
  auto key = [&] { return static_cast<uint32_t>(patch_hash(&token, 1)); };
  while (seen.emplace(key(), token).second) ++token;
  return {token, seen[key()]};
}

void check_select_patch() {
  check_random_pools(6, 1, 1, 3, 9);
  check_random_pools(9, 20, 2, 2, 1);
  check_random_pools(4, 70, 3, 100, 1);  // the most frequent patches alone
  check_random_pools(3, 600, 4, 2, 99);  // more candidates than threads, hardly any repeats
  check_random_pools(2, 4100, 1, 3, 4);  // more candidates than keys in shared memory
  check_random_pools(3, 30, 0, 2, 1);    // patches without tokens
  check_one_key();
}

}  // namespace calm_rt
