// Prints the largest error of the vectors' exponential in units in the last place, over floats spread evenly by their
// bits; exits with 1 where an infinity, a zero or a NaN is not where it belongs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "kernels/cpu/simd.h"

using namespace calm_rt::CALM_ISA;

static double worst = 0;
static int wrong = 0;

static void check(const float (&x)[kLanes]) {
  float value[kLanes];
  store(value, exponential(load(x)));
  for (int i = 0; i < kLanes; ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    const float nearest = static_cast<float>(exact);
    if (std::isnan(exact) ? !std::isnan(value[i]) : std::isinf(nearest) && value[i] != nearest) ++wrong;
    if (std::isnan(exact) || std::isinf(nearest)) continue;
    const int exponent = exact > 0 ? std::max(std::ilogb(exact) - 23, -149) : -149;
    worst = std::max(worst, std::fabs(value[i] - exact) / std::ldexp(1.0, exponent));
  }
}

int main() {
  float x[kLanes];
  for (float special :
       {INFINITY, -INFINITY, NAN, -NAN, 0.f, -0.f, 3e38f, -3e38f, 1e-45f, 88.7228f, 88.723f, -103.98f}) {
    std::fill(x, x + kLanes, special);
    check(x);
  }
  for (uint32_t bits = 0; bits < 0x42e00000u; bits += 1009 * kLanes) {  // to 112
    for (uint32_t sign : {0u, 0x80000000u}) {
      for (int i = 0; i < kLanes; ++i) {
        x[i] = __builtin_bit_cast(float, static_cast<uint32_t>(bits + 1009 * i) | sign);
      }
      check(x);
    }
  }
  std::printf("%.3f\n", worst);
  return wrong != 0;
}
