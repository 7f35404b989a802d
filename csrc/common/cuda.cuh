// What a kernel file stands on: CUDA under nvcc, the simulator under a host compiler. No torch.
//
// CALM_SHARED declares a block's shared array; launch_kernel starts a kernel and checks the launch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/types.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CALM_SHARED(T, name, count) __shared__ T name[count]

namespace calm_rt {

// Throws std::runtime_error if the launch was refused; torch's stable ABI hands that to Python as a RuntimeError.
template <class... Parameters>
void launch_kernel(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Cuda device,
                   const std::type_identity_t<Parameters>&... arguments) {
  kernel<<<blocks, threads, 0, device.stream>>>(arguments...);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace calm_rt

#else

#include "simulator/simulator.h"

namespace calm_rt {

template <class... Parameters>
void launch_kernel(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Cuda,
                   const std::type_identity_t<Parameters>&... arguments) {
  simulator::launch(name, blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace calm_rt

#endif

namespace calm_rt {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xFFFFFFFFu;

// Blocks for `count` pieces of work, `each` to a block; kernels stride over what is beyond `most`.
inline unsigned grid_size(int64_t count, int64_t each, int64_t most) {
  return static_cast<unsigned>(std::min((count + each - 1) / each, most));
}

}  // namespace calm_rt
