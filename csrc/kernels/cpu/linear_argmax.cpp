// Screened argmax on the CPU: rows are independent, a row's scores are read once with the bound of each.
#include "kernels/linear_argmax.h"

#include "kernels/cpu/select.h"
#include "kernels/cpu/simd.h"

namespace calm_rt {

CALM_EACH_ISA(template <class T, class S> void round_rows_kernel(const RoundRows<T, S>& p, int64_t begin, int64_t end);
              template <class T, class S>
              void scan_scores_kernel(const ScanScores<T, S>& p, int64_t begin, int64_t end);)

namespace CALM_ISA {
namespace {

constexpr float kLargestFloat = 3.402823466e38f;
constexpr int kSums = 16;  // independent partial sums, the same on every instruction set

// <a, b> in double, where products of float inputs are exact: one order of additions everywhere.
template <class T>
double exact_product(const T* a, const T* b, int64_t size) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= size; k += kSums) {
    for (int i = 0; i < kSums; ++i)
      sums[i] += static_cast<double>(widen(a[k + i])) * static_cast<double>(widen(b[k + i]));
  }
  double total = 0;
  for (; k < size; ++k) total += static_cast<double>(widen(a[k])) * static_cast<double>(widen(b[k]));
  for (int i = 0; i < kSums; ++i) total += sums[i];
  return total;
}

CALM_INLINE Float absolute(Float x) { return reinterpret_cast<Float>(reinterpret_cast<Int>(x) & 0x7fffffff); }
CALM_INLINE float absolute(float x) { return __builtin_fabsf(x); }
CALM_INLINE bool any(Int mask) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

// Whether exact score a of id i comes before b of id j; NaN counts as the largest, as in torch.
CALM_INLINE bool before(double a, int64_t i, double b, int64_t j) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || i < j);
  return a > b || (a == b && i < j);
}

// One row of one block.
template <class T, class S>
struct RowScan {
  const ScanScores<T, S>& p;
  int64_t r;
  double best;
  int64_t id;
  float factor;

  RowScan(const ScanScores<T, S>& params, int64_t row)
      : p(params), r(row), best(p.best[r]), id(p.id[r]), factor(p.factor() * p.hidden_norm[r]) {}

  // The largest exact scores that the rounded ones of an entry, or of kLanes entries, can stand for.
  float bound(int64_t entry) const {
    const float score = widen(p.scores[r * p.block + entry]);
    return score + (p.kRelative * absolute(score) + factor * p.weight_norm[entry]);
  }
  Float bounds(int64_t entry) const {
    const Float score = load(p.scores + r * p.block + entry);
    return score + (p.kRelative * absolute(score) + factor * load(p.weight_norm + entry));
  }

  // What a bound must exceed. A bound that overflowed stands for finite scores too.
  float least() const {
    const float rounded = static_cast<float>(best);
    return rounded > kLargestFloat && best < __builtin_inf() ? kLargestFloat : rounded;
  }

  // Whether an entry with this bound may come before the winner; of a vector, the lanes from `entry` on that may.
  bool may_win(float bound, int64_t entry) const {
    if (id < 0) return true;
    const bool earlier = p.first_id + entry < id;
    if (best != best) return earlier && bound != bound;  // only an earlier NaN comes before NaN
    return earlier ? !(bound < least()) : !(bound <= least());
  }
  Int may_win(Float bound, int64_t entry) const {
    if (id < 0) return ~Int{};
    const bool earlier = p.first_id + entry < id;
    if (best != best) return earlier ? (Int)(bound != bound) : Int{};
    return earlier ? ~(Int)(bound < least()) : ~(Int)(bound <= least());
  }

  void take(int64_t entry) {
    const double exact = exact_product(p.hidden + r * p.size, p.weight + entry * p.size, p.size);
    if (id < 0 || before(exact, p.first_id + entry, best, id)) {
      best = exact;
      id = p.first_id + entry;
    }
  }

  // Takes the entry with the largest bound, so that few others remain possible; false if none can win.
  bool take_largest() {
    Float largest = splat<Float>(-__builtin_inff());
    Int possible{};
    int64_t v = 0;
    for (; v + kLanes <= p.block; v += kLanes) {
      const Float value = bounds(v);
      possible |= may_win(value, v);
      largest = value > largest ? value : largest;
    }
    float top = -__builtin_inff();
    for (int i = 0; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;
    bool found = any(possible);
    for (; v < p.block; ++v) {
      const float value = bound(v);
      found |= may_win(value, v);
      top = value > top ? value : top;
    }
    if (!found) return false;
    top -= 1e-6f * absolute(top);  // one entry's bound may round otherwise than a vector's
    for (v = 0; v + kLanes < p.block && !any((Int)(bounds(v) >= top)); v += kLanes) {
    }
    while (v + 1 < p.block && !(bound(v) >= top)) ++v;
    take(v);
    return true;
  }

  void run() {
    if (!take_largest()) return;
    int64_t v = 0;
    for (; v + kLanes <= p.block; v += kLanes) {
      if (!any(may_win(bounds(v), v))) continue;
      for (int i = 0; i < kLanes; ++i) {
        if (may_win(bound(v + i), v + i)) take(v + i);
      }
    }
    for (; v < p.block; ++v) {
      if (may_win(bound(v), v)) take(v);
    }
    p.best[r] = best;
    p.id[r] = id;
  }
};

}  // namespace

template <class T, class S>
void round_rows_kernel(const RoundRows<T, S>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* in = p.in + r * p.size;
    float sums[kSums] = {}, largest[kSums] = {};
    const auto add = [&](int i, float x) {
      sums[i] += x * x;
      largest[i] = absolute(x) > largest[i] ? absolute(x) : largest[i];
    };
    int64_t k = 0;
    for (; k + kSums <= p.size; k += kSums) {
      for (int i = 0; i < kSums; ++i) add(i, static_cast<float>(widen(in[k + i])));
    }
    for (; k < p.size; ++k) add(static_cast<int>(k % kSums), static_cast<float>(widen(in[k])));
    for (int i = 1; i < kSums; ++i) {
      sums[0] += sums[i];
      largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
    }
    const float room = largest[0] > 0 ? kNormRoom : 0;  // and the factor for the sum's own rounding
    p.norm[r] = __builtin_sqrtf(sums[0]) * (1 + static_cast<float>(p.size) * 1e-7f) + room;
    if (p.out) {
      S* out = p.out + r * p.size;
      for (int64_t i = 0; i < p.size; ++i) narrow(static_cast<float>(widen(in[i])), out + i);
    }
  }
}

template <class T, class S>
void scan_scores_kernel(const ScanScores<T, S>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) RowScan<T, S>(p, r).run();
}

#define CALM_INSTANTIATE(T, S)                                               \
  template void round_rows_kernel(const RoundRows<T, S>&, int64_t, int64_t); \
  template void scan_scores_kernel(const ScanScores<T, S>&, int64_t, int64_t);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(double, float)
CALM_INSTANTIATE(double, bfloat16)
CALM_INSTANTIATE(bfloat16, float)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, float)
CALM_INSTANTIATE(half, bfloat16)
#undef CALM_INSTANTIATE

}  // namespace CALM_ISA

#ifdef CALM_ISA_PORTABLE
template <class T, class S>
void launch(Cpu device, const RoundRows<T, S>& p) {
  parallel_rows(device, p.num_rows, 1 + 32768 / (p.size + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(round_rows_kernel<T, S>)(p, begin, end); });
}

template <class T, class S>
void launch(Cpu device, const ScanScores<T, S>& p) {
  parallel_rows(device, p.num_rows, 1 + 32768 / (p.block + 1),
                [&](int64_t begin, int64_t end) { CALM_SELECT(scan_scores_kernel<T, S>)(p, begin, end); });
}

#define CALM_INSTANTIATE(T, S)                       \
  template void launch(Cpu, const RoundRows<T, S>&); \
  template void launch(Cpu, const ScanScores<T, S>&);
CALM_INSTANTIATE(float, float)
CALM_INSTANTIATE(float, bfloat16)
CALM_INSTANTIATE(double, float)
CALM_INSTANTIATE(double, bfloat16)
CALM_INSTANTIATE(bfloat16, float)
CALM_INSTANTIATE(bfloat16, bfloat16)
CALM_INSTANTIATE(half, float)
CALM_INSTANTIATE(half, bfloat16)
#undef CALM_INSTANTIATE
#endif

}  // namespace calm_rt
