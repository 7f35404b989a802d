// Sums of table rows on the CPU: a vector of columns at a time, so that each output is written once.
#include "kernels/encode.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(template <class T> void gather_sum_kernel(const GatherSum<T>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {

template <class T>
void gather_sum_kernel(const GatherSum<T>& p, int64_t begin, int64_t end) {
  using Wide = AccumulateType<T>;
  using V = Vector<Wide>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* ids = p.ids + r * p.num_tables;
    T* out = p.out + r * p.size;
    bool known = true;
    for (int64_t j = 0; j < p.num_tables; ++j) known &= ids[j] >= 0 && ids[j] < p.vocabulary;
    if (!known) {
      for (int64_t l = 0; l < p.size; ++l) narrow(static_cast<Wide>(__builtin_nan("")), out + l);
      continue;
    }
    const auto row = [&](int64_t j) { return p.tables + (j * p.vocabulary + ids[j]) * p.size; };
    int64_t l = 0;
    for (; l + lanes<V> <= p.size; l += lanes<V>) {
      V total = load(row(0) + l);
      for (int64_t j = 1; j < p.num_tables; ++j) total += load(row(j) + l);
      store(out + l, total);
    }
    for (; l < p.size; ++l) {
      Wide total = widen(row(0)[l]);
      for (int64_t j = 1; j < p.num_tables; ++j) total += widen(row(j)[l]);
      narrow(total, out + l);
    }
  }
}

template void gather_sum_kernel(const GatherSum<float>&, int64_t, int64_t);
template void gather_sum_kernel(const GatherSum<double>&, int64_t, int64_t);
template void gather_sum_kernel(const GatherSum<bfloat16>&, int64_t, int64_t);
template void gather_sum_kernel(const GatherSum<half>&, int64_t, int64_t);

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
template <class T>
void launch(Cpu device, const GatherSum<T>& p) {
  parallel_rows(device, p.num_rows, 1 + 16384 / (p.num_tables * p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(gather_sum_kernel<T>)(p, begin, end); });
}

template void launch(Cpu, const GatherSum<float>&);
template void launch(Cpu, const GatherSum<double>&);
template void launch(Cpu, const GatherSum<bfloat16>&);
template void launch(Cpu, const GatherSum<half>&);
#endif

}  // namespace calm_rt
