// linear_argmax on the GPU by tensor cores, without scores in memory (see kernels/linear_argmax.h).
#pragma once
#include <algorithm>

#include "kernels/linear_argmax.h"
#include "ops/tensor.h"

namespace calm_rt {

// Entries that are rounded and searched at a time: with 512 columns 32 MB, which L2 mostly holds. Rows at a time: their
// bounds take 64 MB.
constexpr int64_t kGroupedBlock = 32768, kGroupedRows = 16384;

// hidden [R, H], weight [V, H], contiguous, count [] of the rows that are wanted or nullptr -> id [R], -1 of the
// others, and whether the operands were such that this could be done
inline bool find_argmax_by_groups(Cuda device, const Tensor& hidden, const Tensor& weight, const int64_t* count,
                                  const Tensor& id) {
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  const bool same = hidden.scalar_type() == ScalarType::BFloat16;
  // new tensors begin at whole packs
  const void* given[2] = {same ? hidden.const_data_ptr() : nullptr, same ? weight.const_data_ptr() : nullptr};
  if (!BoundGroups::fits(given[0], given[1], size)) return false;
  // All blocks have one size; the last begins early and meets some entries again, which changes nothing.
  const int64_t num_blocks = (vocabulary + kGroupedBlock - 1) / kGroupedBlock;
  const int64_t each = (vocabulary + num_blocks - 1) / num_blocks;
  const int64_t block = std::min(vocabulary, num_groups(each) * kGroup);
  const int64_t tile = std::min(num_rows, kGroupedRows), groups = num_groups(block);
  torch::stable::fill_(id, -1);
  Tensor best = allocate(hidden, {num_rows}, ScalarType::Double);
  Tensor hidden_norm = allocate(hidden, {num_rows}, ScalarType::Float);
  Tensor weight_norm = allocate(hidden, {block}, ScalarType::Float);
  Tensor rounded_hidden = same ? hidden : allocate(hidden, {num_rows, size}, ScalarType::BFloat16);
  Tensor rounded_weight = allocate(hidden, {same ? 0 : block, size}, ScalarType::BFloat16);
  Tensor bounds = allocate(hidden, {tile, groups, 2}, ScalarType::Float);
  auto* group_bounds = reinterpret_cast<GroupBound*>(output<float>(bounds));
  dispatch<Cuda>(hidden.scalar_type(), "linear_argmax", [&](auto element) {
    using T = decltype(element);
    auto round = [&](const T* in, const Tensor& out, const Tensor& norm, int64_t rows) {
      launch(device, RoundRows<T, bfloat16>{.in = in,
                                            .out = same ? nullptr : output<bfloat16>(out),
                                            .norm = output<float>(norm),
                                            .num_rows = rows,
                                            .size = size});
    };
    round(input<T>(hidden), rounded_hidden, hidden_norm, num_rows);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t first = std::min(i * block, vocabulary - block);
      const T* weights = input<T>(weight) + first * size;
      round(weights, rounded_weight, weight_norm, block);
      for (int64_t row = 0; row < num_rows; row += tile) {
        const int64_t rows = std::min(tile, num_rows - row);
        launch(device,
               BoundGroups{.hidden = input<bfloat16>(rounded_hidden) + row * size,
                           .weight = same ? input<bfloat16>(weight) + first * size : input<bfloat16>(rounded_weight),
                           .hidden_norm = input<float>(hidden_norm) + row,
                           .weight_norm = input<float>(weight_norm),
                           .bounds = group_bounds,
                           .num_rows = rows,
                           .block = block,
                           .size = size,
                           .exact = same,
                           .wanted = {count, row}});
        launch(device, SearchGroups<T>{.bounds = group_bounds,
                                       .hidden = input<T>(hidden) + row * size,
                                       .weight = weights,
                                       .best = output<double>(best) + row,
                                       .id = output<int64_t>(id) + row,
                                       .first_id = first,
                                       .num_rows = rows,
                                       .block = block,
                                       .size = size,
                                       .wanted = {count, row}});
      }
    }
  });
  return true;
}

}  // namespace calm_rt
