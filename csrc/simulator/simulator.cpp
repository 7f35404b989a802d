// The scheduler. All state lives in one engine; every fiber works on it, only one runs at a time.
//
// Nothing here is instrumented by a sanitizer (see CMakeLists.txt) and fibers only write plain fields of the engine, so
// that the only memory traffic between fibers that ThreadSanitizer sees is the kernel's own. Messages are put together
// on the main stack.
#include "simulator/simulator.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "simulator/engine.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace calm_rt::simulator {
namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string text(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

std::mutex engine_mutex;
std::unique_ptr<Engine> engine_storage;  // made at the first launch
Engine* engine = nullptr;

void use_engine() {
  if (engine == nullptr) engine = (engine_storage = std::make_unique<Engine>()).get();
}

}  // namespace

uint32_t Engine::random(uint32_t count) {
  random_ = random_ * 1664525u + 1013904223u;
  return static_cast<uint32_t>(static_cast<uint64_t>(random_) * count >> 32);
}

// ---- scheduling ----

void Engine::make_ready(int thread) {
  threads_[thread].state = State::kReady;
  int* last = &queue_[(queue_head_ + queue_size_++) % queue_.size()];
  *last = thread;
  if (schedule != 0) {
    int* other = &queue_[(queue_head_ + random(queue_size_)) % queue_.size()];
    *last = *other;
    *other = thread;
  }
}

void Engine::switch_to(int thread) {
  if (thread == current_) return;
  Fiber& from = current_ < 0 ? main_ : threads_[current_].fiber;
  const bool done = current_ >= 0 && threads_[current_].state == State::kDone;
  current_ = thread;
  if (thread >= 0) threadIdx = threads_[thread].index;
  Fiber::switch_to(from, thread < 0 ? main_ : threads_[thread].fiber, done);
}

void Engine::run_next() {
  if (queue_size_ == 0) {
    if (live_ > 0) fail_deadlock();
    return switch_to(-1);
  }
  const int next = queue_[queue_head_];
  queue_head_ = (queue_head_ + 1) % static_cast<int>(queue_.size());
  --queue_size_;
  switch_to(next);
}

void Engine::entry() {
  Fiber::entered(engine->main_);
  acquire(&engine->start_edge_);
  engine->body_(engine->context_);
  release(&engine->end_edge_);
  engine->exit_thread();
}

void Engine::copier_entry() {
  Fiber::entered(engine->main_);
  engine->run_copier();
}

void Engine::exit_thread() {
  Thread& thread = threads_[current_];
  thread.state = State::kDone;
  --live_;
  if (live_ == 0 && copies_begun_ != 0) {
    fail("a copy of a box is under way when the block ends", bulk_copy_[__builtin_ctzll(copies_begun_)].copy.site);
  }
  Warp& warp = warps_[current_ / kLanes];
  const uint32_t bit = 1u << lane();
  warp.exited |= bit;
  for (uint64_t used = warp.used; used != 0; used &= used - 1) {
    const Meeting& meeting = warp.meetings[__builtin_ctzll(used)];
    if (meeting.arrived != meeting.mask && (meeting.mask & bit)) fail("a lane of the mask has exited", meeting.site);
  }
  if (barrier_.arrived > 0 && barrier_.arrived == live_) finish_barrier();  // exited threads no longer count
  run_next();
}

// ---- collectives ----

void Engine::finish_barrier() {
  barrier_.arrived = 0;
  barrier_.turn ^= 1;
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state == State::kAtBarrier) make_ready(i);
  }
}

void Engine::block_barrier(Site site) {
  if (barrier_.arrived == 0) {
    barrier_.site = site;
  } else if (!same(barrier_.site, site)) {
    fail("divergent __syncthreads", site, &barrier_.site);
  }
  Thread& thread = threads_[current_];
  char* edge = &barrier_.edge[barrier_.turn];
  release(edge);
  thread.site = site;
  thread.state = State::kAtBarrier;
  if (++barrier_.arrived == live_) finish_barrier();
  run_next();
  acquire(edge);
}

void Engine::finish_meeting(Warp& warp, Meeting& meeting) {
  if (meeting.kind == Collective::kLoadMatrix) load_matrices(meeting.value);
  if (meeting.kind == Collective::kMultiplyMatrix) multiply_matrices(meeting.value);
  uint64_t ballot = 0;
  for (int i = 0; i < kLanes; ++i) {
    if ((meeting.mask >> i & 1) && meeting.value[i] != 0) ballot |= uint64_t{1} << i;
  }
  const int first = static_cast<int>(&warp - warps_.data()) * kLanes;
  for (int i = 0; i < kLanes; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    const int source = meeting.source[i];
    const uint64_t shuffled = meeting.mask >> source & 1 ? meeting.value[source] : ~uint64_t{0};
    meeting.result[i] = meeting.kind == Collective::kBallot ? ballot : shuffled;
    make_ready(first + i);
  }
}

uint64_t Engine::warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Site site) {
  Warp& warp = warps_[current_ / kLanes];
  const int lane = this->lane();
  const uint32_t bit = 1u << lane;
  mask &= warp.lanes;  // a block's last warp may be short
  if (!(mask & bit)) fail("the mask does not name the calling lane", site);
  if (mask & warp.exited) fail("a lane of the mask has exited", site);
  const bool matrix = kind == Collective::kLoadMatrix || kind == Collective::kMultiplyMatrix;
  if (matrix && mask != ~0u) fail("a matrix instruction needs a whole warp", site);
  Meeting* meeting = nullptr;
  for (uint64_t used = warp.used; used != 0; used &= used - 1) {
    Meeting& open = warp.meetings[__builtin_ctzll(used)];
    if (open.arrived == open.mask || !(open.mask & mask)) continue;
    if (open.mask != mask) fail("masks of two collectives overlap", site, &open.site);
    if (open.kind != kind || !same(open.site, site))
      fail("lanes of one mask meet in different collectives", site, &open.site);
    meeting = &open;
  }
  if (meeting == nullptr) {
    const int slot = __builtin_ctzll(~warp.used);
    warp.used |= uint64_t{1} << slot;
    meeting = &warp.meetings[slot];
    meeting->kind = kind;
    meeting->mask = mask;
    meeting->arrived = meeting->left = 0;
    meeting->site = site;
  }
  meeting->value[lane] = value;
  meeting->source[lane] = source;
  meeting->arrived |= bit;
  if (kind == Collective::kSync) release(&meeting->edge);
  threads_[current_].site = site;
  threads_[current_].state = State::kInWarp;
  if (meeting->arrived == mask) finish_meeting(warp, *meeting);
  run_next();
  if (kind == Collective::kSync) acquire(&meeting->edge);
  meeting->left |= bit;
  if (meeting->left == mask) warp.used &= ~(uint64_t{1} << (meeting - warp.meetings.data()));
  return meeting->result[lane];
}

// ---- memory ----

void Engine::check_aligned(const void* p, size_t alignment, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned access", site);
}

Copies& Engine::copies(Site site) {
  Copies& copies = threads_[current_].copies;
  if (copies.count == Copies::kMost) fail("more asynchronous copies than a thread may have under way", site);
  return copies;
}

void* Engine::dynamic_shared(Site site) {
  if (dynamic_bytes_ == 0) fail("dynamic shared memory that the launch did not ask for", site);
  return shared_array(&dynamic_bytes_, dynamic_bytes_, site);
}

void* Engine::shared_array(const void* key, size_t size, Site site) {
  for (int i = 0; i < num_shared_; ++i) {
    if (shared_[i].key == key) return &arena_[shared_[i].begin];
  }
  if (key != &dynamic_bytes_) static_bytes_ += size;
  if (num_shared_ == kMaxSharedArrays || static_bytes_ > kSharedLimit) fail("shared arrays exceed 48 KB", site);
  if (static_bytes_ + dynamic_bytes_ > shared_limit()) fail("shared memory exceeds what the device has", site);
  shared_[num_shared_++] = {key, arena_used_, size, site};
  void* array = &arena_[arena_used_];
  unpoison(array, size);
  arena_used_ += (size + kRedzone - 1) / kRedzone * kRedzone + kRedzone;
  return array;
}

// Bytes outside the arrays must be as poisoned as they were.
void Engine::check_redzones() {
  size_t end = 0;
  for (int i = 0; i <= num_shared_; ++i) {
    const size_t next = i < num_shared_ ? shared_[i].begin : arena_used_;
    for (size_t byte = end; byte < next; ++byte) {
      if (arena_[byte] == kPoison) continue;
      failure_ = {
          .what = "write outside the shared array", .site = shared_[std::max(i - 1, 0)].site, .block = blockIdx};
      return;
    }
    if (i < num_shared_) end = shared_[i].begin + shared_[i].size;
  }
}

// ---- failures ----

// Leaves the launch from inside a thread; the fibers that wait are abandoned.
void Engine::fail(const char* what, Site site, const Site* other) {
  failure_ = {.what = what,
              .site = site,
              .other = other ? *other : site,
              .has_other = other != nullptr,
              .thread = threadIdx,
              .block = blockIdx};
  switch_to(-1);
  std::abort();  // nothing switches back
}

void Engine::fail_deadlock() {
  const Thread* waits = nullptr;
  for (int i = 0; i < count_; ++i) {
    if (threads_[i].state == State::kDone) continue;
    if (waits != nullptr && !same(waits->site, threads_[i].site)) {
      fail("deadlock: threads wait for each other", waits->site, &threads_[i].site);
    }
    waits = &threads_[i];
  }
  fail("deadlock: threads wait for others that never come", waits->site);
}

std::string Engine::message(const char* kernel) const {
  auto tuple = [](dim3 d) { return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z); };
  std::string message = std::string("simulator: ") + kernel + ": " + failure_.what + " at " + text(failure_.site);
  if (failure_.has_other) message += " and " + text(failure_.other);
  return message + " (block " + tuple(failure_.block) + ", thread " + tuple(failure_.thread) + ")";
}

// ---- launch ----

void Engine::start_threads() {
  int i = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x, ++i) {
        threads_[i].index = {x, y, z};
        threads_[i].copies.count = 0;
        threads_[i].products.count = threads_[i].products.computed = 0;
        threads_[i].products.begun = false;
        threads_[i].fiber.prepare(entry);
        make_ready(i);
      }
    }
  }
  for (int w = 0; w < kMaxWarps; ++w) {
    const int lanes = std::clamp(count_ - w * kLanes, 0, kLanes);
    warps_[w].lanes = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warps_[w].exited = 0;
    warps_[w].used = 0;
  }
}

void Engine::run_block(unsigned index) {
  blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
  queue_head_ = queue_size_ = 0;
  live_ = count_;
  barrier_.arrived = 0;
  copies_begun_ = 0;
  copier_lives_ = false;
  num_shared_ = 0;
  static_bytes_ = 0;
  arena_used_ = kRedzone;
  random_ = schedule * 2654435761u + index;
  poison(arena_.data(), arena_.size());
  start_threads();
  release(&start_edge_);
  run_next();
  acquire(&end_edge_);
  unpoison(arena_.data(), arena_.size());
  if (failure_.what == nullptr) check_redzones();
  std::memset(arena_.data(), kPoison, arena_used_);
}

void Engine::run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
                 const void* context) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || blocks > INT32_MAX || shared_bytes > shared_limit()) {
    throw std::runtime_error(std::string("simulator: ") + kernel + ": invalid configuration");
  }
  gridDim = grid;
  blockDim = block;
  count_ = static_cast<int>(threads);
  dynamic_bytes_ = shared_bytes;
  body_ = body;
  context_ = context;
  failure_ = {};
  main_.adopt_current();
  std::memset(arena_.data(), kPoison, arena_.size());
  for (uint64_t i = 0; i < blocks; ++i) {
    // a seeded schedule also starts elsewhere in the grid
    run_block(static_cast<unsigned>((i + schedule) % blocks));
    if (failure_.what != nullptr) throw std::runtime_error(message(kernel));
  }
}

void set_schedule(uint32_t seed) {
  std::lock_guard lock(engine_mutex);
  use_engine();
  engine->schedule = seed;
}

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
         const void* context) {
  std::lock_guard lock(engine_mutex);
  use_engine();
  engine->run(kernel, grid, block, shared_bytes, body, context);
}

void* shared_array(const void* key, size_t size, Site site) { return engine->shared_array(key, size, site); }

void* dynamic_shared(Site site) { return engine->dynamic_shared(site); }

Copies& copies(Site site) { return engine->copies(site); }

void set_capability(int capability) {
  std::lock_guard lock(engine_mutex);
  use_engine();
  engine->capability = capability;
}

int capability() {
  use_engine();
  return engine->capability;
}

void barrier_init(uint64_t* barrier, int count, Site site) { engine->barrier_init(barrier, count, site); }

void barrier_arrive(uint64_t* barrier, Site site) { engine->barrier_change(barrier, 1, 0, site); }

void barrier_arrive_expecting(uint64_t* barrier, int bytes, Site site) {
  engine->barrier_change(barrier, 1, bytes, site);
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Site site) { engine->barrier_wait(barrier, parity, site); }

void begin_copy(const BulkCopy& copy) { engine->begin_copy(copy); }

Products& products(Site site) { return engine->products(site); }

int add_product(Products& products, float* sum, const void* a, const void* b, bool add, Site site) {
  return engine->add_product(products, sum, a, b, add, site);
}

uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Site site) {
  return engine->warp_collective(kind, mask, value, source, site);
}

void block_barrier(Site site) { engine->block_barrier(site); }

void check_aligned(const void* p, size_t alignment, Site site) { engine->check_aligned(p, alignment, site); }

int lane() { return engine->lane(); }

}  // namespace calm_rt::simulator
