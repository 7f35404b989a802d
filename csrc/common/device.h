// Where a launch runs. The op fills one of these; the kernel file uses it and knows nothing else of its surroundings.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace calm_rt {

struct Cpu {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  // runs body over [0, count) in ranges of at least `grain`, on torch's threads
  void (*parallel_for)(int64_t count, int64_t grain, Body body, const void* context);
};

struct Cuda {
  cudaStream_t stream;
};

}  // namespace calm_rt
