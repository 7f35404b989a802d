// What the simulator knows of sm_90a beside what simulator.h has: barriers that count arrivals and bytes, the engine
// that copies boxes of a matrix into shared memory, and the products of a warpgroup.
//
// The copy engine runs as a thread of its own that the schedule draws like the others. A copy leaves NaN where it will
// write when it is issued, and writes at whatever later moment its turn comes. A product reads its operands at a moment
// drawn between its issue and the wait for it, or at the wait; until then its sums are NaN.
#pragma once
#include "simulator/simulator.h"

namespace calm_rt::simulator {

// A barrier's phase ends when `count` threads have arrived and all bytes are there that were expected.
void barrier_init(uint64_t* barrier, int count, Site site = Site::current());
void barrier_arrive(uint64_t* barrier, Site site = Site::current());
void barrier_arrive_expecting(uint64_t* barrier, int bytes, Site site = Site::current());
void barrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current());

// A matrix of 16-bit elements in memory, of which boxes of `box_rows` rows are copied.
struct BoxMap {
  const void* matrix;
  int64_t num_rows, size;
  int box_rows;
};

// Throws std::runtime_error where the copy engine could not read the matrix: the driver would make no map, and the
// caller take another way without a word.
void check_map(const BoxMap& map);

// A box on its way into shared memory. It has the map itself: each thread's is gone when the thread has exited.
struct BulkCopy {
  void (*write)(const BulkCopy& copy);  // by code that the sanitizers see
  void* to;
  BoxMap map;
  int64_t row, column;
  uint64_t* barrier;
  int bytes;
  Site site;
};
void begin_copy(const BulkCopy& copy);

// A 64 x 256 product of 16 columns of two boxes.
struct Product {
  const void *a, *b;
  bool add;
  uint32_t group;
};

// The calling thread's part of its warpgroup's products that it has not waited for.
struct Products {
  static constexpr int kMost = 64, kSums = 128;
  Product product[kMost];
  int count, computed;  // the first `computed` of them are in `kept`
  uint32_t group;       // that the next product belongs to
  bool begun;
  float* sum;
  float kept[kSums];
};
Products& products(Site site);

// The calling thread's sums are to be those of one more product, and its registers NaN until they have been waited for.
// Meets the warp. Returns how many products to have computed now.
int add_product(Products& products, float* sum, const void* a, const void* b, bool add, Site site);

// Forgets the first `done`, gives the sums if no other is under way, and meets the warp.
void finish_products(Products& products, int done, Site site);

// sums[128] (+)= a b: rows [2, 16] of a and [64, 16] of b that a thread's sums are of.
void multiply_rows(const uint16_t (&a)[2][16], const uint16_t (&b)[64][16], bool add, float* sums);

}  // namespace calm_rt::simulator
