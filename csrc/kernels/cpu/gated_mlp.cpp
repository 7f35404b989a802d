// The residual gated MLP on the CPU: vectors along a row, rows or ranges of elements to a thread.
#include "kernels/gated_mlp.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(template <class X, class T> void rms_norm_kernel(const RmsNorm<X, T>& p, int64_t begin, int64_t end);
              template <class T> void swiglu_kernel(const SwiGlu<T>& p, int64_t begin, int64_t end);
              template <class X, class T>
              void add_residual_kernel(const AddResidual<X, T>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

CALM_INLINE float inverse_root(float x) { return 1 / __builtin_sqrtf(x); }
CALM_INLINE double inverse_root(double x) { return 1 / __builtin_sqrt(x); }

template <class V>
CALM_INLINE V sigmoid(V z) {
  return 1 / (1 + exponential(-z));
}

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

#define CALM_INSTANTIATE(X, T)                                           \
  template void rms_norm_kernel(const RmsNorm<X, T>&, int64_t, int64_t); \
  template void add_residual_kernel(const AddResidual<X, T>&, int64_t, int64_t);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(double, double)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, half)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(float, half)
#undef CALM_INSTANTIATE
template void swiglu_kernel(const SwiGlu<float>&, int64_t, int64_t);
template void swiglu_kernel(const SwiGlu<double>&, int64_t, int64_t);
template void swiglu_kernel(const SwiGlu<bfloat16>&, int64_t, int64_t);
template void swiglu_kernel(const SwiGlu<half>&, int64_t, int64_t);

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

#define CALM_INSTANTIATE(X, T)                     \
  template void launch(Cpu, const RmsNorm<X, T>&); \
  template void launch(Cpu, const AddResidual<X, T>&);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(double, double)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, half)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(float, half)
#undef CALM_INSTANTIATE
template void launch(Cpu, const SwiGlu<float>&);
template void launch(Cpu, const SwiGlu<double>&);
template void launch(Cpu, const SwiGlu<bfloat16>&);
template void launch(Cpu, const SwiGlu<half>&);
#endif

}  // namespace calm_rt
