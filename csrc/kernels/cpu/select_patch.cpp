// Choice of a patch on the CPU: one pool at a time, in time linear in S.
//
// An open-addressing table finds each candidate's group of equal patches, so groups stand in the order of their first
// occurrence. Table and groups take less than 64 S bytes and stay in the first two caches.
#include "kernels/select_patch.h"

#include "common/philox.h"
#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

#ifdef CALM_ISA_PORTABLE
#include <memory>
#endif

namespace calm_rt {

// Equal patches of a pool.
struct PatchGroup {
  int64_t first;  // candidate
  int64_t count;
  double total;  // cumulative weight
};

CALM_EACH_ISA(void select_patch_kernel(const SelectPatch& p, int64_t* table, int64_t table_size, PatchGroup* groups,
                                       int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

// A function of its own: inlined, its last product and the sum of weights could become one rounding instead of two.
__attribute__((noinline)) double weight_of(int64_t count, int64_t most, int64_t level) {
  return patch_weight(count, most, level);
}

// Fills the groups of a pool; returns how many there are.
CALM_INLINE int64_t group_patches(const int64_t* tokens, int64_t pool, int64_t patch, int64_t* table,
                                  int64_t table_size, PatchGroup* groups) {
  for (int64_t k = 0; k < table_size; ++k) table[k] = -1;
  int64_t num_groups = 0;
  for (int64_t s = 0; s < pool; ++s) {
    const int64_t* own = tokens + s * patch;
    int64_t slot = static_cast<int64_t>(patch_hash(own, patch)) & (table_size - 1);
    while (table[slot] >= 0 && !same_patch(own, tokens + groups[table[slot]].first * patch, patch)) {
      slot = (slot + 1) & (table_size - 1);
    }
    if (table[slot] < 0) {
      table[slot] = num_groups;
      groups[num_groups++] = {s, 0, 0};
    }
    ++groups[table[slot]].count;
  }
  return num_groups;
}

}  // namespace

// table: [table_size], a power of two above S; groups: [S]
void select_patch_kernel(const SelectPatch& p, int64_t* table, int64_t table_size, PatchGroup* groups, int64_t begin,
                         int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t num_groups =
        group_patches(p.tokens + b * p.pool * p.patch, p.pool, p.patch, table, table_size, groups);
    int64_t most = 0;
    for (int64_t g = 0; g < num_groups; ++g) most = groups[g].count > most ? groups[g].count : most;
    const int64_t level = p.n < most ? p.n : most;
    double total = 0;
    for (int64_t g = 0; g < num_groups; ++g) {
      if (groups[g].count >= level) total += weight_of(groups[g].count, most, level);
      groups[g].total = total;
    }
    const PhiloxWords words = philox(philox_counter(0, kChoice, 0, p.rows[b]), static_cast<uint64_t>(*p.seed));
    const double target = static_cast<double>(calm_rt::uniform(words.word[0])) * total;  // below total, for u < 1
    int64_t chosen = 0;
    while (groups[chosen].total <= target) ++chosen;
    p.index[b] = groups[chosen].first;
  }
}

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
void launch(Cpu device, const SelectPatch& p) {
  if (p.num_rows == 0) return;
  const int64_t table_size = patch_table_size(p.pool);
  const int64_t grain = 1 + 16384 / (p.pool * (p.patch + 4));  // about 20 us of work
  parallel_blocks(device, p.num_rows, grain, [&](Blocks& blocks) {
    auto table = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(table_size));
    auto groups = std::make_unique_for_overwrite<PatchGroup[]>(static_cast<size_t>(p.pool));
    for (int64_t begin, end; blocks.take(begin, end);) {
      CALM_SELECT(select_patch_kernel)(p, table.get(), table_size, groups.get(), begin, end);
    }
  });
}
#endif

}  // namespace calm_rt
