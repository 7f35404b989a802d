// What a search for the largest scores has found, and how an entry that may win is computed exactly.
#pragma once
#include "kernels/cpu/argmax_panel.h"
#include "kernels/linear_argmax.h"

namespace calm_rt {

// The rows of hidden as the screen sees them: h = unit * (q + e).
struct ArgmaxScreen {
  bool rounded;         // or taken as they are: unit 1, no q
  int64_t padded_size;  // numbers of a row, a multiple of 64
  void* rows;           // [R + 16, padded_size], q as whole numbers, or h in the accumulation type
  float* error;         // [R], at least |e|; NaN for a row of which every score is computed exactly
  float* norm;          // [R], at least |q|
  double* unit;         // [R]
};

// What one thread has found for every row.
struct ArgmaxWinners {
  double* best;    // [R], exact scores
  int64_t* id;     // [R], -1 for none
  float* reached;  // [R], in the row's unit: a later entry wins only if its score is larger than this
};

// Whether exact score a of id i comes before b of id j; NaN counts as the largest, as in torch.
CALM_INLINE bool before(double a, int64_t i, double b, int64_t j) {
  if (j < 0) return i >= 0;
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || i < j);
  return a > b || (a == b && i < j);
}

namespace CALM_ISA {
namespace {

constexpr int kSums = 16;  // independent partial sums, the same on every instruction set

// <a, b> in double, where products of float inputs are exact: one order of additions everywhere. Those of double inputs
// are not, and round by whether the instruction set fuses them with an addition.
template <class T>
double exact_product(const T* a, const T* b, int64_t size) {
  double sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= size; k += kSums) {
    for (int i = 0; i < kSums; ++i) {
      sums[i] += static_cast<double>(widen(a[k + i])) * static_cast<double>(widen(b[k + i]));
    }
  }
  double total = 0;
  for (; k < size; ++k) total += static_cast<double>(widen(a[k])) * static_cast<double>(widen(b[k]));
  for (int i = 0; i < kSums; ++i) total += sums[i];
  return total;
}

// The largest normal float below x, -inf and NaN for themselves: subnormal numbers may compare as zeros
// (torch.set_flush_denormal).
CALM_INLINE float next_below(float x) {
  constexpr int32_t kSmallestNormal = 0x00800000;
  if (!(x > -__builtin_inff())) return x;
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  if ((bits & 0x7fffffff) < kSmallestNormal) return -__FLT_MIN__;
  return __builtin_bit_cast(float, bits < 0 ? bits + 1 : bits - 1);
}

CALM_INLINE float round_down(double x) {
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) > x ? next_below(nearest) : nearest;
}

template <class T>
struct Search {
  const LinearArgmax<T>& p;
  const ArgmaxScreen& screen;
  const ArgmaxWinners& winners;

  const T* hidden(int64_t r) const { return p.hidden + r * p.size; }
  const T* weight(int64_t id) const { return p.weight + id * p.size; }

  // Computes an entry's exact score.
  void take(int64_t r, int64_t id) const {
    const double exact = exact_product(hidden(r), weight(id), p.size);
    if (!before(exact, id, winners.best[r], winners.id[r])) return;
    winners.best[r] = exact;
    winners.id[r] = id;
    raise(r, exact != exact ? __builtin_inff() : round_down(exact / screen.unit[r]));
  }

  void raise(int64_t r, float score) const {
    if (score > winners.reached[r]) winners.reached[r] = score;
  }

  // Consecutive entries of which one may win, a lane each; score and slack are NaN for those that are none.
  template <int N>
  void consider(int64_t r, int64_t first, const Float (&score)[N], const Float (&slack)[N]) const {
    const Float none = splat<Float>(-__builtin_inff());
    Float lower = none;
    for (int j = 0; j < N; ++j) {
      const Float one = score[j] - slack[j];
      lower = larger(select((Int)(one <= kLargest), one, none), lower);
    }
    raise(r, next_below(largest(lower)));  // so that itself will be taken, or a better one
    for (int j = 0; j < N; ++j) {
      const Float upper = score[j] + slack[j];
      for (uint32_t bits = lane_bits((Int)(upper > winners.reached[r])); bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        if (upper[lane] > winners.reached[r]) take(r, first + j * kLanes + lane);
      }
    }
  }
};

}  // namespace
}  // namespace CALM_ISA
}  // namespace calm_rt
