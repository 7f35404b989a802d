// What a kernel file stands on: CUDA under nvcc, the simulator under a host compiler. No torch.
//
// CALM_SHARED declares a block's shared array, CALM_DYNAMIC_SHARED the bytes that a launch asked for; launch_kernel
// starts a kernel and checks the launch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/types.h"

namespace calm_rt {

// What a launch must know of a device.
struct Chip {
  int capability;  // 10 * major + minor
  int multiprocessors;
};

}  // namespace calm_rt

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CALM_SHARED(T, name, count) __shared__ T name[count]
#define CALM_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace calm_rt {

constexpr size_t kStaticShared = 48 << 10;  // bytes that a block gets without asking

// Throws std::runtime_error if the launch was refused; torch's stable ABI hands that to Python as a RuntimeError.
template <class... Parameters>
void launch_shared_kernel(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                          size_t shared_bytes, Cuda device, const std::type_identity_t<Parameters>&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kStaticShared) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, device.stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// The current device; zeros where it cannot be asked.
inline Chip current_chip() {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? Chip{major * 10 + minor, multiprocessors} : Chip{0, 0};
}

}  // namespace calm_rt

#else

#include "simulator/simulator.h"

namespace calm_rt {

inline Chip current_chip() { return {simulator::capability(), simulator::kMultiprocessors}; }

template <class... Parameters>
void launch_shared_kernel(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                          size_t shared_bytes, Cuda, const std::type_identity_t<Parameters>&... arguments) {
  simulator::launch(name, blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace calm_rt

#endif

namespace calm_rt {

template <class... Parameters>
void launch_kernel(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Cuda device,
                   const std::type_identity_t<Parameters>&... arguments) {
  launch_shared_kernel(name, kernel, blocks, threads, 0, device, arguments...);
}

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;

// Blocks for `count` pieces of work, `each` to a block; kernels stride over what is beyond `most`.
inline unsigned grid_size(int64_t count, int64_t each, int64_t most) {
  return static_cast<unsigned>(std::min((count + each - 1) / each, most));
}

}  // namespace calm_rt
