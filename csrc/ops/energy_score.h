// energy_score: check, contiguous, allocate, fill the struct, launch (see kernels/energy_score.h).
#pragma once
#include <tuple>

#include "kernels/energy_score.h"
#include "ops/tensor.h"

namespace calm_rt {

// x [S, R, L], mean and log_std [R, L] in the accumulation type, seed [] int64, rows [R] int64
// -> score, diversity, fidelity [R], grad_x [S, R, L] or [0], grad_mean and grad_log_std [R, L] or [0]
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> energy_score(const Tensor& x, const Tensor& mean,
                                                                        const Tensor& log_std, const Tensor& seed,
                                                                        const Tensor& rows, int64_t num_targets,
                                                                        double beta, bool need_grad_x,
                                                                        bool need_grad_target) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) >= 2, "energy_score: x must be [S, R, L] with S >= 2");
  const int64_t num_draws = x.size(0), num_rows = x.size(1), size = x.size(2);
  const ScalarType wide = accumulate_type(x.scalar_type());
  for (const Tensor* t : {&mean, &log_std}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == num_rows && t->size(1) == size && t->scalar_type() == wide,
                    "energy_score: mean and log_std must be [R, L] in the accumulation type of x");
  }
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "energy_score: seed must be one int64");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.size(0) == num_rows && rows.scalar_type() == ScalarType::Long,
                  "energy_score: rows must be [R] int64");
  STD_TORCH_CHECK(num_targets >= 1, "energy_score: num_targets must be at least 1");

  Guard<Device> guard(x);
  Tensor x_ = guard.contiguous(x), mean_ = guard.contiguous(mean), log_std_ = guard.contiguous(log_std),
         rows_ = guard.contiguous(rows);
  Tensor score = allocate(x, {num_rows}, wide), diversity = allocate(x, {num_rows}, wide);
  Tensor fidelity = allocate(x, {num_rows}, wide);
  Tensor grad_x = need_grad_x ? allocate(x, {num_draws, num_rows, size}) : allocate(x, {0});
  Tensor grad_mean = need_grad_target ? allocate(mean, {num_rows, size}) : allocate(mean, {0});
  Tensor grad_log_std = need_grad_target ? allocate(mean, {num_rows, size}) : allocate(mean, {0});

  dispatch<Device>(x.scalar_type(), "energy_score", [&](auto element) {
    using T = decltype(element);
    using Wide = AccumulateType<T>;
    launch(guard.device(), EnergyScore<T>{.x = input<T>(x_),
                                          .mean = input<Wide>(mean_),
                                          .log_std = input<Wide>(log_std_),
                                          .seed = input<int64_t>(guard.checked(seed)),
                                          .rows = input<int64_t>(rows_),
                                          .score = output<Wide>(score),
                                          .diversity = output<Wide>(diversity),
                                          .fidelity = output<Wide>(fidelity),
                                          .grad_x = output<T>(grad_x),
                                          .grad_mean = output<Wide>(grad_mean),
                                          .grad_log_std = output<Wide>(grad_log_std),
                                          .num_draws = num_draws,
                                          .num_rows = num_rows,
                                          .size = size,
                                          .num_targets = num_targets,
                                          .beta = beta});
  });
  return {score, diversity, fidelity, grad_x, grad_mean, grad_log_std};
}

}  // namespace calm_rt
