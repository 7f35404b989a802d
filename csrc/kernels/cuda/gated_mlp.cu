// The residual gated MLP on the GPU. Memory bounds all of these kernels.
//
// rms_norm_kernel: a warp owns a row, a lane eight consecutive elements at a time; the second read comes from L1.
// swiglu_kernel, add_residual_kernel, swiglu_backward_kernel: a thread owns eight elements.
// rms_norm_backward_kernel: a block owns kPartialRows rows; its warps find what a row needs to know of itself, then its
// threads take columns, so that a column's sum over the rows is one thread's.
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/sum_rows.cuh"
#include "kernels/gated_mlp.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 1 << 14;  // several times what any device holds at once; the rest is strided over

// 1 / sqrt(mean(x^2) + eps) of one row, known to all lanes of the warp.
template <class X>
__device__ __forceinline__ float inverse_rms(const X* x, int64_t size, float eps, bool packed) {
  float squares = 0;
  for (int64_t i = threadIdx.x % kWarpSize * kEight; i < size; i += kWarpSize * kEight) {
    const Run<kEight> run = load_run<kEight>(x, i, size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) squares += run.value[e] * run.value[e];
  }
  return rsqrtf(warp_sum(squares) / static_cast<float>(size) + eps);
}

template <class X, class T>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNorm<X, T> p, bool packed) {
  const int64_t warp = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  for (int64_t row = warp; row < p.num_rows; row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const X* x = p.x + row * p.size;
    const float inverse = inverse_rms(x, p.size, static_cast<float>(p.eps), packed);
    for (int64_t i = threadIdx.x % kWarpSize * kEight; i < p.size; i += kWarpSize * kEight) {
      Run<kEight> run = load_run<kEight>(x, i, p.size, packed);
      const Run<kEight> weight = load_run<kEight>(p.weight, i, p.size, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) run.value[e] *= inverse * weight.value[e];
      store_run(run, p.out + row * p.size, i, p.size, packed);
    }
  }
}

// Calls body(first element) for this thread's eights of [0, count).
template <class Body>
__device__ __forceinline__ void each_eight(int64_t count, const Body& body) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kEight;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  for (int64_t i = begin; i < count; i += stride) body(i);
}

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwiGlu<T> p, bool packed) {
  each_eight(p.count, [&](int64_t i) {
    Run<kEight> run = load_run<kEight>(p.gate, i, p.count, packed);
    const Run<kEight> up = load_run<kEight>(p.up, i, p.count, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) run.value[e] *= up.value[e] / (1 + expf(-run.value[e]));
    store_run(run, p.out, i, p.count, packed);
  });
}

template <class X, class T>
__global__ void __launch_bounds__(kThreads) add_residual_kernel(AddResidual<X, T> p, bool packed) {
  each_eight(p.count, [&](int64_t i) {
    Run<kEight> run = load_run<kEight>(p.x, i, p.count, packed);
    const Run<kEight> product = load_run<kEight>(p.product, i, p.count, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) run.value[e] += product.value[e];
    store_run(run, p.out, i, p.count, packed);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwiGluBackward<T> p, bool packed) {
  each_eight(p.count, [&](int64_t i) {
    Run<kEight> gate = load_run<kEight>(p.gate, i, p.count, packed);
    Run<kEight> up = load_run<kEight>(p.up, i, p.count, packed);
    Run<kEight> grad = load_run<kEight>(p.grad_gated, i, p.count, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float share = 1 / (1 + expf(-gate.value[e])), silu = gate.value[e] * share;
      gate.value[e] = grad.value[e] * up.value[e] * (share + silu * (1 - share));
      up.value[e] *= silu;
      grad.value[e] *= silu;
    }
    store_run(gate, p.grad_gate, i, p.count, packed);
    store_run(grad, p.grad_up, i, p.count, packed);
    store_run(up, p.gated, i, p.count, packed);
  });
}

template <class X, class T>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(RmsNormBackward<X, T> p, bool packed) {
  CALM_SHARED(float, inverses, kPartialRows);
  CALM_SHARED(float, means, kPartialRows);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first = blockIdx.x * kPartialRows;
  const int rows = static_cast<int>(p.num_rows - first < kPartialRows ? p.num_rows - first : kPartialRows);
  for (int r = warp; r < rows; r += kWarps) {
    const int64_t row = (first + r) * p.size;
    const float inverse = inverse_rms(p.x + row, p.size, static_cast<float>(p.eps), packed);
    float products = 0;
    for (int64_t i = lane; i < p.size; i += kWarpSize) {
      const float grad = widen(p.grad_normal[0][row + i]) + widen(p.grad_normal[1][row + i]);
      products += p.weight[i] * grad * (widen(p.x[row + i]) * inverse);
    }
    products = warp_sum(products);
    if (lane == 0) inverses[r] = inverse, means[r] = products / static_cast<float>(p.size);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.size; i += kThreads) {
    float total = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t element = (first + r) * p.size + i;
      const float grad = widen(p.grad_normal[0][element]) + widen(p.grad_normal[1][element]);
      const float normal = widen(p.x[element]) * inverses[r];
      total += grad * normal;
      narrow(widen(p.grad_out[element]) + (p.weight[i] * grad - normal * means[r]) * inverses[r], p.grad_x[element]);
    }
    p.partial[blockIdx.x * p.size + i] = total;
  }
}

}  // namespace

template <class X, class T>
void launch(Cuda device, const RmsNorm<X, T>& p) {
  if (p.num_rows == 0) return;
  launch_kernel("rms_norm_kernel", rms_norm_kernel<X, T>, grid_size(p.num_rows, kWarps, kMaxBlocks), kThreads, device,
                p, all_packed(p.size, p.x, p.weight, p.out));
}

template <class T>
void launch(Cuda device, const SwiGlu<T>& p) {
  if (p.count == 0) return;
  launch_kernel("swiglu_kernel", swiglu_kernel<T>, grid_size(p.count, kThreads * kEight, kMaxBlocks), kThreads, device,
                p, all_packed(p.count, p.gate, p.up, p.out));
}

template <class X, class T>
void launch(Cuda device, const AddResidual<X, T>& p) {
  if (p.count == 0) return;
  launch_kernel("add_residual_kernel", add_residual_kernel<X, T>, grid_size(p.count, kThreads * kEight, kMaxBlocks),
                kThreads, device, p, all_packed(p.count, p.x, p.product, p.out));
}

template <class T>
void launch(Cuda device, const SwiGluBackward<T>& p) {
  if (p.count == 0) return;
  const bool packed = all_packed(p.count, p.gate, p.up, p.grad_gated, p.grad_gate, p.grad_up, p.gated);
  launch_kernel("swiglu_backward_kernel", swiglu_backward_kernel<T>, grid_size(p.count, kThreads * kEight, kMaxBlocks),
                kThreads, device, p, packed);
}

template <class X, class T>
void launch(Cuda device, const RmsNormBackward<X, T>& p) {
  if (p.num_rows == 0) return;
  launch_kernel("rms_norm_backward_kernel", rms_norm_backward_kernel<X, T>,
                grid_size(p.num_rows, kPartialRows, INT32_MAX), kThreads, device, p, is_packed<kEight>(p.x, p.size));
}

template <>
void launch(Cuda device, const SumRows<float>& p) {
  if (p.size == 0) return;
  sum_rows(device, PartialRows<float>{p.in, p.out, nullptr, p.num_rows, p.size, p.size});
}

#define CALM_INSTANTIATE(X, T)                          \
  template void launch(Cuda, const RmsNorm<X, T>&);     \
  template void launch(Cuda, const AddResidual<X, T>&); \
  template void launch(Cuda, const RmsNormBackward<X, T>&);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, half)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(float, half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                     \
  template void launch(Cuda, const SwiGlu<T>&); \
  template void launch(Cuda, const SwiGluBackward<T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace calm_rt
