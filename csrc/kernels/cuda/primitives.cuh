// The instructions that plain C++ does not name, for the device and for the simulator, and the unit of work built on
// them: consecutive elements of a row that one thread reads and writes at once. Four of them are what one Philox
// counter makes, eight are 16 bytes of a 16-bit type.
#pragma once
#include "common/cuda.cuh"
#include "common/types.h"

namespace calm_rt {

constexpr int kFour = 4;
constexpr int kEight = 8;

// One load or store instruction, two for eight floats.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Pack {
  T value[COUNT];
};

// ---- conversions, maximum, packs ----

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }

#ifdef __CUDACC__

__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ __forceinline__ float widen(half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ __forceinline__ void narrow(float x, bfloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}

__device__ __forceinline__ void narrow(float x, half& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }

// NaN where one of them is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

template <int COUNT, class T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, COUNT>*>(from);
}

template <class T, int COUNT>
__device__ __forceinline__ void store_pack(const Pack<T, COUNT>& pack, T* to) {
  *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
}

// ---- asynchronous copies ----

// Sixteen bytes into shared memory, zeros instead unless `wanted`; there after copies_done and a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool wanted) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}

// What the thread has copied since the last call is a group, if only of nothing.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the thread's own groups but for the last OPEN.
template <int OPEN>
__device__ __forceinline__ void copies_done() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

// ---- matrices of bfloat16 ----

// Four 8 x 8 matrices from shared memory: lane 8 m + r gives the address of row r of matrix m, 16 bytes, and gets of
// each matrix two elements of row lane / 4, from column 2 (lane % 4) on.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], const void* shared_row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(from)
               : "memory");
}

// sum += a b with a [16, 16] as four 8 x 8 matrices (upper left, lower left, upper right, lower right), b [16, 8] as
// two matrices of its columns, sum [16, 8]: two elements of row lane / 4 and two of row lane / 4 + 8.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper,
                                             uint32_t b_lower) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

#else

__device__ __forceinline__ float widen(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float widen(half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }

__device__ __forceinline__ void narrow(float x, bfloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t nearest_even = bits + 0x7FFF + (bits >> 16 & 1);
  out.bits = static_cast<uint16_t>(x == x ? nearest_even >> 16 : 0x7FFF);
}

__device__ __forceinline__ void narrow(float x, half& out) {
  out.bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}

__device__ __forceinline__ float max_nan(float a, float b) { return a != a || a > b ? a : b; }

// Not by a cast as on the device: GCC 12 takes its alignment for granted where a kernel may also read single elements.
template <int COUNT, class T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
  simulator::check_aligned(from, alignof(Pack<T, COUNT>));
  Pack<T, COUNT> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class T, int COUNT>
__device__ __forceinline__ void store_pack(const Pack<T, COUNT>& pack, T* to) {
  simulator::check_aligned(to, alignof(Pack<T, COUNT>));
  std::memcpy(to, &pack, sizeof pack);
}

inline void copy_async(void* shared, const void* from, bool wanted, simulator::Site site = simulator::Site::current()) {
  simulator::check_aligned(shared, 16, site);
  simulator::check_aligned(from, 16, site);
  simulator::Copies& copies = simulator::copies(site);
  std::memset(shared, 0xFF, 16);
  copies.copy[copies.count++] = {shared, wanted ? from : nullptr, copies.group};
}

inline void close_copies(simulator::Site site = simulator::Site::current()) { ++simulator::copies(site).group; }

template <int OPEN>
void copies_done(simulator::Site site = simulator::Site::current()) {
  simulator::Copies& copies = simulator::copies(site);
  int open = 0;
  for (int i = 0; i < copies.count; ++i) {
    const simulator::Copy& copy = copies.copy[i];
    if (copies.group - copy.group <= OPEN) {
      copies.copy[open++] = copy;
    } else if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
  }
  copies.count = open;
}

inline void load_matrices(uint32_t (&matrix)[4], const void* shared_row,
                          simulator::Site site = simulator::Site::current()) {
  simulator::check_aligned(shared_row, 16, site);
  simulator::MatrixRow row;
  std::memcpy(row.words, shared_row, sizeof row.words);
  simulator::warp_collective(simulator::Collective::kLoadMatrix, 0xFFFFFFFFu, reinterpret_cast<uint64_t>(&row), 0,
                             site);
  std::memcpy(matrix, row.result, sizeof row.result);
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower,
                         simulator::Site site = simulator::Site::current()) {
  simulator::MatrixProduct product{a, {b_upper, b_lower}, sum};
  simulator::warp_collective(simulator::Collective::kMultiplyMatrix, 0xFFFFFFFFu, reinterpret_cast<uint64_t>(&product),
                             0, site);
}

#endif

// ---- consecutive elements ----

template <int COUNT>
struct Run {
  float value[COUNT];
};
using Four = Run<kFour>;

// The bfloat16 of words that hold two each, one instruction for each; element by element it takes two.
template <int COUNT>
__device__ __forceinline__ Run<2 * COUNT> widen_pairs(const Pack<uint32_t, COUNT>& words) {
  Run<2 * COUNT> run;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const uint32_t both[2] = {words.value[i] << 16, words.value[i] & 0xFFFF0000u};
    memcpy(run.value + 2 * i, both, sizeof both);
  }
  return run;
}

// Whether the groups of COUNT of a [..., length] tensor can be read and written as packs; true for a null pointer.
template <int COUNT = kFour, class T>
bool is_packed(const T* tensor, int64_t length) {
  return length % COUNT == 0 && reinterpret_cast<uintptr_t>(tensor) % sizeof(Pack<T, COUNT>) == 0;
}

// The same of several tensors and groups of eight.
template <class... Tensors>
bool all_packed(int64_t length, const Tensors*... tensors) {
  return (... && is_packed<kEight>(tensors, length));
}

// Elements first ... first + COUNT - 1 of a row, zeros beyond its length.
template <int COUNT, class T>
__device__ __forceinline__ Run<COUNT> load_run(const T* row, int64_t first, int64_t length, bool packed) {
  Run<COUNT> run{};
  if (packed) {
    if (first < length) {
      const Pack<T, COUNT> pack = load_pack<COUNT>(row + first);
#pragma unroll
      for (int e = 0; e < COUNT; ++e) run.value[e] = widen(pack.value[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      if (first + e < length) run.value[e] = widen(row[first + e]);
    }
  }
  return run;
}

template <class T, int COUNT>
__device__ __forceinline__ void store_run(const Run<COUNT>& run, T* row, int64_t first, int64_t length, bool packed) {
  if (packed) {
    if (first < length) {
      Pack<T, COUNT> pack;
#pragma unroll
      for (int e = 0; e < COUNT; ++e) narrow(run.value[e], pack.value[e]);
      store_pack(pack, row + first);
    }
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      if (first + e < length) narrow(run.value[e], row[first + e]);
    }
  }
}

template <class T>
__device__ __forceinline__ Four load_four(const T* row, int64_t first, int64_t length, bool packed) {
  return load_run<kFour>(row, first, length, packed);
}

template <class T>
__device__ __forceinline__ void store_four(const Four& four, T* row, int64_t first, int64_t length, bool packed) {
  store_run(four, row, first, length, packed);
}

}  // namespace calm_rt
