// Between the products of the energy head on the GPU. Memory bounds all of these kernels.
//
// head_noise_kernel: a thread owns the four numbers of a Philox counter.
// layer_norm_kernel and its backward: a warp owns a line, a lane eight consecutive elements at a time; what is read
// more than once comes from L1.
// add_silu_kernel, bias_swiglu_kernel and their backwards: a thread owns eight elements of a line.
// column_sums_kernel, norm_gradients_kernel: blocks share out columns and ranges of lines (column_sums.cuh).
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/random.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/sample_latents.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 1 << 14;  // several times what any device holds at once; the rest is strided over

// Calls body(line, first element) for this thread's runs of EACH elements of all lines.
template <int EACH, class Body>
__device__ __forceinline__ void each_run(int64_t num_lines, int64_t size, const Body& body) {
  const int64_t runs = (size + EACH - 1) / EACH, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_lines * runs; i += stride) {
    body(i / runs, i % runs * EACH);
  }
}

// Calls body(line) for this warp's lines.
template <class Body>
__device__ __forceinline__ void each_line(int64_t num_lines, const Body& body) {
  const int64_t warp = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  for (int64_t line = warp; line < num_lines; line += static_cast<int64_t>(gridDim.x) * kWarps) body(line);
}

// Calls body(first element) for this lane's eights of a line.
template <class Body>
__device__ __forceinline__ void each_eight(int64_t size, const Body& body) {
  for (int64_t i = threadIdx.x % kWarpSize * kEight; i < size; i += kWarpSize * kEight) body(i);
}

__device__ __forceinline__ float sigmoid(float z) { return 1 / (1 + expf(-z)); }

template <class T>
__global__ void __launch_bounds__(kThreads) head_noise_kernel(HeadNoise<T> p, bool packed) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  each_run<kFour>(p.num_lines, p.length, [&](int64_t i, int64_t first) {
    const int64_t line = p.first_line + i, draw = line / p.num_rows, row = p.rows[line % p.num_rows];
    Four four = uniform_four(
        philox(philox_counter(static_cast<uint32_t>(first / kFour), kHead, static_cast<uint32_t>(draw), row), seed));
#pragma unroll
    for (int e = 0; e < kFour; ++e) four.value[e] -= 0.5f;
    store_four(four, p.out + i * p.length, first, p.length, packed);
  });
}

// Eight elements of what a norm takes, zeros beyond the line.
template <class T>
__device__ __forceinline__ Run<kEight> load_input(const NormInput<T>& input, int64_t line, int64_t i, int64_t size,
                                                  bool packed) {
  Run<kEight> run{};
  auto add = [&](const Run<kEight>& term) {
#pragma unroll
    for (int e = 0; e < kEight; ++e) run.value[e] += term.value[e];
  };
  if (input.x) add(load_run<kEight>(input.x + line * size, i, size, packed));
  if (input.product) add(load_run<kEight>(input.product + line * size, i, size, packed));
  if (input.bias) add(load_run<kEight>(input.bias, i, size, packed));
  return run;
}

struct Statistics {
  float mean, inverse;  // 1 / sqrt(var + eps)
};

// Of one line, known to all lanes of the warp.
template <class T>
__device__ __forceinline__ Statistics statistics(const NormInput<T>& input, int64_t line, int64_t size, float eps,
                                                 bool packed) {
  constexpr float kSmall = 0x1p-32f;  // so that the sum does not overflow; bits are lost below 2^-94, where eps rules
  float total = 0, squares = 0;
  each_eight(size, [&](int64_t i) {
    const Run<kEight> run = load_input(input, line, i, size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) total += run.value[e] * kSmall;
  });
  const float mean = warp_sum(total) / static_cast<float>(size) / kSmall;
  each_eight(size, [&](int64_t i) {
    const Run<kEight> run = load_input(input, line, i, size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float distance = i + e < size ? run.value[e] - mean : 0;
      squares += distance * distance;
    }
  });
  return {mean, rsqrtf(warp_sum(squares) / static_cast<float>(size) + eps)};
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads) layer_norm_kernel(LayerNorm<T, Out> p, bool packed) {
  each_line(p.num_lines, [&](int64_t line) {
    NormInput<T> input = p.input;
    if (p.sum) {
      each_eight(p.size, [&](int64_t i) {
        store_run(load_input(p.input, line, i, p.size, packed), p.sum + line * p.size, i, p.size, packed);
      });
      input = {p.sum, nullptr, nullptr};  // a lane reads what it has written
    }
    const Statistics row = statistics(input, line, p.size, static_cast<float>(p.eps), packed);
    each_eight(p.size, [&](int64_t i) {
      Run<kEight> run = load_input(input, line, i, p.size, packed);
      const Run<kEight> weight = load_run<kEight>(p.weight, i, p.size, packed);
      const Run<kEight> bias = load_run<kEight>(p.bias, i, p.size, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        run.value[e] = (run.value[e] - row.mean) * row.inverse * weight.value[e] + bias.value[e];
      }
      store_run(run, p.out + line * p.size, i, p.size, packed);
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_silu_kernel(AddSilu<T> p, bool packed) {
  each_run<kEight>(p.num_lines, p.size, [&](int64_t line, int64_t i) {
    const int64_t other = (p.first_line + line) % p.period;
    Run<kEight> run = load_run<kEight>(p.product + line * p.size, i, p.size, packed);
    const Run<kEight> added = load_run<kEight>(p.added + other * p.size, i, p.size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float z = run.value[e] + added.value[e];
      run.value[e] = z * sigmoid(z);
    }
    store_run(run, p.out + line * p.size, i, p.size, packed);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) bias_swiglu_kernel(BiasSwiGlu<T> p, bool packed) {
  each_run<kEight>(p.num_lines, p.size, [&](int64_t line, int64_t i) {
    const T *gates = p.product + 2 * line * p.size, *ups = gates + p.size;
    Run<kEight> gate = load_run<kEight>(gates, i, p.size, packed);
    const Run<kEight> up = load_run<kEight>(ups, i, p.size, packed);
    const Run<kEight> gate_bias = load_run<kEight>(p.bias, i, p.size, packed);
    const Run<kEight> up_bias = load_run<kEight>(p.bias + p.size, i, p.size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float z = gate.value[e] + gate_bias.value[e];
      gate.value[e] = z * sigmoid(z) * (up.value[e] + up_bias.value[e]);
    }
    store_run(gate, p.out + line * p.size, i, p.size, packed);
  });
}

template <class T, class Grad>
__global__ void __launch_bounds__(kThreads) layer_norm_backward_kernel(LayerNormBackward<T, Grad> p, bool packed) {
  each_line(p.num_lines, [&](int64_t line) {
    const Statistics row = statistics(p.input, line, p.size, static_cast<float>(p.eps), packed);
    if (threadIdx.x % kWarpSize == 0) {
      p.statistics[2 * line] = row.mean;
      p.statistics[2 * line + 1] = row.inverse;
    }
    // of eight elements: the norm before its weight, and the gradient behind it
    auto load = [&](int64_t i, Run<kEight>& normal, Run<kEight>& slope) {
      normal = load_input(p.input, line, i, p.size, packed);
      slope = load_run<kEight>(p.grad + line * p.size, i, p.size, packed);
      const Run<kEight> weight = load_run<kEight>(p.weight, i, p.size, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        normal.value[e] = (normal.value[e] - row.mean) * row.inverse;
        slope.value[e] *= weight.value[e];
      }
    };
    float slopes = 0, turns = 0;
    each_eight(p.size, [&](int64_t i) {
      Run<kEight> normal, slope;
      load(i, normal, slope);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        slopes += slope.value[e];
        turns += slope.value[e] * normal.value[e];
      }
    });
    const float slope_mean = warp_sum(slopes) / static_cast<float>(p.size);
    const float turn = warp_sum(turns) / static_cast<float>(p.size);
    each_eight(p.size, [&](int64_t i) {
      Run<kEight> normal, out, residual{};
      load(i, normal, out);
      if (p.residual) residual = load_run<kEight>(p.residual + line * p.size, i, p.size, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) {
        out.value[e] = row.inverse * (out.value[e] - slope_mean - normal.value[e] * turn) + residual.value[e];
      }
      if (p.stream) store_run(out, p.stream + line * p.size, i, p.size, packed);
      if (p.out) store_run(out, p.out + line * p.size, i, p.size, packed);
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_silu_backward_kernel(AddSiluBackward<T> p, bool packed) {
  each_run<kEight>(p.num_lines, p.size, [&](int64_t line, int64_t i) {
    const int64_t other = (p.first_line + line) % p.period;
    Run<kEight> value = load_run<kEight>(p.product + line * p.size, i, p.size, packed);
    Run<kEight> grad = load_run<kEight>(p.grad + line * p.size, i, p.size, packed);
    const Run<kEight> added = load_run<kEight>(p.added + other * p.size, i, p.size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float z = value.value[e] + added.value[e], part = sigmoid(z);
      value.value[e] = z * part;
      grad.value[e] *= part + value.value[e] * (1 - part);
    }
    store_run(grad, p.grad_product + line * p.size, i, p.size, packed);
    store_run(value, p.out + line * p.size, i, p.size, packed);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) bias_swiglu_backward_kernel(BiasSwiGluBackward<T> p, bool packed) {
  each_run<kEight>(p.num_lines, p.size, [&](int64_t line, int64_t i) {
    const T *gates = p.product + 2 * line * p.size, *ups = gates + p.size;
    T* grads = p.grad_product + 2 * line * p.size;
    Run<kEight> gate = load_run<kEight>(gates, i, p.size, packed);
    Run<kEight> up = load_run<kEight>(ups, i, p.size, packed);
    Run<kEight> grad = load_run<kEight>(p.grad + line * p.size, i, p.size, packed);
    const Run<kEight> gate_bias = load_run<kEight>(p.bias, i, p.size, packed);
    const Run<kEight> up_bias = load_run<kEight>(p.bias + p.size, i, p.size, packed);
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      const float z = gate.value[e] + gate_bias.value[e], part = sigmoid(z), value = z * part;
      const float other = up.value[e] + up_bias.value[e];
      gate.value[e] = grad.value[e] * other * (part + value * (1 - part));
      up.value[e] = grad.value[e] * value;
      grad.value[e] = value * other;
    }
    store_run(gate, grads, i, p.size, packed);
    store_run(up, grads + p.size, i, p.size, packed);
    store_run(grad, p.out + line * p.size, i, p.size, packed);
  });
}

// What norm_gradients_kernel may count on, to read several lines at once: in packs, x alone, or no x but a product.
enum class Terms { kAny, kStream, kProduct };

template <class T, class Grad, Terms TERMS>
__global__ void __launch_bounds__(kSumThreads, TERMS == Terms::kAny ? 1 : kSumBlocks)
    norm_gradients_kernel(NormGradients<T, Grad> p, LineShares shares) {
  struct Line {
    Run<kEight> input, grad;
    float mean, inverse;
  };
  constexpr bool kPacked = TERMS != Terms::kAny;
  const SumShare share(shares, p.num_lines, p.size);
  const int64_t column = share.own_column();
  Run<kEight> bias{};
  if (TERMS == Terms::kProduct && p.input.bias) bias = load_run<kEight>(p.input.bias, column, p.size, kPacked);
  const auto load = [&](const auto* lines, int64_t line) {
    return load_run<kEight>(lines + line * p.size, column, p.size, kPacked);
  };
  float sum[2][kEight] = {};
  share.each_line<kPacked ? 2 : 1>(
      [&](int64_t line) {
        Run<kEight> input;
        if constexpr (TERMS == Terms::kAny) input = load_input(p.input, line, column, p.size, kPacked);
        if constexpr (TERMS == Terms::kStream) input = load(p.input.x, line);
        if constexpr (TERMS == Terms::kProduct) input = load(p.input.product, line);
        return Line{input, load(p.grad, line), p.statistics[2 * line], p.statistics[2 * line + 1]};
      },
      [&](const Line& line) {
#pragma unroll
        for (int e = 0; e < kEight; ++e) {
          float value = line.input.value[e];
          if (TERMS == Terms::kProduct) value += bias.value[e];
          sum[0][e] += line.grad.value[e] * ((value - line.mean) * line.inverse);
          sum[1][e] += line.grad.value[e];
        }
      });
  share.store(sum, {p.weight, p.bias}, p.partial);
}

// Whether all of a norm's input can be read as packs of eight.
template <class T>
bool input_packed(int64_t size, const NormInput<T>& input) {
  return all_packed(size, input.x, input.product, input.bias);
}

unsigned blocks_of_runs(int64_t num_lines, int64_t size, int each) {
  return grid_size(num_lines * ((size + each - 1) / each), kThreads, kMaxBlocks);
}

}  // namespace

template <class T>
void launch(Cuda device, const HeadNoise<T>& p) {
  if (p.num_lines * p.length == 0) return;
  launch_kernel("head_noise_kernel", head_noise_kernel<T>, blocks_of_runs(p.num_lines, p.length, kFour), kThreads,
                device, p, is_packed(p.out, p.length));
}

template <class T, class Out>
void launch(Cuda device, const LayerNorm<T, Out>& p) {
  if (p.num_lines == 0) return;
  const bool packed = input_packed(p.size, p.input) && all_packed(p.size, p.sum, p.weight, p.bias, p.out);
  launch_kernel("layer_norm_kernel", layer_norm_kernel<T, Out>, grid_size(p.num_lines, kWarps, kMaxBlocks), kThreads,
                device, p, packed);
}

template <class T>
void launch(Cuda device, const AddSilu<T>& p) {
  if (p.num_lines * p.size == 0) return;
  launch_kernel("add_silu_kernel", add_silu_kernel<T>, blocks_of_runs(p.num_lines, p.size, kEight), kThreads, device, p,
                all_packed(p.size, p.product, p.added, p.out));
}

template <class T>
void launch(Cuda device, const BiasSwiGlu<T>& p) {
  if (p.num_lines * p.size == 0) return;
  launch_kernel("bias_swiglu_kernel", bias_swiglu_kernel<T>, blocks_of_runs(p.num_lines, p.size, kEight), kThreads,
                device, p, all_packed(p.size, p.product, p.bias, p.out));
}

template <class T, class Grad>
void launch(Cuda device, const LayerNormBackward<T, Grad>& p) {
  if (p.num_lines == 0) return;
  const bool packed =
      input_packed(p.size, p.input) && all_packed(p.size, p.weight, p.grad, p.residual, p.stream, p.out);
  launch_kernel("layer_norm_backward_kernel", layer_norm_backward_kernel<T, Grad>,
                grid_size(p.num_lines, kWarps, kMaxBlocks), kThreads, device, p, packed);
}

template <class T>
void launch(Cuda device, const AddSiluBackward<T>& p) {
  if (p.num_lines * p.size == 0) return;
  launch_kernel("add_silu_backward_kernel", add_silu_backward_kernel<T>, blocks_of_runs(p.num_lines, p.size, kEight),
                kThreads, device, p, all_packed(p.size, p.product, p.added, p.grad, p.grad_product, p.out));
}

template <class T>
void launch(Cuda device, const BiasSwiGluBackward<T>& p) {
  if (p.num_lines * p.size == 0) return;
  launch_kernel("bias_swiglu_backward_kernel", bias_swiglu_backward_kernel<T>,
                blocks_of_runs(p.num_lines, p.size, kEight), kThreads, device, p,
                all_packed(p.size, p.product, p.bias, p.grad, p.grad_product, p.out));
}

template <class T>
void launch(Cuda device, const ColumnSums<T>& p) {
  if (p.columns == 0) return;
  const LineShares shares(p.num_lines, p.columns);
  launch_kernel("column_sums_kernel",
                all_packed(p.columns, p.x) ? column_sums_kernel<T, true> : column_sums_kernel<T, false>,
                grid_size(shares.num_ranges * shares.tiles, 1, INT32_MAX), kSumThreads, device, p, shares);
  if (shares.num_ranges > 1) {
    sum_rows(device, PartialRows<T>{p.partial, p.out, nullptr, shares.num_ranges, p.columns, p.columns});
  }
}

template <class T, class Grad>
void launch(Cuda device, const NormGradients<T, Grad>& p) {
  if (p.size == 0) return;
  const LineShares shares(p.num_lines, p.size);
  auto kernel = norm_gradients_kernel<T, Grad, Terms::kAny>;
  if (input_packed(p.size, p.input) && all_packed(p.size, p.grad)) {
    if (!p.input.product && !p.input.bias) kernel = norm_gradients_kernel<T, Grad, Terms::kStream>;
    if (!p.input.x) kernel = norm_gradients_kernel<T, Grad, Terms::kProduct>;
  }
  launch_kernel("norm_gradients_kernel", kernel, grid_size(shares.num_ranges * shares.tiles, 1, INT32_MAX), kSumThreads,
                device, p, shares);
  if (shares.num_ranges > 1) {
    sum_rows(device, PartialRows<float>{p.partial, p.weight, p.bias, shares.num_ranges, 2 * p.size, p.size});
  }
}

#define CALM_INSTANTIATE(T)                                   \
  template void launch(Cuda, const HeadNoise<T>&);            \
  template void launch(Cuda, const LayerNorm<T, T>&);         \
  template void launch(Cuda, const AddSilu<T>&);              \
  template void launch(Cuda, const BiasSwiGlu<T>&);           \
  template void launch(Cuda, const LayerNormBackward<T, T>&); \
  template void launch(Cuda, const AddSiluBackward<T>&);      \
  template void launch(Cuda, const BiasSwiGluBackward<T>&);   \
  template void launch(Cuda, const ColumnSums<T>&);           \
  template void launch(Cuda, const NormGradients<T, T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                                       \
  template void launch(Cuda, const LayerNorm<T, float>&);         \
  template void launch(Cuda, const LayerNormBackward<T, float>&); \
  template void launch(Cuda, const NormGradients<T, float>&);
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace calm_rt
