// Survivors on the CPU: one pool at a time, in time linear in S, then one list of all.
//
// An open-addressing table finds the first candidate that begins alike; it and all that follow it are alive.
#include "kernels/survivors.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"
#include "kernels/select_patch.h"

#ifdef CALM_ISA_PORTABLE
#include <memory>
#endif

namespace calm_rt {

CALM_EACH_ISA(void survivors_kernel(const Survivors& p, int64_t* table, int64_t table_size, int64_t begin,
                                    int64_t end);)

namespace CALM_ISA {

// table: [table_size], a power of two above S
void survivors_kernel(const Survivors& p, int64_t* table, int64_t table_size, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* tokens = p.tokens + b * p.pool * p.patch;
    uint8_t* alive = p.alive + b * p.pool;
    for (int64_t k = 0; k < table_size; ++k) table[k] = -1;
    for (int64_t s = 0; s < p.pool; ++s) {
      const int64_t* own = tokens + s * p.patch;
      int64_t slot = static_cast<int64_t>(patch_hash(own, p.depth)) & (table_size - 1);
      while (table[slot] >= 0 && !same_patch(own, tokens + table[slot] * p.patch, p.depth)) {
        slot = (slot + 1) & (table_size - 1);
      }
      const bool first = table[slot] < 0;
      if (first)
        table[slot] = s;
      else
        alive[table[slot]] = 1;
      alive[s] = !first || s == p.kept[b];
    }
  }
}

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
void launch(Cpu device, const Survivors& p) {
  const int64_t table_size = patch_table_size(p.pool);
  const int64_t grain = 1 + 16384 / (p.pool * (p.depth + 4));  // about 20 us of work
  parallel_blocks(device, p.num_rows, grain, [&](Blocks& blocks) {
    auto table = std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(table_size));
    for (int64_t begin, end; blocks.take(begin, end);) {
      CALM_SELECT(survivors_kernel)(p, table.get(), table_size, begin, end);
    }
  });
  const int64_t all = p.num_rows * p.pool;
  int64_t next = 0;
  for (const bool alive : {true, false}) {
    for (int64_t i = 0; i < all; ++i) {
      if ((p.alive[i] != 0) == alive) p.order[next++] = i;
    }
    if (alive) *p.count = next;
  }
}
#endif

}  // namespace calm_rt
