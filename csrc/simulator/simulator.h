// Runs CUDA kernel sources on the CPU: one fiber per CUDA thread, blocks one after the other, on the calling OS thread.
//
// common/cuda.cuh includes this header where a host compiler compiles a .cu file, and CUDA's names below mean the
// simulator's. It stops, naming the place in the source, on: a __syncthreads that part of the block does not reach or
// reaches elsewhere, a warp collective whose lanes disagree on mask or place, a mask that names an exited lane or not
// the caller, a deadlock, a write outside the shared arrays, a misaligned pack or asynchronous copy. Shared memory
// starts as NaN in every block, and so does what a shuffle reads from a lane outside the mask. The order of the threads
// can be drawn from a seed. AddressSanitizer sees redzones around shared arrays. Under ThreadSanitizer only
// __syncthreads and __syncwarp order memory, so that a missing barrier is a reported race.
//
// An asynchronous copy leaves NaN where it will write and writes when its thread waits for it, as late as the hardware
// may. Matrix products truncate their sums, as tensor cores do.
//
// It does not show speed, bank conflicts, register limits, races between blocks, or an order of memory that is weaker
// than program order between two barriers.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <source_location>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Set at every switch to a thread; code after a collective reads them again.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace calm_rt::simulator {

using Site = std::source_location;

// Draws the order of threads and blocks of all following launches from a seed; 0 runs them first come, first served.
void set_schedule(uint32_t seed);

// Compute capability of the device that the following launches run on: 80, or 90 which has the instructions of bulk.h.
void set_capability(int capability);
int capability();

// How many blocks a kernel may think run at once; few, so that each takes several turns.
constexpr int kMultiprocessors = 3;

// Runs `body(context)` as every thread of every block. Throws std::runtime_error with kernel name and place on a check
// above.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void* context),
         const void* context);

template <class Body>
void launch(const char* kernel, unsigned blocks, unsigned threads, size_t shared_bytes, const Body& body) {
  run(
      kernel, {blocks}, {threads}, shared_bytes, [](const void* context) { (*static_cast<const Body*>(context))(); },
      &body);
}

// The block's array of a declaration, which `key` stands for; NaN bytes before the first write.
void* shared_array(const void* key, size_t size, Site site);

// The bytes that the launch asked for, an array like those above.
void* dynamic_shared(Site site);

enum class Collective { kShuffle, kBallot, kSync, kLoadMatrix, kMultiplyMatrix };

// What a lane brings to loading four matrices of 8 x 8 16-bit elements, and takes away.
struct MatrixRow {
  uint32_t words[4];   // the row whose address the lane gave: lane 8 m + r that of row r of matrix m
  uint32_t result[4];  // of each matrix the two elements that the lane gets
};

// What a lane brings to sum += a b with a [16, 16] and b [16, 8] of bfloat16, sum [16, 8] in float.
struct MatrixProduct {
  const uint32_t* a;  // [4]
  uint32_t b[2];
  float* sum;  // [4]
};

// Meets the lanes of `mask`. A shuffle gives lane `source`'s value, a ballot the mask of non-zero values; for matrices
// the value is the address of one of the above.
uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Site site);

void block_barrier(Site site);

// The calling thread's asynchronous copies of 16 bytes that it has not waited for, in order.
struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  uint32_t group;
};
struct Copies {
  static constexpr int kMost = 256;  // more than a ring of any depth has under way in one thread
  Copy copy[kMost];
  int count;
  uint32_t group;  // that the next copy belongs to
};
Copies& copies(Site site);

// Stops at an address that the device could not access at once.
void check_aligned(const void* p, size_t alignment, Site site = Site::current());

int lane();

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(Collective::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace calm_rt::simulator

// ---- CUDA's names ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// A reference, so that sizeof and a constant index beyond the end mean what they mean on the device.
#define CALM_SHARED(T, name, count)    \
  static const char name##_key = 0;    \
  T(&name)                             \
  [count] = *static_cast<T(*)[count]>( \
      calm_rt::simulator::shared_array(&name##_key, sizeof(T[count]), std::source_location::current()))

#define CALM_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(calm_rt::simulator::dynamic_shared(std::source_location::current()))

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  calm_rt::simulator::block_barrier(site);
}

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, std::source_location site = std::source_location::current()) {
  calm_rt::simulator::warp_collective(calm_rt::simulator::Collective::kSync, mask, 0, 0, site);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, std::source_location site = std::source_location::current()) {
  return calm_rt::simulator::shuffle(mask, value, source & 31, site);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int offset, std::source_location site = std::source_location::current()) {
  return calm_rt::simulator::shuffle(mask, value, (calm_rt::simulator::lane() ^ offset) & 31, site);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int offset, std::source_location site = std::source_location::current()) {
  const int source = calm_rt::simulator::lane() + offset;
  return calm_rt::simulator::shuffle(mask, value, source < 32 ? source : calm_rt::simulator::lane(), site);
}

inline uint32_t __ballot_sync(uint32_t mask, bool value, std::source_location site = std::source_location::current()) {
  using calm_rt::simulator::Collective;
  return static_cast<uint32_t>(calm_rt::simulator::warp_collective(Collective::kBallot, mask, value, 0, site));
}

// 1 for the lowest bit
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __popc(uint32_t word) { return __builtin_popcount(word); }

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// sin and cos of pi x
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = M_PI * static_cast<double>(x);
  *sine = static_cast<float>(sin(angle));
  *cosine = static_cast<float>(cos(angle));
}
