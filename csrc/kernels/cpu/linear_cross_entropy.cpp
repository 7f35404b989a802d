// Cross-entropy on the CPU: rows are independent; one row's logits are read for the maximum, for the sum of
// exponentials, and to be overwritten. Exponentials are summed in vectors within a block and in double across blocks.
#include "kernels/linear_cross_entropy.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(template <class T> void row_losses_kernel(const RowLosses<T>& p, int64_t begin, int64_t end);
              template <class T> void add_product_kernel(const AddProduct<T>& p, int64_t begin, int64_t end);
              template <class T> void widen_values_kernel(const WidenValues<T>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

constexpr double kNan = __builtin_nan(""), kInfinity = __builtin_inf();

// Calls body(vector, where, count) for all of [data, data + size): the vector holds `count` elements and then -inf.
template <class V, class T, class Body>
CALM_INLINE void each_vector(T* data, int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<V> <= size; i += lanes<V>) body(load(data + i), data + i, lanes<V>);
  if (i == size) return;
  T tail[lanes<V>];
  for (T& element : tail) narrow(static_cast<AccumulateType<T>>(-kInfinity), &element);
  std::memcpy(tail, data + i, static_cast<size_t>(size - i) * sizeof(T));
  body(load(tail), data + i, size - i);
}

// The logits of one row.
template <class T>
struct LogitRow {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const RowLosses<T>& p;
  int64_t r;

  // Calls body(first element, size) for the row's part of every block.
  template <class Body>
  void each_block(const Body& body) const {
    for (int64_t first = 0; first < p.vocabulary; first += p.block) {
      const int64_t width = p.vocabulary - first < p.block ? p.vocabulary - first : p.block;
      body(p.logits + first * p.num_rows + r * width, width);
    }
  }

  T* logit(int64_t id) const {
    const int64_t first = id / p.block * p.block;
    const int64_t width = p.vocabulary - first < p.block ? p.vocabulary - first : p.block;
    return p.logits + first * p.num_rows + r * width + (id - first);
  }

  void run() const {
    const int64_t target = p.target[r];
    if (target == p.ignore_index) {
      p.loss[r] = 0;
      if (p.need_grad) each_block([](T* logits, int64_t width) { std::memset(logits, 0, width * sizeof(T)); });
      return;
    }
    V most = splat<V>(static_cast<Wide>(-kInfinity));  // a NaN is never the largest, but the sum will be NaN
    each_block([&](T* logits, int64_t width) {
      each_vector<V>(logits, width, [&](V x, T*, int64_t) { most = larger(x, most); });
    });
    const Wide maximum = largest(most);
    double total = 0;
    each_block([&](T* logits, int64_t width) {
      V sums{};
      each_vector<V>(logits, width, [&](V x, T*, int64_t) { sums += exponential(x - maximum); });
      total += static_cast<double>(sum(sums));
    });
    const bool known = target >= 0 && target < p.vocabulary;
    const double distance = known ? static_cast<double>(widen(*logit(target))) - static_cast<double>(maximum) : kNan;
    p.loss[r] = static_cast<Wide>(__builtin_log(total) - distance);
    if (!p.need_grad) return;

    const double scale = p.scale ? static_cast<double>(p.scale[r]) : 1;
    const V factor = splat<V>(static_cast<Wide>(known ? scale / total : kNan));
    each_block([&](T* logits, int64_t width) {
      each_vector<V>(logits, width,
                     [&](V x, T* to, int64_t count) { store_some(to, exponential(x - maximum) * factor, count); });
    });
    if (known) narrow(static_cast<Wide>(scale * (__builtin_exp(distance) / total - 1)), logit(target));
  }
};

}  // namespace

template <class T>
void row_losses_kernel(const RowLosses<T>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) LogitRow<T>{p, r}.run();
}

template <class T>
void add_product_kernel(const AddProduct<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  int64_t i = begin;
  for (; i + lanes<V> <= end; i += lanes<V>) {
    const V product = load(p.product + i);
    store(p.sum + i, p.first ? product : load(p.sum + i) + product);
  }
  for (; i < end; ++i) p.sum[i] = p.first ? widen(p.product[i]) : p.sum[i] + widen(p.product[i]);
}

template <class T>
void widen_values_kernel(const WidenValues<T>& p, int64_t begin, int64_t end) {
  each_run<Float>(begin, end,
                  [&](int64_t i, int64_t count) { store_some(p.out + i, load_some<Float>(p.in + i, count), count); });
}
template void widen_values_kernel(const WidenValues<bfloat16>&, int64_t, int64_t);
template void widen_values_kernel(const WidenValues<half>&, int64_t, int64_t);

#define CALM_INSTANTIATE(T)                                               \
  template void row_losses_kernel(const RowLosses<T>&, int64_t, int64_t); \
  template void add_product_kernel(const AddProduct<T>&, int64_t, int64_t);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
template <class T>
void launch(Cpu device, const RowLosses<T>& p) {
  const int64_t grain = 1 + 8192 / p.vocabulary;  // about 20 us of work
  parallel_rows(device, p.num_rows, grain,
                [&](int64_t begin, int64_t end) { CALM_SELECT(row_losses_kernel<T>)(p, begin, end); });
}

template <class T>
void launch(Cpu device, const AddProduct<T>& p) {
  parallel_rows(device, p.count, 1 << 16,
                [&](int64_t begin, int64_t end) { CALM_SELECT(add_product_kernel<T>)(p, begin, end); });
}

template <class T>
void launch(Cpu device, const WidenValues<T>& p) {
  parallel_rows(device, p.count, 1 << 16,
                [&](int64_t begin, int64_t end) { CALM_SELECT(widen_values_kernel<T>)(p, begin, end); });
}
template void launch(Cpu, const WidenValues<bfloat16>&);
template void launch(Cpu, const WidenValues<half>&);

template <class T>
void launch(Cpu, const SumLosses<T>& p) {
  double total = 0;
  for (int64_t r = 0; r < p.num_rows; ++r) total += static_cast<double>(p.loss[r]);
  *p.total = static_cast<AccumulateType<T>>(total);
}

#define CALM_INSTANTIATE(T)                        \
  template void launch(Cpu, const RowLosses<T>&);  \
  template void launch(Cpu, const AddProduct<T>&); \
  template void launch(Cpu, const SumLosses<T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
#endif

}  // namespace calm_rt
