// Runs every CUDA kernel in the simulator at small and odd shapes, under several schedules, against plain double
// arithmetic.
//
// Exits with 1 and a line for each of the first mismatches. Built plain, with AddressSanitizer and with ThreadSanitizer
// (a race is its exit status 66).
#include "simulator/check.h"

#include <cstdio>
#include <stdexcept>

#include "common/philox.h"
#include "kernels/noise.h"

namespace calm_rt {

static constexpr int kMostLines = 20;
static int mismatches = 0;

void check(bool holds, const char* what, const char* kernel, int64_t index, double value, double expected) {
  if (holds) return;
  if (++mismatches > kMostLines) return;  // go on: what comes may be worse
  std::printf("%s: %s[%ld] is %.9g, expected %.9g\n", kernel, what, index, value, expected);
}

float random_value() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}

double reference_noise(bool normal, int64_t seed, int64_t row, int64_t draw, int64_t position, uint32_t stream) {
  const PhiloxWords words =
      philox(philox_counter(static_cast<uint32_t>(position / 4), stream, static_cast<uint32_t>(draw), row),
             static_cast<uint64_t>(seed));
  if (!normal) return uniform(words.word[position % 4]);
  const uint32_t* pair = words.word + position % 4 / 2 * 2;
  const double radius = std::sqrt(-2 * std::log(uniform(pair[0]) + 0x1p-24)), angle = 2 * M_PI * uniform(pair[1]);
  return radius * (position % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

static void check_noise(int64_t draws, int64_t rows, int64_t length, bool normal) {
  const int64_t seed = 0x123456789ABCDEF;
  std::vector<int64_t> ids;
  for (int64_t r = 0; r < rows; ++r) ids.push_back((r << 32) + 3 * r + 1);
  std::vector<float> first;
  for (uint32_t schedule = 0; schedule < kSchedules; ++schedule) {
    simulator::set_schedule(schedule);
    std::vector<float> out(draws * rows * length, NAN);
    launch(Cuda{}, Noise<float>{&seed, ids.data(), out.data(), draws, rows, length, kProbe, normal});
    check_same(out, first, schedule, "out differs under schedule", "noise");
  }
  for (int64_t i = 0; i < static_cast<int64_t>(first.size()); ++i) {
    const double expected =
        reference_noise(normal, seed, ids[i / length % rows], i / length / rows, i % length, kProbe);
    const double bound = normal ? kUnits * kRounding * 6 : 0;  // 6 is the largest radius
    check(std::fabs(first[i] - expected) <= bound, "out", "noise", i, first[i], expected);
  }
}

void check_noise() {
  check_noise(3, 5, 8, true);
  check_noise(2, 3, 7, true);
  check_noise(4, 70, 1, false);
}

}  // namespace calm_rt

// Checks the kernel files that are named, or all of them.
int main(int argc, char** argv) {
  using namespace calm_rt;
  const struct {
    const char* name;
    void (*check)();
  } kernels[] = {
      {"argmax_groups", check_argmax_groups},
      {"argmax_warpgroups", check_argmax_warpgroups},
      {"encode", check_encode},
      {"energy_score", check_energy_score},
      {"gated_mlp", check_gated_mlp},
      {"linear_argmax", check_linear_argmax},
      {"linear_cross_entropy", check_linear_cross_entropy},
      {"noise", check_noise},
      {"sample_latents", check_sample_latents},
      {"select_patch", check_select_patch},
      {"survivors", check_survivors},
  };
  int checked = 0;
  try {
    for (const auto& kernel : kernels) {
      bool wanted = argc == 1;
      for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], kernel.name) == 0;
      if (wanted) kernel.check(), ++checked;
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d mismatches in %d checks\n", calm_rt::mismatches, checked);
  return calm_rt::mismatches != 0 || checked == 0;
}
