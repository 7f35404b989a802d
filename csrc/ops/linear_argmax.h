// linear_argmax: on the CPU one kernel; on the GPU by groups where rows are whole packs, otherwise rounds the operands,
// multiplies block by block with the library and scans each block (see kernels/linear_argmax.h).
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "kernels/linear_argmax.h"
#include "ops/argmax_groups.h"
#include "ops/product.h"

namespace calm_rt {

// The largest tile of scores, and how many entries of the vocabulary are rounded at a time.
constexpr int64_t kTileRows = 16384, kBlock = 8192;

// Whether a GPU takes the library's products for every H: CALM_RT_CUDA_ARGMAX=library, to measure one way against the
// other. Asked for first at the import.
inline bool argmax_by_library() {
  static const bool chosen = [] {
    const char* wanted = std::getenv("CALM_RT_CUDA_ARGMAX");
    return wanted && std::strcmp(wanted, "library") == 0;
  }();
  return chosen;
}

inline void find_argmax(Cpu device, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& screen,
                        const int64_t* count, const Tensor& id) {
  if (screen) {
    const PanelSizes sizes = panel_sizes(device, weight.size(0), weight.size(1));
    const bool fits = has_shape(*screen, ScalarType::Char, {sizes.num_panels, sizes.panel_bytes}) &&
                      hidden.scalar_type() != ScalarType::Double && screen->is_contiguous() &&
                      screen_ends_with(device, screen->const_data_ptr(), weight.size(0), weight.size(1));
    STD_TORCH_CHECK(fits, "linear_argmax: screen must be what screen_vocabulary made of this weight on this processor");
  }
  if (count != nullptr) torch::stable::fill_(id, -1);
  dispatch<Cpu>(hidden.scalar_type(), "linear_argmax", [&](auto element) {
    using T = decltype(element);
    launch(device, LinearArgmax<T>{.hidden = input<T>(hidden),
                                   .weight = input<T>(weight),
                                   .id = output<int64_t>(id),
                                   .panels = screen ? screen->const_data_ptr() : nullptr,
                                   .num_rows = WantedRows{count}.of(hidden.size(0)),
                                   .vocabulary = weight.size(0),
                                   .size = hidden.size(1)});
  });
}

inline void find_argmax(Cuda device, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& screen,
                        const int64_t* count, const Tensor& id) {
  STD_TORCH_CHECK(!screen, "linear_argmax: on a GPU there is no screen");
  if (!argmax_by_library() && find_argmax_by_groups(device, hidden, weight, count, id)) return;
  using S = bfloat16;  // the type that the library multiplies fastest
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  const ScalarType rounded = ScalarType::BFloat16;
  const bool same = hidden.scalar_type() == rounded;
  // Several blocks have one size, a multiple of 64, so that all rows of scores are aligned. The last block begins early
  // and meets some entries again, which changes nothing.
  const int64_t num_blocks = (vocabulary + kBlock - 1) / kBlock;
  const int64_t block = num_blocks == 1 ? vocabulary : (vocabulary + 64 * num_blocks - 1) / (64 * num_blocks) * 64;
  const int64_t tile = std::min(num_rows, kTileRows);
  torch::stable::fill_(id, -1);
  Tensor best = allocate(hidden, {num_rows}, ScalarType::Double);
  Tensor hidden_norm = allocate(hidden, {num_rows}, ScalarType::Float);
  Tensor weight_norm = allocate(hidden, {block}, ScalarType::Float);
  Tensor rounded_hidden = same ? hidden : allocate(hidden, {num_rows, size}, rounded);
  Tensor rounded_weight = allocate(hidden, {same ? 0 : block, size}, rounded);
  Tensor scores = allocate(hidden, {tile * block}, rounded);
  dispatch<Cuda>(hidden.scalar_type(), "linear_argmax", [&](auto element) {
    using T = decltype(element);
    const T* weights = input<T>(weight);
    auto round = [&](const T* in, S* out, const Tensor& norm, int64_t rows) {
      launch(device,
             RoundRows<T, S>{.in = in, .out = out, .norm = output<float>(norm), .num_rows = rows, .size = size});
    };
    round(input<T>(hidden), same ? nullptr : output<S>(rounded_hidden), hidden_norm, num_rows);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t first = std::min(i * block, vocabulary - block);
      round(weights + first * size, output<S>(rounded_weight), weight_norm, block);
      const S* factor = same ? input<S>(weight) + first * size : input<S>(rounded_weight);
      for (int64_t row = 0; row < num_rows; row += tile) {
        const int64_t rows = std::min(tile, num_rows - row);
        multiply<Cuda>(Matrix<S>{input<S>(rounded_hidden) + row * size, rows, size}, ~Matrix<S>{factor, block, size},
                       Matrix<S>{input<S>(scores), rows, block}, scores);
        launch(device, ScanScores<T, S>{.scores = input<S>(scores),
                                        .hidden = input<T>(hidden) + row * size,
                                        .weight = weights + first * size,
                                        .hidden_norm = input<float>(hidden_norm) + row,
                                        .weight_norm = input<float>(weight_norm),
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
}

// hidden [R, H], weight [V, H] of one dtype, what screen_vocabulary made of the weight, count [] int64 of the rows that
// are wanted -> [R] int64, -1 of the others
template <class Device>
Tensor linear_argmax(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> screen,
                     std::optional<Tensor> count) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
                  "linear_argmax: hidden must be [R, H] and weight [V, H] with V > 0");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "linear_argmax: hidden and weight must have one dtype");
  STD_TORCH_CHECK(!count || (count->numel() == 1 && count->scalar_type() == ScalarType::Long),
                  "linear_argmax: count must be one int64");
  Guard<Device> guard(hidden);
  Tensor id = allocate(hidden, {hidden.size(0)}, ScalarType::Long);
  if (screen) guard.checked(*screen);
  if (hidden.size(0) > 0) {
    find_argmax(guard.device(), guard.contiguous(hidden), guard.contiguous(weight), screen,
                count ? input<int64_t>(guard.checked(*count)) : nullptr, id);
  }
  return id;
}

// weight [V, H] -> the panels of its screen [num_panels, panel_bytes] int8, for this process
inline Tensor screen_vocabulary(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) <= kLongestScreened,
                  "screen_vocabulary: weight must be [V, H] with V > 0 and H up to 32768");
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double, "screen_vocabulary: weight must be no double");
  const Guard<Cpu> guard(weight);
  const Tensor weight_ = guard.contiguous(weight);
  const PanelSizes sizes = panel_sizes(guard.device(), weight.size(0), weight.size(1));
  Tensor panels = allocate(weight, {sizes.num_panels, sizes.panel_bytes}, ScalarType::Char);
  dispatch<Cpu>(weight.scalar_type(), "screen_vocabulary", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      launch(guard.device(), ScreenVocabulary<T>{.weight = input<T>(weight_),
                                                 .panels = panels.mutable_data_ptr(),
                                                 .vocabulary = weight.size(0),
                                                 .size = weight.size(1)});
    }
  });
  return panels;
}

}  // namespace calm_rt
