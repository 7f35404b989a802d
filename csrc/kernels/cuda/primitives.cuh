// The instructions that plain C++ does not name, for the device and for the simulator, and the unit of work built on
// them: four consecutive elements of a row, which one Philox counter makes and one thread reads and writes at once.
#pragma once
#include "common/cuda.cuh"
#include "common/types.h"

namespace calm_rt {

constexpr int kFour = 4;

// One load or store instruction.
template <class T>
struct alignas(kFour * sizeof(T)) Pack {
  T value[kFour];
};

// ---- conversions, packs ----

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

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <class T>
__device__ __forceinline__ void store_pack(const Pack<T>& pack, T* to) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
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

// Not by a cast as on the device: GCC 12 takes its alignment for granted where a kernel may also read single elements.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  simulator::check_aligned(from, alignof(Pack<T>));
  Pack<T> pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(const Pack<T>& pack, T* to) {
  simulator::check_aligned(to, alignof(Pack<T>));
  std::memcpy(to, &pack, sizeof pack);
}

#endif

// ---- four elements ----

struct Four {
  float value[kFour];
};

// Whether the groups of four of a [..., length] tensor can be read and written as packs; true for a null pointer.
template <class T>
bool is_packed(const T* tensor, int64_t length) {
  return length % kFour == 0 && reinterpret_cast<uintptr_t>(tensor) % sizeof(Pack<T>) == 0;
}

// Elements first ... first + 3 of a row, zeros beyond its length.
template <class T>
__device__ __forceinline__ Four load_four(const T* row, int64_t first, int64_t length, bool packed) {
  Four four{};
  if (packed) {
    if (first < length) {
      const Pack<T> pack = load_pack(row + first);
#pragma unroll
      for (int e = 0; e < kFour; ++e) four.value[e] = widen(pack.value[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      if (first + e < length) four.value[e] = widen(row[first + e]);
    }
  }
  return four;
}

template <class T>
__device__ __forceinline__ void store_four(const Four& four, T* row, int64_t first, int64_t length, bool packed) {
  if (packed) {
    if (first < length) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < kFour; ++e) narrow(four.value[e], pack.value[e]);
      store_pack(pack, row + first);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      if (first + e < length) narrow(four.value[e], row[first + e]);
    }
  }
}

}  // namespace calm_rt
