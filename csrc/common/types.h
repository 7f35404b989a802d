// Element types that a kernel reads and writes, with their conversions to and from float. No torch, no CUDA headers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define CALM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CALM_HOST_DEVICE inline __attribute__((always_inline))  // one copy per instruction set, never a shared one
#endif

namespace calm_rt {

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using AccumulateType = typename Accumulate<T>::type;  // what sums of T are kept in

}  // namespace calm_rt
