// The residual gated MLP on the CPU: vectors along a row, rows or ranges of elements to a thread.
#include "kernels/gated_mlp.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(template <class X, class T> void rms_norm_kernel(const RmsNorm<X, T>& p, int64_t begin, int64_t end);
              template <class T> void swiglu_kernel(const SwiGlu<T>& p, int64_t begin, int64_t end);
              template <class X, class T>
              void add_residual_kernel(const AddResidual<X, T>& p, int64_t begin, int64_t end);
              template <class T> void swiglu_backward_kernel(const SwiGluBackward<T>& p, int64_t begin, int64_t end);
              template <class X, class T>
              void rms_norm_backward_kernel(const RmsNormBackward<X, T>& p, int64_t begin, int64_t end);
              template <class Wide> void sum_rows_kernel(const SumRows<Wide>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps) of one row.
template <class X>
CALM_INLINE AccumulateType<X> inverse_rms(const X* x, int64_t size, double eps) {
  using Wide = AccumulateType<X>;
  using V = Vector<Wide>;
  V squares{};
  each_run<V>(0, size, [&](int64_t i, int64_t count) {
    const V value = load_some<V>(x + i, count);
    squares += value * value;
  });
  return inverse_root(sum(squares) / static_cast<Wide>(size) + static_cast<Wide>(eps));
}

}  // namespace

template <class X, class T>
void rms_norm_kernel(const RmsNorm<X, T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<X>>;
  for (int64_t r = begin; r < end; ++r) {
    const X* x = p.x + r * p.size;
    T* out = p.out + r * p.size;
    const auto inverse = inverse_rms(x, p.size, p.eps);
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      store_some(out + i, load_some<V>(x + i, count) * inverse * load_some<V>(p.weight + i, count), count);
    });
  }
}

template <class T>
void swiglu_kernel(const SwiGlu<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  each_run<V>(begin, end, [&](int64_t i, int64_t count) {
    const V gate = load_some<V>(p.gate + i, count);
    store_some(p.out + i, gate * sigmoid(gate) * load_some<V>(p.up + i, count), count);
  });
}

template <class X, class T>
void add_residual_kernel(const AddResidual<X, T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<X>>;
  each_run<V>(begin, end, [&](int64_t i, int64_t count) {
    store_some(p.out + i, load_some<V>(p.x + i, count) + load_some<V>(p.product + i, count), count);
  });
}

template <class T>
void swiglu_backward_kernel(const SwiGluBackward<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  each_run<V>(begin, end, [&](int64_t i, int64_t count) {
    const V gate = load_some<V>(p.gate + i, count), up = load_some<V>(p.up + i, count);
    const V grad = load_some<V>(p.grad_gated + i, count);
    const V share = sigmoid(gate), silu = gate * share;
    store_some(p.grad_gate + i, grad * up * (share + silu * (1 - share)), count);
    store_some(p.grad_up + i, grad * silu, count);
    store_some(p.gated + i, silu * up, count);
  });
}

// begin and end count partial sums.
template <class X, class T>
void rms_norm_backward_kernel(const RmsNormBackward<X, T>& p, int64_t begin, int64_t end) {
  using Wide = AccumulateType<X>;
  using V = Vector<Wide>;
  for (int64_t block = begin; block < end; ++block) {
    Wide* partial = p.partial + block * p.size;
    for (int64_t i = 0; i < p.size; ++i) partial[i] = 0;
    const int64_t last = (block + 1) * kPartialRows < p.num_rows ? (block + 1) * kPartialRows : p.num_rows;
    for (int64_t r = block * kPartialRows; r < last; ++r) {
      const int64_t row = r * p.size;
      const Wide inverse = inverse_rms(p.x + row, p.size, p.eps);
      const auto grad_normal = [&](int64_t i, int64_t count) {
        return load_some<V>(p.grad_normal[0] + row + i, count) + load_some<V>(p.grad_normal[1] + row + i, count);
      };
      V products{};
      each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
        const V normal = load_some<V>(p.x + row + i, count) * inverse, grad = grad_normal(i, count);
        store_some(partial + i, load_some<V>(partial + i, count) + grad * normal, count);
        products += load_some<V>(p.weight + i, count) * grad * normal;
      });
      const Wide mean = sum(products) / static_cast<Wide>(p.size);
      each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
        const V normal = load_some<V>(p.x + row + i, count) * inverse;
        const V grad = load_some<V>(p.weight + i, count) * grad_normal(i, count) - normal * mean;
        store_some(p.grad_x + row + i, load_some<V>(p.grad_out + row + i, count) + grad * inverse, count);
      });
    }
  }
}

// begin and end count columns.
template <class Wide>
void sum_rows_kernel(const SumRows<Wide>& p, int64_t begin, int64_t end) {
  using V = Vector<Wide>;
  each_run<V>(begin, end, [&](int64_t i, int64_t count) {
    V total{};
    for (int64_t r = 0; r < p.num_rows; ++r) total += load_some<V>(p.in + r * p.size + i, count);
    store_some(p.out + i, total, count);
  });
}

#define CALM_INSTANTIATE(X, T)                                                   \
  template void rms_norm_kernel(const RmsNorm<X, T>&, int64_t, int64_t);         \
  template void add_residual_kernel(const AddResidual<X, T>&, int64_t, int64_t); \
  template void rms_norm_backward_kernel(const RmsNormBackward<X, T>&, int64_t, int64_t);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(double, double)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, half)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(float, half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                                        \
  template void swiglu_kernel(const SwiGlu<T>&, int64_t, int64_t); \
  template void swiglu_backward_kernel(const SwiGluBackward<T>&, int64_t, int64_t);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
template void sum_rows_kernel(const SumRows<float>&, int64_t, int64_t);
template void sum_rows_kernel(const SumRows<double>&, int64_t, int64_t);

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
constexpr int64_t kGrain = 1 << 14;  // elements, about 10 us of work

template <class X, class T>
void launch(Cpu device, const RmsNorm<X, T>& p) {
  parallel_rows(device, p.num_rows, 1 + kGrain / (p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(rms_norm_kernel<X, T>)(p, begin, end); });
}

template <class T>
void launch(Cpu device, const SwiGlu<T>& p) {
  parallel_rows(device, p.count, kGrain,
                [&](int64_t begin, int64_t end) { CALM_SELECT(swiglu_kernel<T>)(p, begin, end); });
}

template <class X, class T>
void launch(Cpu device, const AddResidual<X, T>& p) {
  parallel_rows(device, p.count, kGrain,
                [&](int64_t begin, int64_t end) { CALM_SELECT(add_residual_kernel<X, T>)(p, begin, end); });
}

template <class T>
void launch(Cpu device, const SwiGluBackward<T>& p) {
  parallel_rows(device, p.count, kGrain,
                [&](int64_t begin, int64_t end) { CALM_SELECT(swiglu_backward_kernel<T>)(p, begin, end); });
}

template <class X, class T>
void launch(Cpu device, const RmsNormBackward<X, T>& p) {
  parallel_rows(device, (p.num_rows + kPartialRows - 1) / kPartialRows, 1 + kGrain / (kPartialRows * p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(rms_norm_backward_kernel<X, T>)(p, begin, end); });
}

template <class Wide>
void launch(Cpu device, const SumRows<Wide>& p) {
  parallel_rows(device, p.size, 64 + kGrain / (p.num_rows + 1) / 64 * 64,
                [&](int64_t begin, int64_t end) { CALM_SELECT(sum_rows_kernel<Wide>)(p, begin, end); });
}

#define CALM_INSTANTIATE(X, T)                         \
  template void launch(Cpu, const RmsNorm<X, T>&);     \
  template void launch(Cpu, const AddResidual<X, T>&); \
  template void launch(Cpu, const RmsNormBackward<X, T>&);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(double, double)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, half)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(float, half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                    \
  template void launch(Cpu, const SwiGlu<T>&); \
  template void launch(Cpu, const SwiGluBackward<T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
template void launch(Cpu, const SumRows<float>&);
template void launch(Cpu, const SumRows<double>&);
#endif

}  // namespace calm_rt
