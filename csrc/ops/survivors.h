// survivors: check, contiguous, allocate, fill the struct, launch (see kernels/survivors.h).
#pragma once
#include <tuple>

#include "kernels/survivors.h"
#include "ops/tensor.h"

namespace calm_rt {

// tokens [B, S, K] int64, kept [B] int64 -> order [B S] int64, count [] int64
template <class Device>
std::tuple<Tensor, Tensor> survivors(const Tensor& tokens, const Tensor& kept, int64_t depth) {
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) >= 1 && tokens.scalar_type() == ScalarType::Long,
                  "survivors: tokens must be [B, S, K] int64 with S >= 1");
  const int64_t num_rows = tokens.size(0), pool = tokens.size(1), patch = tokens.size(2);
  STD_TORCH_CHECK(has_shape(kept, ScalarType::Long, {num_rows}), "survivors: kept must be [B] int64");
  STD_TORCH_CHECK(depth >= 0 && depth <= patch, "survivors: depth must be from 0 to K");
  Guard<Device> guard(tokens);
  Tensor tokens_ = guard.contiguous(tokens), kept_ = guard.contiguous(kept);
  Tensor order = allocate(tokens, {num_rows * pool}), count = allocate(tokens, {});
  Tensor alive = allocate(tokens, {num_rows * pool}, ScalarType::Byte);
  Tensor totals = allocate(tokens, {std::is_same_v<Device, Cuda> ? num_rows : 0});
  if (num_rows == 0) torch::stable::fill_(count, 0);
  launch(guard.device(), Survivors{.tokens = input<int64_t>(tokens_),
                                   .kept = input<int64_t>(kept_),
                                   .alive = output<uint8_t>(alive),
                                   .totals = output<int64_t>(totals),
                                   .order = output<int64_t>(order),
                                   .count = output<int64_t>(count),
                                   .num_rows = num_rows,
                                   .pool = pool,
                                   .patch = patch,
                                   .depth = depth});
  return {order, count};
}

}  // namespace calm_rt
