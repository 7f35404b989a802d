// The state of a launch: the threads of the block that runs, what they wait for, and its shared memory.
#pragma once
#include <array>
#include <string>

#include "simulator/bulk.h"
#include "simulator/fiber.h"
#include "simulator/simulator.h"

namespace calm_rt::simulator {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kCopier = kMaxThreads;  // a thread beside the block's: the copy engine
constexpr int kMaxMeetings = 64;      // of a warp: up to 32 that gather (their masks are disjoint), 32 being left
constexpr int kMaxSharedArrays = 64;
constexpr size_t kSharedLimit = 48 << 10;        // of static shared memory on every device
constexpr size_t kDynamicLimit = 99 << 10;       // of both together on every device from sm_80 on
constexpr size_t kBulkDynamicLimit = 227 << 10;  // on sm_90
constexpr size_t kRedzone = 64;
constexpr size_t kArenaSize = kBulkDynamicLimit + (kMaxSharedArrays + 1) * 2 * kRedzone;
constexpr unsigned char kPoison = 0xFF;  // four or eight of them are a NaN

enum class State { kReady, kAtBarrier, kInWarp, kAtPhase, kDone };

struct Thread {
  Fiber fiber;
  dim3 index;
  State state;
  Site site;  // where it waits
  Copies copies;
  Products products;
  const uint64_t* barrier;  // whose phase it waits for
};

// A copy of the copy engine that has not been performed.
struct PendingCopy {
  BulkCopy copy;
  uint64_t number;  // in the order of issue
  char edge;        // its address stands for what the issuing thread did before
};

// Lanes of one mask that meet in one collective. It stays until all of them have taken their result.
struct Meeting {
  Collective kind;
  uint32_t mask, arrived, left;
  Site site;
  std::array<uint64_t, kLanes> value, result;
  std::array<int, kLanes> source;
  char edge;  // its address stands for the memory ordering of a __syncwarp
};

struct Warp {
  uint32_t lanes, exited;
  uint64_t used;  // bit per meeting
  std::array<Meeting, kMaxMeetings> meetings;
};

struct Barrier {
  int arrived;
  Site site;
  // Two in turn: a thread that runs ahead to the next barrier must not hand its writes to those still leaving this one.
  std::array<char, 2> edge;
  int turn;
};

struct SharedArray {
  const void* key;
  size_t begin, size;
  Site site;
};

struct Failure {
  const char* what = nullptr;
  Site site = {}, other = {};
  bool has_other = false;
  dim3 thread = {}, block = {};
};

// What 32 lanes do with matrices, known by the addresses that they brought.
void load_matrices(const std::array<uint64_t, kLanes>& rows);
void multiply_matrices(const std::array<uint64_t, kLanes>& products);

// The nearest float that is no larger in magnitude: tensor cores cut off what a sum has beyond a float.
float truncate(double x);

// One block runs at a time; its fibers call the engine, which puts them to sleep, picks the next and checks.
class Engine {
 public:
  uint32_t schedule = 0;
  int capability = 80;

  void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
           const void* context);
  void* shared_array(const void* key, size_t size, Site site);
  void* dynamic_shared(Site site);
  Copies& copies(Site site);
  void barrier_init(uint64_t* barrier, int count, Site site);
  void barrier_change(uint64_t* barrier, int arrived, int bytes, Site site);
  void barrier_wait(uint64_t* barrier, uint32_t parity, Site site);
  void begin_copy(const BulkCopy& copy);
  Products& products(Site site);
  int add_product(Products& products, float* sum, const void* a, const void* b, bool add, Site site);
  uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Site site);
  void block_barrier(Site site);
  void check_aligned(const void* p, size_t alignment, Site site);
  int lane() const { return current_ % kLanes; }

 private:
  static void entry();
  static void copier_entry();
  void run_copier();
  void need_bulk(Site site);
  size_t shared_limit() const { return capability < 90 ? kDynamicLimit : kBulkDynamicLimit; }
  void run_block(unsigned index);
  void start_threads();
  void check_redzones();
  void make_ready(int thread);
  void run_next();
  void switch_to(int thread);
  void finish_barrier();
  void finish_meeting(Warp& warp, Meeting& meeting);
  void exit_thread();
  [[noreturn]] void fail(const char* what, Site site, const Site* other = nullptr);
  [[noreturn]] void fail_deadlock();
  std::string message(const char* kernel) const;
  uint32_t random(uint32_t count);

  std::array<Thread, kMaxThreads + 1> threads_;
  std::array<Warp, kMaxWarps> warps_;
  std::array<int, kMaxThreads + 1> queue_;  // ring of threads that can run
  int queue_head_ = 0, queue_size_ = 0;
  int count_ = 0, live_ = 0;  // threads of the block, those that have not exited
  int current_ = -1;          // -1 on the main stack
  Barrier barrier_;
  std::array<PendingCopy, 64> bulk_copy_;
  uint64_t copies_begun_ = 0;  // bit per one of them
  uint64_t copy_number_ = 0;
  bool copier_lives_ = false;
  std::array<SharedArray, kMaxSharedArrays> shared_;
  int num_shared_ = 0;
  size_t static_bytes_ = 0, dynamic_bytes_ = 0, arena_used_ = 0;
  alignas(128) std::array<unsigned char, kArenaSize> arena_;
  Fiber main_;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  uint32_t random_ = 0;
  Failure failure_;
  char start_edge_ = 0, end_edge_ = 0;
};

}  // namespace calm_rt::simulator
