// Random numbers by logical position: one thread makes the four numbers of a Philox counter and writes them at once.
#include "kernels/cuda/random.cuh"
#include "kernels/noise.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 14;

template <class T>
__global__ void __launch_bounds__(kThreads) noise_kernel(Noise<T> p, bool packed) {
  const int64_t groups = (p.length + kFour - 1) / kFour;
  const int64_t count = p.num_draws * p.num_rows * groups;
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const int64_t line = i / groups, group = i % groups;  // line = draw * R + row
    const int64_t draw = line / p.num_rows, row = line % p.num_rows;
    const PhiloxWords words =
        philox(philox_counter(static_cast<uint32_t>(group), p.stream, static_cast<uint32_t>(draw), p.rows[row]), seed);
    const Four four = p.normal ? normal_four(words) : uniform_four(words);
    store_four(four, p.out + line * p.length, group * kFour, p.length, packed);
  }
}

}  // namespace

template <class T>
void launch(Cuda device, const Noise<T>& p) {
  const int64_t count = p.num_draws * p.num_rows * ((p.length + kFour - 1) / kFour);
  if (count == 0) return;
  launch_kernel("noise_kernel", noise_kernel<T>, grid_size(count, kThreads, kMaxBlocks), kThreads, device, p,
                is_packed(p.out, p.length));
}

template void launch(Cuda, const Noise<float>&);

}  // namespace calm_rt
