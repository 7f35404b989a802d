// select_patch: check, contiguous, allocate, fill the struct, launch (see kernels/select_patch.h).
#pragma once
#include "kernels/select_patch.h"
#include "ops/tensor.h"

namespace calm_rt {

// tokens [B, S, K] int64, seed [] int64, rows [B] int64 -> [B] int64
template <class Device>
Tensor select_patch(const Tensor& tokens, const Tensor& seed, const Tensor& rows, int64_t n) {
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) >= 1 && tokens.scalar_type() == ScalarType::Long,
                  "select_patch: tokens must be [B, S, K] int64 with S >= 1");
  const int64_t num_rows = tokens.size(0), pool = tokens.size(1), patch = tokens.size(2);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "select_patch: seed must be one int64");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.size(0) == num_rows && rows.scalar_type() == ScalarType::Long,
                  "select_patch: rows must be [B] int64");
  STD_TORCH_CHECK(n >= 1, "select_patch: n must be at least 1");
  Guard<Device> guard(tokens);
  Tensor tokens_ = guard.contiguous(tokens), rows_ = guard.contiguous(rows);
  Tensor index = allocate(tokens, {num_rows}, ScalarType::Long);
  std::optional<Tensor> workspace;
  if (std::is_same_v<Device, Cuda>) workspace = allocate(tokens, {num_rows * pool}, ScalarType::Double);
  launch(guard.device(), SelectPatch{.tokens = input<int64_t>(tokens_),
                                     .seed = input<int64_t>(guard.checked(seed)),
                                     .rows = input<int64_t>(rows_),
                                     .workspace = workspace ? output<double>(*workspace) : nullptr,
                                     .index = output<int64_t>(index),
                                     .n = n,
                                     .num_rows = num_rows,
                                     .pool = pool,
                                     .patch = patch});
  return index;
}

}  // namespace calm_rt
