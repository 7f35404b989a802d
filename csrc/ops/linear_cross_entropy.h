// linear_cross_entropy: rows in chunks whose logits fit the budget; the library multiplies, kernels turn logits into
// losses and gradients and add up products (see kernels/linear_cross_entropy.h).
#pragma once
#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/vocabulary_products.h"

namespace calm_rt {

inline void check_projection(const Tensor& hidden, const Tensor& weight) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
                  "linear_cross_entropy: hidden must be [R, H] and weight [V, H] with V > 0");
  STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(),
                  "linear_cross_entropy: hidden and weight must have one dtype");
}

// hidden [R, H], weight [V, H] of one dtype, target [R] int64, scale [R] in the accumulation type or none for ones
// -> the sum of all losses [], loss [R], and in the accumulation type the gradients of sum_r scale[r] loss[r]:
// grad_hidden [R, H] or [0], grad_weight [V, H] or [0]; and if that is asked for, for all rows at once, the gradient of
// the logits [R V], in the blocks that linear_cross_entropy_backward expects
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, std::optional<Tensor> scale, int64_t ignore_index,
    int64_t max_workspace_bytes, bool need_grad_hidden, bool need_grad_weight, bool keep_grad_logits) {
  check_projection(hidden, weight);
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  const ScalarType type = hidden.scalar_type(), wide = accumulate_type(type);
  const ScalarType products = product_type<Device>(type, num_rows);
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == num_rows && target.scalar_type() == ScalarType::Long,
                  "linear_cross_entropy: target must be [R] int64");
  STD_TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == num_rows && scale->scalar_type() == wide),
                  "linear_cross_entropy: scale must be [R] in the accumulation type of hidden");

  STD_TORCH_CHECK(!keep_grad_logits || products == type,
                  "linear_cross_entropy: keep_grad_logits needs a dtype that products are taken in");

  Guard<Device> guard(hidden);
  using torch::stable::fill_;
  Tensor hidden_ = guard.factor(hidden), weight_ = guard.factor(weight), target_ = guard.contiguous(target);
  Tensor scale_ = scale ? guard.contiguous(*scale) : allocate(hidden, {0}, wide);
  Tensor total = allocate(hidden, {}, wide), loss = allocate(hidden, {num_rows}, wide);
  auto gradient = [&](bool needed, int64_t rows) {
    return needed ? allocate(hidden, {rows, size}, wide) : allocate(hidden, {0}, wide);
  };
  Tensor grad_hidden = gradient(need_grad_hidden, num_rows), grad_weight = gradient(need_grad_weight, vocabulary);
  if (num_rows == 0) fill_(grad_weight, 0);

  const bool need_grad = need_grad_hidden || need_grad_weight;
  const int64_t row_bytes = vocabulary * (products == ScalarType::Float ? 4 : hidden.element_size());
  const int64_t most_rows = keep_grad_logits ? num_rows : std::max<int64_t>(1, max_workspace_bytes / row_bytes);
  const int64_t num_chunks = num_rows == 0 ? 0 : (num_rows + most_rows - 1) / most_rows;
  const int64_t chunk = num_chunks == 0 ? 0 : (num_rows + num_chunks - 1) / num_chunks;  // of about one size, none tiny
  Tensor logits = allocate(hidden, {chunk * vocabulary}, products);

  dispatch_products<Device>(type, num_rows, "linear_cross_entropy", [&](auto element, auto product_element) {
    using T = decltype(element);
    using P = decltype(product_element);
    using Wide = AccumulateType<T>;
    VocabularyProducts<Device, T, P> projection(guard.device(), hidden_, weight_, chunk, need_grad);
    P* logits_data = output<P>(logits);
    for (int64_t row = 0; row < num_rows; row += chunk) {
      const int64_t rows = std::min(chunk, num_rows - row);
      const Matrix<P> some = projection.rows_of(input<T>(hidden_) + row * size, rows);
      projection.logits(some, logits_data);
      launch(guard.device(), RowLosses<P>{.logits = logits_data,
                                          .target = input<int64_t>(target_) + row,
                                          .scale = scale ? input<Wide>(scale_) + row : nullptr,
                                          .loss = output<Wide>(loss) + row,
                                          .num_rows = rows,
                                          .vocabulary = vocabulary,
                                          .block = projection.block(),
                                          .ignore_index = ignore_index,
                                          .need_grad = need_grad || keep_grad_logits});
      if (need_grad_hidden) projection.grad_hidden(logits_data, rows, output<Wide>(grad_hidden) + row * size);
      if (need_grad_weight) projection.grad_weight(logits_data, some, output<Wide>(grad_weight), row == 0);
    }
    launch(guard.device(), SumLosses<T>{.loss = input<Wide>(loss), .total = output<Wide>(total), .num_rows = num_rows});
  });
  Tensor kept = keep_grad_logits ? logits : allocate(hidden, {0});
  return {total, loss, grad_hidden, grad_weight, kept};
}

// grad_logits [R V] as linear_cross_entropy keeps it, hidden [R, H], weight [V, H] -> grad_hidden [R, H] = grad_logits
// weight in the accumulation type, which sums over the vocabulary, and grad_weight [V, H] = grad_logits^T hidden in
// that of weight; [0] for one that is not needed
template <class Device>
std::tuple<Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad_logits, const Tensor& hidden,
                                                         const Tensor& weight, bool need_grad_hidden,
                                                         bool need_grad_weight) {
  check_projection(hidden, weight);
  const ScalarType type = hidden.scalar_type();
  const int64_t num_rows = hidden.size(0), vocabulary = weight.size(0), size = hidden.size(1);
  STD_TORCH_CHECK(has_shape(grad_logits, type, {num_rows * vocabulary}),
                  "linear_cross_entropy_backward: grad_logits must be what linear_cross_entropy kept of these rows");

  Guard<Device> guard(hidden);
  Tensor hidden_ = guard.factor(hidden), weight_ = guard.factor(weight), grad_logits_ = guard.factor(grad_logits);
  auto gradient = [&](bool needed, int64_t rows, ScalarType of) {
    return needed ? allocate(hidden, {rows, size}, of) : allocate(hidden, {0}, of);
  };
  Tensor grad_hidden = gradient(need_grad_hidden, num_rows, accumulate_type(type));
  Tensor grad_weight = gradient(need_grad_weight, vocabulary, type);
  if (num_rows == 0) {
    torch::stable::fill_(grad_weight, 0);
    return {grad_hidden, grad_weight};
  }
  dispatch<Device>(type, "linear_cross_entropy_backward", [&](auto element) {
    using T = decltype(element);
    VocabularyProducts<Device, T, T> projection(guard.device(), hidden_, weight_, num_rows, true);
    T* data = output<T>(grad_logits_);
    if (need_grad_hidden) projection.grad_hidden(data, num_rows, output<AccumulateType<T>>(grad_hidden));
    if (need_grad_weight) {
      projection.grad_weight(data, projection.rows_of(input<T>(hidden_), num_rows), output<T>(grad_weight));
    }
  });
  return {grad_hidden, grad_weight};
}

}  // namespace calm_rt
