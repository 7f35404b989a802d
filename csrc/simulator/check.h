// What the checks of all kernels share: how a mismatch is told, element types, random values.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/types.h"
#include "simulator/simulator.h"

namespace calm_rt {

constexpr double kRounding = 0x1p-24;  // of a float
constexpr double kUnits = 16;          // roundings that a bound allows each of its terms
constexpr uint32_t kSchedules = 3;

// Counts a mismatch unless it holds, and prints a line for each of the first.
void check(bool holds, const char* what, const char* kernel, int64_t index, double value, double expected);

float random_value();  // in [-1, 1)

// Element `position` of a row by the formula, in double.
double reference_noise(bool normal, int64_t seed, int64_t row, int64_t draw, int64_t position, uint32_t stream);

std::pair<int64_t, int64_t> tokens_of_one_key();  // that a pool's 32-bit keys do not tell apart

// ---- one a kernel file ----

void check_argmax_groups();
void check_argmax_warpgroups();
void check_encode();
void check_energy_score();
void check_gated_mlp();
void check_linear_argmax();
void check_linear_cross_entropy();
void check_noise();
void check_sample_latents();
void check_select_patch();
void check_survivors();

// ---- element types ----

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float widen(half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }

// Any value of the type near x will do.
template <class T>
T convert(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return {static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16)};
  } else {
    return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
  }
}

template <class T>
constexpr double kOutputRounding = std::is_same_v<T, float>      ? 0
                                   : std::is_same_v<T, bfloat16> ? 0x1p-8
                                                                 : 0x1p-11;
constexpr double kSmallest = 0x1p-24;  // half's least step, for values that a 16-bit gradient cannot hold

// Outputs are compared bit by bit between schedules.
template <class Value>
void check_same(const std::vector<Value>& value, std::vector<Value>& first, uint32_t schedule, const char* what,
                const char* kernel) {
  if (schedule == 0) first = value;
  if (!value.empty() && std::memcmp(value.data(), first.data(), value.size() * sizeof(Value)) != 0) {
    check(false, what, kernel, -1, schedule, 0);
  }
}

}  // namespace calm_rt
