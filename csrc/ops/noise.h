// noise: check, allocate, fill the struct, launch (see kernels/noise.h).
#pragma once
#include "kernels/noise.h"
#include "ops/tensor.h"

namespace calm_rt {

// seed [] int64, rows [R] int64 -> [num_draws, R, length] float or double
template <class Device>
Tensor noise(const Tensor& seed, const Tensor& rows, int64_t num_draws, int64_t length, int64_t stream, bool normal,
             bool double_precision) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "noise: seed must be one int64");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long, "noise: rows must be [R] int64");
  STD_TORCH_CHECK(num_draws >= 0 && length >= 0 && length < int64_t{1} << 26 && stream >= 0 && stream < 256,
                  "noise: num_draws, length below 2^26 and stream below 256 must not be negative");
  Guard<Device> guard(rows);
  Tensor rows_ = guard.contiguous(rows);
  Tensor out =
      allocate(rows, {num_draws, rows.size(0), length}, double_precision ? ScalarType::Double : ScalarType::Float);
  auto run = [&](auto element) {
    using T = decltype(element);
    launch(guard.device(), Noise<T>{.seed = input<int64_t>(guard.checked(seed)),
                                    .rows = input<int64_t>(rows_),
                                    .out = output<T>(out),
                                    .num_draws = num_draws,
                                    .num_rows = rows.size(0),
                                    .length = length,
                                    .stream = static_cast<uint32_t>(stream),
                                    .normal = normal});
  };
  if (!double_precision) {
    run(float{});
  } else if constexpr (std::is_same_v<Device, Cpu>) {
    run(double{});
  } else {
    STD_TORCH_CHECK(false, "noise: no double on CUDA");
  }
  return out;
}

}  // namespace calm_rt
