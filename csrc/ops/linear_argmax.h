// linear_argmax: rounds the operands, multiplies block by block with the library and scans each block (see
// kernels/linear_argmax.h).
#pragma once
#include <algorithm>
#include <limits>

#include "common/isa.h"
#include "kernels/linear_argmax.h"
#include "ops/product.h"

namespace calm_rt {

// The largest tile of scores, and how many entries of the vocabulary are rounded at a time.
template <class Device>
constexpr int64_t kTileRows = std::is_same_v<Device, Cpu> ? 1024 : 16384;
template <class Device>
constexpr int64_t kBlock = std::is_same_v<Device, Cpu> ? 2048 : 8192;

// The type that the library multiplies fastest on this device.
template <class Device>
ScalarType screen_type() {
  return !std::is_same_v<Device, Cpu> || has_bfloat16_products() ? ScalarType::BFloat16 : ScalarType::Float;
}

// hidden [R, H], weight [V, H] of one dtype -> [R] int64
template <class Device>
Tensor linear_argmax(const Tensor& hidden, const Tensor& weight) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
                  "linear_argmax: hidden must be [R, H] and weight [V, H] with V > 0");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "linear_argmax: hidden and weight must have one dtype");
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  Guard<Device> guard(hidden);
  using torch::stable::new_empty;
  Tensor hidden_ = torch::stable::contiguous(hidden), weight_ = torch::stable::contiguous(weight);
  Tensor id = torch::stable::fill_(new_empty(hidden, {num_rows}, ScalarType::Long), -1);
  if (num_rows == 0) return id;

  const ScalarType type = hidden.scalar_type(), screen = screen_type<Device>();
  // Several blocks have one size, a multiple of 64, so that all rows of scores are aligned. The last block begins early
  // and meets some entries again, which changes nothing.
  const int64_t num_blocks = (vocabulary + kBlock<Device> - 1) / kBlock<Device>;
  const int64_t block = num_blocks == 1 ? vocabulary : (vocabulary + 64 * num_blocks - 1) / (64 * num_blocks) * 64;
  const int64_t tile = std::min(num_rows, kTileRows<Device>);
  Tensor best = new_empty(hidden, {num_rows}, ScalarType::Double);
  Tensor hidden_norm = new_empty(hidden, {num_rows}, ScalarType::Float);
  Tensor weight_norm = new_empty(hidden, {block}, ScalarType::Float);
  Tensor rounded_hidden = screen == type ? hidden_ : new_empty(hidden, {num_rows, size}, screen);
  Tensor rounded_weight = screen == type ? new_empty(hidden, {0}, screen) : new_empty(hidden, {block, size}, screen);
  Tensor scores = new_empty(hidden, {tile * block}, screen);

  dispatch<Device>(type, "linear_argmax", [&](auto element) {
    using T = decltype(element);
    auto run = [&](auto screen_element) {
      using S = decltype(screen_element);
      const T* weights = input<T>(weight_);
      auto round = [&](const T* in, S* out, const Tensor& norm, int64_t rows) {
        launch(guard.device(),
               RoundRows<T, S>{.in = in, .out = out, .norm = output<float>(norm), .num_rows = rows, .size = size});
      };
      round(input<T>(hidden_), screen == type ? nullptr : output<S>(rounded_hidden), hidden_norm, num_rows);
      for (int64_t i = 0; i < num_blocks; ++i) {
        const int64_t first = std::min(i * block, vocabulary - block);
        round(weights + first * size, output<S>(rounded_weight), weight_norm, block);
        const S* factor = screen == type ? input<S>(weight_) + first * size : input<S>(rounded_weight);
        for (int64_t row = 0; row < num_rows; row += tile) {
          const int64_t rows = std::min(tile, num_rows - row);
          multiply<Device>(Matrix<S>{input<S>(rounded_hidden) + row * size, rows, size},
                           ~Matrix<S>{factor, block, size}, Matrix<S>{input<S>(scores), rows, block}, scores);
          launch(guard.device(), ScanScores<T, S>{.scores = input<S>(scores),
                                                  .hidden = input<T>(hidden_) + row * size,
                                                  .weight = weights + first * size,
                                                  .hidden_norm = input<float>(hidden_norm) + row,
                                                  .weight_norm = input<float>(weight_norm),
                                                  .best = output<double>(best) + row,
                                                  .id = output<int64_t>(id) + row,
                                                  .first_id = first,
                                                  .num_rows = rows,
                                                  .block = block,
                                                  .size = size});
        }
      }
    };
    if (screen == ScalarType::BFloat16) {
      run(bfloat16{});
    } else if constexpr (std::is_same_v<Device, Cpu>) {
      run(float{});
    }
  });
  return id;
}

}  // namespace calm_rt
