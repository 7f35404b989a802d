// linear_cross_entropy: rows in chunks whose logits fit the budget, the vocabulary in blocks; the library
// multiplies, kernels turn logits into losses and gradients and add up products (see kernels/linear_cross_entropy.h).
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "kernels/linear_cross_entropy.h"
#include "ops/product.h"

namespace calm_rt {

// Entries of the vocabulary that a product takes. On the GPU one fills the device; on the CPU there are sixteen blocks
// for as many threads, of a size at which the library is fast and the gradient of the weight stays in a cache.
template <class Device>
int64_t vocabulary_block(int64_t vocabulary) {
  if (!std::is_same_v<Device, Cpu>) return std::min<int64_t>(vocabulary, 16384);
  return std::min(vocabulary, std::clamp<int64_t>((vocabulary / 16 + 63) / 64 * 64, 128, 2048));
}

// The type that products are taken in: float where the library is slower with `type`.
template <class Device>
ScalarType product_type(ScalarType type) {
  if constexpr (std::is_same_v<Device, Cpu>) {
    if (type == ScalarType::BFloat16 && !has_fast_bfloat16()) return ScalarType::Float;
    if (type == ScalarType::Half && !has_fast_half()) return ScalarType::Float;
  }
  return type;
}

// Rows of a chunk whose grad_hidden is one task. Each task takes the whole weight, and may have to widen it.
template <class Device>
int64_t row_tile(int64_t chunk, bool widens) {
  if (!std::is_same_v<Device, Cpu>) return std::max<int64_t>(1, chunk);
  return std::max<int64_t>(16, widens ? (chunk + 3) / 4 : (chunk + 7) / 8);
}

// hidden [R, H], weight [V, H] of one dtype, target [R] int64, scale [R] in the accumulation type or none for ones
// -> the sum of all losses [], loss [R], and in the accumulation type the gradients of sum_r scale[r] loss[r]:
// grad_hidden [R, H] or [0], grad_weight [V, H] or [0]
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight,
                                                                const Tensor& target, std::optional<Tensor> scale,
                                                                int64_t ignore_index, int64_t max_workspace_bytes,
                                                                bool need_grad_hidden, bool need_grad_weight) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
                  "linear_cross_entropy: hidden must be [R, H] and weight [V, H] with V > 0");
  const ScalarType type = hidden.scalar_type(), wide = accumulate_type(type);
  STD_TORCH_CHECK(weight.scalar_type() == type, "linear_cross_entropy: hidden and weight must have one dtype");
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == num_rows && target.scalar_type() == ScalarType::Long,
                  "linear_cross_entropy: target must be [R] int64");
  STD_TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == num_rows && scale->scalar_type() == wide),
                  "linear_cross_entropy: scale must be [R] in the accumulation type of hidden");

  Guard<Device> guard(hidden);
  using torch::stable::fill_;
  Tensor hidden_ = as_contiguous(hidden), weight_ = as_contiguous(weight), target_ = as_contiguous(target);
  Tensor scale_ = scale ? as_contiguous(*scale) : allocate(hidden, {0}, wide);
  Tensor total = allocate(hidden, {}, wide), loss = allocate(hidden, {num_rows}, wide);
  auto gradient = [&](bool needed, int64_t rows) {
    return needed ? allocate(hidden, {rows, size}, wide) : allocate(hidden, {0}, wide);
  };
  Tensor grad_hidden = gradient(need_grad_hidden, num_rows), grad_weight = gradient(need_grad_weight, vocabulary);
  if (num_rows == 0) fill_(grad_weight, 0);

  const ScalarType products_type = product_type<Device>(type);
  const bool need_grad = need_grad_hidden || need_grad_weight, widens = products_type != type;
  const int64_t row_bytes = vocabulary * (widens ? 4 : static_cast<int64_t>(hidden.element_size()));
  const int64_t most_rows = std::max<int64_t>(1, max_workspace_bytes / row_bytes);
  const int64_t num_chunks = (num_rows + most_rows - 1) / most_rows;  // of about the same size, so that none is tiny
  const int64_t chunk = num_chunks == 0 ? 0 : (num_rows + num_chunks - 1) / num_chunks;
  const int64_t block = vocabulary_block<Device>(vocabulary), num_blocks = (vocabulary + block - 1) / block;
  const int64_t tile = row_tile<Device>(chunk, widens);
  const int64_t product_size = need_grad ? std::max(tile, block) * size : 0;
  Tensor logits = allocate(hidden, {chunk * vocabulary}, products_type);
  Tensor products = allocate(hidden, {num_workers<Device>() * product_size}, products_type);
  Tensor wide_hidden = allocate(hidden, {widens ? chunk * size : 0}, ScalarType::Float);
  Tensor wide_weight = allocate(hidden, {widens ? num_workers<Device>() * block * size : 0}, ScalarType::Float);

  auto run = [&](auto element, auto product_element) {
    using T = decltype(element);
    using P = decltype(product_element);
    using Wide = AccumulateType<T>;
    P *logits_data = output<P>(logits), *products_data = output<P>(products);
    Wide *grad_hidden_data = output<Wide>(grad_hidden), *grad_weight_data = output<Wide>(grad_weight);
    // in, as products take it
    auto widen = [&]([[maybe_unused]] P* out, const T* in, [[maybe_unused]] int64_t count) -> const P* {
      if constexpr (std::is_same_v<T, P>) {
        return in;
      } else {
        launch(guard.device(), WidenValues<T>{in, out, count});
        return out;
      }
    };
    // sum = a b if it is the first product, otherwise sum += a b
    auto add_product = [&](const Matrix<P>& a, const Matrix<P>& b, Wide* sum, bool first, int64_t worker) {
      if constexpr (std::is_same_v<P, Wide>) {
        if (first) return multiply<Device>(a, b, Matrix<P>{sum, a.rows, b.columns}, logits);
      }
      const Matrix<P> product{products_data + worker * product_size, a.rows, b.columns};
      multiply<Device>(a, b, product, logits);
      launch(guard.device(), AddProduct<P>{product.data, sum, a.rows * b.columns, first});
    };
    for (int64_t row = 0; row < num_rows; row += chunk) {
      const int64_t rows = std::min(chunk, num_rows - row);
      const P* chunk_data = widen(output<P>(wide_hidden), input<T>(hidden_) + row * size, rows * size);
      const Matrix<P> chunk_hidden{chunk_data, rows, size};
      // of a block: its columns of the logits and its rows of the weight
      auto width = [&](int64_t index) { return std::min(block, vocabulary - index * block); };
      auto block_logits = [&](int64_t index, int64_t first_row, int64_t count) {
        P* data = logits_data + index * block * rows + first_row * width(index);
        return Matrix<P>{data, count, width(index)};
      };
      auto block_weight = [&](int64_t index, int64_t worker) {
        const T* data = input<T>(weight_) + index * block * size;
        P* out = output<P>(wide_weight) + worker * block * size;
        return Matrix<P>{widen(out, data, width(index) * size), width(index), size};
      };
      each_task<Device>(num_blocks, [&](int64_t index, int64_t worker) {
        multiply<Device>(chunk_hidden, ~block_weight(index, worker), block_logits(index, 0, rows), logits);
      });
      launch(guard.device(), RowLosses<P>{.logits = logits_data,
                                          .target = input<int64_t>(target_) + row,
                                          .scale = scale ? input<Wide>(scale_) + row : nullptr,
                                          .loss = output<Wide>(loss) + row,
                                          .num_rows = rows,
                                          .vocabulary = vocabulary,
                                          .block = block,
                                          .ignore_index = ignore_index,
                                          .need_grad = need_grad});
      if (grad_hidden_data) {
        each_task<Device>((rows + tile - 1) / tile, [&](int64_t task, int64_t worker) {
          const int64_t first_row = task * tile, count = std::min(tile, rows - first_row);
          Wide* sum = grad_hidden_data + (row + first_row) * size;
          for (int64_t index = 0; index < num_blocks; ++index) {
            add_product(block_logits(index, first_row, count), block_weight(index, worker), sum, index == 0, worker);
          }
        });
      }
      if (grad_weight_data) {
        each_task<Device>(num_blocks, [&](int64_t index, int64_t worker) {
          Wide* sum = grad_weight_data + index * block * size;
          add_product(~block_logits(index, 0, rows), chunk_hidden, sum, row == 0, worker);
        });
      }
    }
    launch(guard.device(), SumLosses<T>{.loss = input<Wide>(loss), .total = output<Wide>(total), .num_rows = num_rows});
  };
  dispatch<Device>(type, "linear_cross_entropy", [&](auto element) {
    if constexpr (std::is_same_v<Device, Cpu> && sizeof(element) == 2) {
      if (widens) return run(element, float{});
    }
    run(element, element);
  });
  return {total, loss, grad_hidden, grad_weight};
}

}  // namespace calm_rt
