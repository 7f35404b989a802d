// Barriers that count bytes, the copy engine and the products of warpgroups. Not instrumented, as all of the scheduler;
// what a copy writes and a product reads is, in primitives_bulk.cuh.
#include "simulator/bulk.h"

#include <algorithm>
#include <stdexcept>

#include "simulator/engine.h"

namespace calm_rt::simulator {
namespace {

// What lies in the 64 bits of a barrier.
struct Phase {
  uint16_t parity : 1, count : 15;  // of the phase that goes on; threads that must arrive
  int16_t missing;                  // of them
  int32_t bytes;                    // expected and not there yet
};
static_assert(sizeof(Phase) == sizeof(uint64_t));

// For each parity its own memory ordering: a thread that runs ahead into the next phase must not hand its writes to
// those still leaving this one.
void* edge(uint64_t* barrier, uint32_t parity) { return reinterpret_cast<char*>(barrier) + parity; }

Phase read(const uint64_t* barrier) {
  Phase phase;
  std::memcpy(&phase, barrier, sizeof phase);
  return phase;
}

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace

void check_map(const BoxMap& map) {
  constexpr size_t kPackBytes = 16, kElementBytes = 2;
  const bool whole =
      reinterpret_cast<uintptr_t>(map.matrix) % kPackBytes == 0 && map.size * kElementBytes % kPackBytes == 0;
  if (!whole) throw std::runtime_error("simulator: a map of a matrix whose rows do not begin at whole packs");
}

// ---- barriers ----

void Engine::need_bulk(Site site) {
  if (capability < 90) fail("an instruction that only a device of compute capability 9.0 has", site);
}

void Engine::barrier_init(uint64_t* barrier, int count, Site site) {
  need_bulk(site);
  check_aligned(barrier, sizeof *barrier, site);
  Phase phase{};
  phase.count = static_cast<uint16_t>(count & 0x7FFF);
  phase.missing = static_cast<int16_t>(count);
  std::memcpy(barrier, &phase, sizeof phase);
}

// `arrived` threads come and `bytes` more are expected, or fewer if negative.
void Engine::barrier_change(uint64_t* barrier, int arrived, int bytes, Site site) {
  if (*barrier == ~uint64_t{0}) fail("a barrier that nobody has initialised", site);
  Phase phase = read(barrier);
  release(edge(barrier, phase.parity));
  phase.missing = static_cast<int16_t>(phase.missing - arrived);
  phase.bytes += bytes;
  if (phase.missing < 0) fail("more threads arrive than the barrier counts", site);
  if (phase.missing == 0 && phase.bytes < 0) fail("more bytes come than the barrier expects", site);
  const bool ended = phase.missing == 0 && phase.bytes == 0;
  if (ended) {
    phase.parity ^= 1;
    phase.missing = static_cast<int16_t>(phase.count);
  }
  std::memcpy(barrier, &phase, sizeof phase);
  if (!ended) return;
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state == State::kAtPhase && threads_[i].barrier == barrier) make_ready(i);
  }
}

void Engine::barrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  if (*barrier == ~uint64_t{0}) fail("a barrier that nobody has initialised", site);
  while (read(barrier).parity == (parity & 1)) {
    Thread& thread = threads_[current_];
    thread.site = site;
    thread.barrier = barrier;
    thread.state = State::kAtPhase;
    run_next();
  }
  acquire(edge(barrier, parity & 1));
}

// ---- the copy engine ----

void Engine::begin_copy(const BulkCopy& copy) {
  need_bulk(copy.site);
  if (copies_begun_ == ~uint64_t{0}) fail("more copies of boxes than may be under way", copy.site);
  const int slot = __builtin_ctzll(~copies_begun_);
  const bool idle = copies_begun_ == 0;
  bulk_copy_[slot] = {copy, copy_number_++, 0};
  copies_begun_ |= uint64_t{1} << slot;
  release(&bulk_copy_[slot].edge);
  if (!copier_lives_) threads_[kCopier].fiber.prepare(copier_entry);
  copier_lives_ = true;
  if (idle) make_ready(kCopier);
}

// Performs copies one after the other, in any order under a seeded schedule.
void Engine::run_copier() {
  for (;;) {
    int chosen = -1, count = 0;
    for (uint64_t left = copies_begun_; left != 0; left &= left - 1) {
      const int slot = __builtin_ctzll(left);
      ++count;
      const bool earlier = chosen < 0 || bulk_copy_[slot].number < bulk_copy_[chosen].number;
      if (schedule == 0 ? earlier : random(static_cast<uint32_t>(count)) == 0) chosen = slot;
    }
    PendingCopy& pending = bulk_copy_[chosen];
    acquire(&pending.edge);
    pending.copy.write(pending.copy);
    barrier_change(pending.copy.barrier, 0, -pending.copy.bytes, pending.copy.site);
    copies_begun_ &= ~(uint64_t{1} << chosen);
    if (copies_begun_ != 0) make_ready(kCopier);
    run_next();
  }
}

// ---- products ----

Products& Engine::products(Site site) {
  need_bulk(site);
  return threads_[current_].products;
}

int Engine::add_product(Products& products, float* sum, const void* a, const void* b, bool add, Site site) {
  warp_collective(Collective::kBallot, ~0u, 1, 0, site);  // the instruction is one for the warp
  if (!products.begun) fail("products that nothing separates from other uses of their sums", site);
  if (products.count == Products::kMost) fail("more products than a thread may have under way", site);
  if (products.count > 0 && sum != products.sum) fail("products of two sums under way", site);
  if (products.count == 0) {
    products.sum = sum;
    std::memcpy(products.kept, sum, sizeof products.kept);
    std::memset(static_cast<void*>(sum), kPoison, sizeof products.kept);
  }
  products.product[products.count++] = {a, b, add, products.group};
  return schedule != 0 && random(2) == 0 ? products.count : products.computed;
}

void finish_products(Products& products, int done, Site site) {
  std::copy(products.product + done, products.product + products.count, products.product);
  products.count -= done;
  products.computed -= done;
  if (products.count == 0 && done > 0) {
    std::memcpy(products.sum, products.kept, sizeof products.kept);
    products.begun = false;
  }
  warp_collective(Collective::kSync, ~0u, 0, 0, site);
}

void multiply_rows(const uint16_t (&a)[2][16], const uint16_t (&b)[64][16], bool add, float* sums) {
  double wide[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) wide[half][k] = static_cast<double>(widened(a[half][k]));
  }
  for (int column = 0; column < 64; ++column) {
    double entry[16];
    for (int k = 0; k < 16; ++k) entry[k] = static_cast<double>(widened(b[column][k]));
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[column / 2 * 4 + half * 2 + column % 2];
      double total = add ? static_cast<double>(sum) : 0;
      for (int k = 0; k < 16; ++k) total += wide[half][k] * entry[k];
      sum = truncate(total);
    }
  }
}

}  // namespace calm_rt::simulator
