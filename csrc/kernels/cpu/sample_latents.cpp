// Between the products of the energy head on the CPU: vectors along a line, lines to a thread; sums over lines take
// panels of columns, so that neither the number of threads nor the split of the work moves a bit.
#include "kernels/sample_latents.h"

#include "kernels/cpu/random.h"
#include "kernels/cpu/select.h"

namespace calm_rt {

constexpr int64_t kPanel = 64;  // columns that one thread sums at a time

CALM_EACH_ISA(template <class T> void head_noise_kernel(const HeadNoise<T>& p, int64_t begin, int64_t end);
              template <class T, class Out>
              void layer_norm_kernel(const LayerNorm<T, Out>& p, int64_t begin, int64_t end);
              template <class T> void add_silu_kernel(const AddSilu<T>& p, int64_t begin, int64_t end);
              template <class T> void bias_swiglu_kernel(const BiasSwiGlu<T>& p, int64_t begin, int64_t end);
              template <class T, class Grad>
              void layer_norm_backward_kernel(const LayerNormBackward<T, Grad>& p, int64_t begin, int64_t end);
              template <class T> void add_silu_backward_kernel(const AddSiluBackward<T>& p, int64_t begin, int64_t end);
              template <class T>
              void bias_swiglu_backward_kernel(const BiasSwiGluBackward<T>& p, int64_t begin, int64_t end);
              template <class T> void column_sums_kernel(const ColumnSums<T>& p, int64_t begin, int64_t end);
              template <class T, class Grad>
              void norm_gradients_kernel(const NormGradients<T, Grad>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

// The first `count` of a vector's elements, zeros after them.
template <class Wide, class V>
CALM_INLINE V first_of(V v, int64_t count) {
  if (count == lanes<V>) return v;
  Wide part[lanes<V>];
  store(part, v);
  return load_some<V>(part, count);
}

// What a norm takes, one line of it.
template <class T>
struct Line {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const Wide* x;
  const T *product, *bias;

  CALM_INLINE Line of(const NormInput<T>& input, int64_t line, int64_t size) {
    return {input.x ? input.x + line * size : nullptr, input.product ? input.product + line * size : nullptr,
            input.bias};
  }

  V operator()(int64_t i, int64_t count) const {
    V value{};
    if (x) value = load_some<V>(x + i, count);
    if (product) value += load_some<V>(product + i, count);
    if (bias) value += load_some<V>(bias + i, count);
    return value;
  }

  Wide mean(int64_t size) const {
    const auto scaled_sum = [&](Wide scale) {
      V total{};
      each_run<V>(0, size, [&](int64_t i, int64_t count) { total += (*this)(i, count) * scale; });
      return sum(total);
    };
    const Wide mean = scaled_sum(1) / static_cast<Wide>(size);
    // of numbers near the largest one the sum overflows, where a sum of their shares does not
    return mean - mean == 0 ? mean : scaled_sum(1 / static_cast<Wide>(size));
  }

  // 1 / sqrt(var + eps)
  Wide inverse(Wide mean, int64_t size, double eps) const {
    V squares{};
    each_run<V>(0, size, [&](int64_t i, int64_t count) {
      const V distance = first_of<Wide>((*this)(i, count) - mean, count);
      squares += distance * distance;
    });
    return inverse_root(sum(squares) / static_cast<Wide>(size) + static_cast<Wide>(eps));
  }
};

template <class V>
constexpr int kVectors = kPanel / lanes<V>;  // of a panel

// total[v] = the sum over lines of what add(line, part) adds to part[v], 32 lines at a time, so that long sums lose
// little.
template <class V, int COUNT, class Add>
CALM_INLINE void sum_lines(int64_t lines, V (&total)[COUNT], const Add& add) {
  constexpr int64_t kTogether = 32;
  for (int64_t first = 0; first < lines; first += kTogether) {
    const int64_t last = first + kTogether < lines ? first + kTogether : lines;
    V part[COUNT] = {};
    for (int64_t line = first; line < last; ++line) add(line, part);
    for (int v = 0; v < COUNT; ++v) total[v] += part[v];
  }
}

// Calls body(vector, i, count) for the vectors of a panel.
template <class V, class Body>
CALM_INLINE void each_of_panel(int64_t panel, int64_t columns, const Body& body) {
  for (int v = 0; v < kVectors<V>; ++v) {
    const int64_t i = panel * kPanel + v * lanes<V>, left = columns - i;
    if (left > 0) body(v, i, left < lanes<V> ? left : int64_t{lanes<V>});
  }
}

}  // namespace

template <class T>
void head_noise_kernel(const HeadNoise<T>& p, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  const Keys keys(static_cast<uint64_t>(*p.seed));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t line = p.first_line + i, row = p.rows[line % p.num_rows];
    const uint32_t draw = static_cast<uint32_t>(line / p.num_rows);
    for (int64_t l = 0; l < p.length; l += 4 * lanes<V>) {
      V value[4];
      Wide block[4][lanes<V>];
      uniforms(static_cast<uint32_t>(l / 4), kHead, draw, row, keys, value);
      for (int j = 0; j < 4; ++j) store(block[j], value[j] - static_cast<Wide>(0.5));
      T* out = p.out + i * p.length + l;
      for (int k = 0; k < 4 * lanes<V> && l + k < p.length; ++k) narrow(block[k % 4][k / 4], out + k);
    }
  }
}

template <class T, class Out>
void layer_norm_kernel(const LayerNorm<T, Out>& p, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  for (int64_t r = begin; r < end; ++r) {
    Line<T> input = Line<T>::of(p.input, r, p.size);
    if (p.sum) {
      Wide* total = p.sum + r * p.size;
      each_run<V>(0, p.size, [&](int64_t i, int64_t count) { store_some(total + i, input(i, count), count); });
      input = {total, nullptr, nullptr};
    }
    Out* out = p.out + r * p.size;
    const Wide mean = input.mean(p.size), inverse = input.inverse(mean, p.size, p.eps);
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V normal = (input(i, count) - mean) * inverse;
      store_some(out + i, normal * load_some<V>(p.weight + i, count) + load_some<V>(p.bias + i, count), count);
    });
  }
}

template <class T>
void add_silu_kernel(const AddSilu<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t r = begin; r < end; ++r) {
    const T *product = p.product + r * p.size, *added = p.added + (p.first_line + r) % p.period * p.size;
    T* out = p.out + r * p.size;
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V z = load_some<V>(product + i, count) + load_some<V>(added + i, count);
      store_some(out + i, z * sigmoid(z), count);
    });
  }
}

template <class T>
void bias_swiglu_kernel(const BiasSwiGlu<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t r = begin; r < end; ++r) {
    const T *gates = p.product + 2 * r * p.size, *ups = gates + p.size;
    T* out = p.out + r * p.size;
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V gate = load_some<V>(gates + i, count) + load_some<V>(p.bias + i, count);
      const V up = load_some<V>(ups + i, count) + load_some<V>(p.bias + p.size + i, count);
      store_some(out + i, gate * sigmoid(gate) * up, count);
    });
  }
}

template <class T, class Grad>
void layer_norm_backward_kernel(const LayerNormBackward<T, Grad>& p, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  for (int64_t r = begin; r < end; ++r) {
    const Line<T> input = Line<T>::of(p.input, r, p.size);
    const Wide mean = input.mean(p.size), inverse = input.inverse(mean, p.size, p.eps);
    p.statistics[2 * r] = mean;
    p.statistics[2 * r + 1] = inverse;
    const Grad* grad = p.grad + r * p.size;
    auto weighted = [&](int64_t i, int64_t count) {
      return load_some<V>(grad + i, count) * load_some<V>(p.weight + i, count);
    };
    V slopes{}, turns{};
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V slope = weighted(i, count);
      slopes += slope;
      turns += slope * ((input(i, count) - mean) * inverse);
    });
    const Wide slope_mean = sum(slopes) / static_cast<Wide>(p.size), turn = sum(turns) / static_cast<Wide>(p.size);
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V normal = (input(i, count) - mean) * inverse;
      V out = inverse * (weighted(i, count) - slope_mean - normal * turn);
      if (p.residual) out += load_some<V>(p.residual + r * p.size + i, count);
      if (p.stream) store_some(p.stream + r * p.size + i, out, count);
      if (p.out) store_some(p.out + r * p.size + i, out, count);
    });
  }
}

template <class T>
void add_silu_backward_kernel(const AddSiluBackward<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t r = begin; r < end; ++r) {
    const T *product = p.product + r * p.size, *added = p.added + (p.first_line + r) % p.period * p.size;
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V z = load_some<V>(product + i, count) + load_some<V>(added + i, count);
      const V part = sigmoid(z), value = z * part;
      const V grad = load_some<V>(p.grad + r * p.size + i, count);
      store_some(p.grad_product + r * p.size + i, grad * (part + value * (1 - part)), count);
      store_some(p.out + r * p.size + i, value, count);
    });
  }
}

template <class T>
void bias_swiglu_backward_kernel(const BiasSwiGluBackward<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t r = begin; r < end; ++r) {
    const T *gates = p.product + 2 * r * p.size, *ups = gates + p.size;
    T *grad_gates = p.grad_product + 2 * r * p.size, *grad_ups = grad_gates + p.size;
    each_run<V>(0, p.size, [&](int64_t i, int64_t count) {
      const V gate = load_some<V>(gates + i, count) + load_some<V>(p.bias + i, count);
      const V up = load_some<V>(ups + i, count) + load_some<V>(p.bias + p.size + i, count);
      const V part = sigmoid(gate), value = gate * part, grad = load_some<V>(p.grad + r * p.size + i, count);
      store_some(grad_gates + i, grad * up * (part + value * (1 - part)), count);
      store_some(grad_ups + i, grad * value, count);
      store_some(p.out + r * p.size + i, value * up, count);
    });
  }
}

template <class T>
void column_sums_kernel(const ColumnSums<T>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t panel = begin; panel < end; ++panel) {
    V total[kVectors<V>] = {};
    sum_lines(p.num_lines, total, [&](int64_t line, V(&part)[kVectors<V>]) {
      each_of_panel<V>(panel, p.columns, [&](int v, int64_t i, int64_t count) {
        part[v] += load_some<V>(p.x + line * p.columns + i, count);
      });
    });
    each_of_panel<V>(panel, p.columns,
                     [&](int v, int64_t i, int64_t count) { store_some(p.out + i, total[v], count); });
  }
}

template <class T, class Grad>
void norm_gradients_kernel(const NormGradients<T, Grad>& p, int64_t begin, int64_t end) {
  using V = Vector<AccumulateType<T>>;
  for (int64_t panel = begin; panel < end; ++panel) {
    V total[2 * kVectors<V>] = {};
    sum_lines(p.num_lines, total, [&](int64_t line, V(&part)[2 * kVectors<V>]) {
      const Line<T> input = Line<T>::of(p.input, line, p.size);
      const auto mean = p.statistics[2 * line], inverse = p.statistics[2 * line + 1];
      each_of_panel<V>(panel, p.size, [&](int v, int64_t i, int64_t count) {
        const V grad = load_some<V>(p.grad + line * p.size + i, count);
        part[v] += grad * ((input(i, count) - mean) * inverse);
        part[kVectors<V> + v] += grad;
      });
    });
    each_of_panel<V>(panel, p.size, [&](int v, int64_t i, int64_t count) {
      store_some(p.weight + i, total[v], count);
      store_some(p.bias + i, total[kVectors<V> + v], count);
    });
  }
}

#define CALM_INSTANTIATE(T)                                                                   \
  template void head_noise_kernel(const HeadNoise<T>&, int64_t, int64_t);                     \
  template void layer_norm_kernel(const LayerNorm<T, T>&, int64_t, int64_t);                  \
  template void add_silu_kernel(const AddSilu<T>&, int64_t, int64_t);                         \
  template void bias_swiglu_kernel(const BiasSwiGlu<T>&, int64_t, int64_t);                   \
  template void layer_norm_backward_kernel(const LayerNormBackward<T, T>&, int64_t, int64_t); \
  template void add_silu_backward_kernel(const AddSiluBackward<T>&, int64_t, int64_t);        \
  template void bias_swiglu_backward_kernel(const BiasSwiGluBackward<T>&, int64_t, int64_t);  \
  template void column_sums_kernel(const ColumnSums<T>&, int64_t, int64_t);                   \
  template void norm_gradients_kernel(const NormGradients<T, T>&, int64_t, int64_t);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                                                                       \
  template void layer_norm_kernel(const LayerNorm<T, float>&, int64_t, int64_t);                  \
  template void layer_norm_backward_kernel(const LayerNormBackward<T, float>&, int64_t, int64_t); \
  template void norm_gradients_kernel(const NormGradients<T, float>&, int64_t, int64_t);
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements, about 10 us of work

template <class Params>
void over_lines(Cpu device, void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t size) {
  parallel_rows(device, p.num_lines, 1 + kGrain / (size + 1),
                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class Params>
void over_panels(Cpu device, void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t columns) {
  parallel_rows(device, (columns + kPanel - 1) / kPanel, 1 + kGrain / (kPanel * (p.num_lines + 1)),
                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

template <class T>
void launch(Cpu device, const HeadNoise<T>& p) {
  over_lines(device, CALM_SELECT(head_noise_kernel<T>), p, p.length);
}

template <class T, class Out>
void launch(Cpu device, const LayerNorm<T, Out>& p) {
  over_lines(device, CALM_SELECT(layer_norm_kernel<T, Out>), p, p.size);
}

template <class T>
void launch(Cpu device, const AddSilu<T>& p) {
  over_lines(device, CALM_SELECT(add_silu_kernel<T>), p, p.size);
}

template <class T>
void launch(Cpu device, const BiasSwiGlu<T>& p) {
  over_lines(device, CALM_SELECT(bias_swiglu_kernel<T>), p, p.size);
}

template <class T, class Grad>
void launch(Cpu device, const LayerNormBackward<T, Grad>& p) {
  over_lines(device, CALM_SELECT(layer_norm_backward_kernel<T, Grad>), p, p.size);
}

template <class T>
void launch(Cpu device, const AddSiluBackward<T>& p) {
  over_lines(device, CALM_SELECT(add_silu_backward_kernel<T>), p, p.size);
}

template <class T>
void launch(Cpu device, const BiasSwiGluBackward<T>& p) {
  over_lines(device, CALM_SELECT(bias_swiglu_backward_kernel<T>), p, p.size);
}

template <class T>
void launch(Cpu device, const ColumnSums<T>& p) {
  over_panels(device, CALM_SELECT(column_sums_kernel<T>), p, p.columns);
}

template <class T, class Grad>
void launch(Cpu device, const NormGradients<T, Grad>& p) {
  over_panels(device, CALM_SELECT(norm_gradients_kernel<T, Grad>), p, p.size);
}

#define CALM_INSTANTIATE(T)                                  \
  template void launch(Cpu, const HeadNoise<T>&);            \
  template void launch(Cpu, const LayerNorm<T, T>&);         \
  template void launch(Cpu, const AddSilu<T>&);              \
  template void launch(Cpu, const BiasSwiGlu<T>&);           \
  template void launch(Cpu, const LayerNormBackward<T, T>&); \
  template void launch(Cpu, const AddSiluBackward<T>&);      \
  template void launch(Cpu, const BiasSwiGluBackward<T>&);   \
  template void launch(Cpu, const ColumnSums<T>&);           \
  template void launch(Cpu, const NormGradients<T, T>&);
CALM_INSTANTIATE(float)
CALM_INSTANTIATE(double)
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
#define CALM_INSTANTIATE(T)                                      \
  template void launch(Cpu, const LayerNorm<T, float>&);         \
  template void launch(Cpu, const LayerNormBackward<T, float>&); \
  template void launch(Cpu, const NormGradients<T, float>&);
CALM_INSTANTIATE(bfloat16)
CALM_INSTANTIATE(half)
#undef CALM_INSTANTIATE
#endif

}  // namespace calm_rt
