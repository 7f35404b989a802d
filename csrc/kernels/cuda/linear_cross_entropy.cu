// Cross-entropy on the GPU.
//
// row_losses_kernel: a block owns a row, a thread eight consecutive logits at a time. One read gives the maximum and
// the sum of exponentials: a thread keeps both for what it has seen, and where the maximum rises the sum shrinks. The
// block's maximum puts the threads' sums on one scale. A second read, of a row that L2 mostly still holds, overwrites
// the logits with the gradient. Memory bounds it: 2 reads and 1 write of R*V.
//
// add_product_kernel: a thread owns eight elements. sum_losses_kernel: one block, in one order.
#include <limits>

#include "kernels/cuda/reduce.cuh"
#include "kernels/linear_cross_entropy.h"

namespace calm_rt {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kMaxBlocks = 1 << 14;  // several times what any device holds at once; the rest is strided over
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What a thread knows of the softmax of a row. The maximum starts above -infinity, so that exp(-inf - maximum) is 0.
struct Softmax {
  float maximum = kLowest, sum = 0;  // of exp(logit - maximum)

  __device__ __forceinline__ void add(const Run<kEight>& logits, int64_t count) {
    float larger = maximum;
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (e < count && logits.value[e] > larger) larger = logits.value[e];
    }
    if (larger > maximum) {
      sum *= expf(maximum - larger);
      maximum = larger;
    }
#pragma unroll
    for (int e = 0; e < kEight; ++e) {
      if (e < count) sum += expf(logits.value[e] - maximum);
    }
  }
};

// The logits of one row: calls body(logits of a block, its width, first id, this thread's first element, packed).
template <class T, class Body>
__device__ __forceinline__ void each_run(const RowLosses<T>& p, int64_t row, bool packed, bool last_packed,
                                         const Body& body) {
  for (int64_t first = 0; first < p.vocabulary; first += p.block) {
    const int64_t width = min(p.block, p.vocabulary - first);
    T* logits = p.logits + first * p.num_rows + row * width;
    const bool runs_packed = first + p.block < p.vocabulary ? packed : last_packed;
    for (int64_t i = threadIdx.x * kEight; i < width; i += kThreads * kEight) {
      body(logits, width, first, i, runs_packed);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) row_losses_kernel(RowLosses<T> p, bool packed, bool last_packed) {
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const int64_t target = p.target[row];
    const bool ignored = target == p.ignore_index, known = target >= 0 && target < p.vocabulary;
    float target_logit = kNan;
    if (threadIdx.x == 0 && known) {
      const int64_t first = target / p.block * p.block, width = min(p.block, p.vocabulary - first);
      target_logit = widen(p.logits[first * p.num_rows + row * width + (target - first)]);
    }
    float factor = 0, maximum = 0;
    if (!ignored) {
      Softmax softmax;
      each_run(p, row, packed, last_packed, [&](const T* logits, int64_t width, int64_t, int64_t i, bool runs_packed) {
        softmax.add(load_run<kEight>(logits, i, width, runs_packed), width - i);
      });
      maximum = block_max<kThreads>(softmax.maximum);
      const float sum = block_sum<kThreads>(softmax.sum * expf(softmax.maximum - maximum));
      const float scale = p.scale != nullptr ? p.scale[row] : 1.0f;
      factor = known ? scale / sum : kNan;
      if (threadIdx.x == 0) p.loss[row] = (maximum - target_logit) + logf(sum);
      if (!p.need_grad) continue;
      each_run(p, row, packed, last_packed, [&](T* logits, int64_t width, int64_t first, int64_t i, bool runs_packed) {
        Run<kEight> run = load_run<kEight>(logits, i, width, runs_packed);
#pragma unroll
        for (int e = 0; e < kEight; ++e) {
          run.value[e] = expf(run.value[e] - maximum) * factor;
          if (first + i + e == target) run.value[e] -= scale;
        }
        store_run(run, logits, i, width, runs_packed);
      });
    } else {
      if (threadIdx.x == 0) p.loss[row] = 0;
      if (!p.need_grad) continue;
      each_run(p, row, packed, last_packed, [&](T* logits, int64_t width, int64_t, int64_t i, bool runs_packed) {
        store_run(Run<kEight>{}, logits, i, width, runs_packed);
      });
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_product_kernel(AddProduct<T> p, bool packed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kEight;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  for (int64_t i = begin; i < p.count; i += stride) {
    Run<kEight> run = load_run<kEight>(p.product, i, p.count, packed);
    if (!p.first) {
      const Run<kEight> sum = load_run<kEight>(p.sum, i, p.count, packed);
#pragma unroll
      for (int e = 0; e < kEight; ++e) run.value[e] += sum.value[e];
    }
    store_run(run, p.sum, i, p.count, packed);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_losses_kernel(SumLosses<T> p) {
  CompensatedSum own;
  for (int64_t row = threadIdx.x; row < p.num_rows; row += kThreads) own.add(p.loss[row]);
  const float total = block_sum<kThreads>(own.total());
  if (threadIdx.x == 0) *p.total = total;
}

}  // namespace

template <class T>
void launch(Cuda device, const RowLosses<T>& p) {
  if (p.num_rows == 0) return;
  const int64_t last = p.vocabulary % p.block == 0 ? p.block : p.vocabulary % p.block;
  const T* last_logits = p.logits + (p.vocabulary - last) * p.num_rows;
  launch_kernel("row_losses_kernel", row_losses_kernel<T>, grid_size(p.num_rows, 1, kMaxBlocks), kThreads, device, p,
                is_packed<kEight>(p.logits, p.block), is_packed<kEight>(last_logits, last));
}

template <class T>
void launch(Cuda device, const AddProduct<T>& p) {
  if (p.count == 0) return;
  const bool packed = is_packed<kEight>(p.product, p.count) && is_packed<kEight>(p.sum, p.count);
  launch_kernel("add_product_kernel", add_product_kernel<T>, grid_size(p.count, kThreads * kEight, kMaxBlocks),
                kThreads, device, p, packed);
}

template <class T>
void launch(Cuda device, const SumLosses<T>& p) {
  launch_kernel("sum_losses_kernel", sum_losses_kernel<T>, 1, kThreads, device, p);
}

#define CALM_INSTANTIATE(T)                         \
  template void launch(Cuda, const RowLosses<T>&);  \
  template void launch(Cuda, const AddProduct<T>&); \
  template void launch(Cuda, const SumLosses<T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace calm_rt
