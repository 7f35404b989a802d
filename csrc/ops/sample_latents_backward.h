// The gradients of sample_latents. From the last block to the first, tiles of lines take the gradient of the stream
// through the block and leave what the gradients of its weights are products of, over all lines; a task makes some
// rows of one of these, so that no sum depends on the number of threads.
#pragma once
#include <tuple>
#include <vector>

#include "kernels/gated_mlp.h"
#include "ops/sample_latents.h"

namespace calm_rt {

// Planes of T [lines, H] that every block uses again.
struct HeadGradPlanes {
  static constexpr int64_t kThird = 0, kSecond = 2, kFirst = 3;  // gradients of products, two planes of third
  static constexpr int64_t kGated = 4, kSecondHidden = 5, kFirstHidden = 6;  // what down, third and second took
  static constexpr int64_t kNormal = 7, kGradNormal = 8;                     // what first took, and its gradient
  static constexpr int64_t kStream = 9, kCount = 11;                         // the stream's gradient, two in turn
};

template <class Device, class T>
class HeadBackward {
 public:
  using Wide = AccumulateType<T>;
  using Planes = HeadGradPlanes;

  // grads: as the weights, or empty if nobody needs them.
  HeadBackward(Device device, const HeadInputs& inputs, const HeadWeights& weights, int64_t num_lines,
               const Tensor& hidden, const Tensor& products, const Tensor& stream, const Tensor& contexts,
               std::vector<Tensor>& grads)
      : device_(device), inputs_(inputs), weights_(weights), num_lines_(num_lines), like_(hidden), grads_(grads) {
    const ScalarType wide = accumulate_type(hidden.scalar_type());
    planes_ = allocate(hidden, {(kNarrow ? Planes::kCount : Planes::kStream) * num_lines * size_});
    wide_planes_ = allocate(hidden, {2 * num_lines * size_}, wide);
    statistics_ = allocate(hidden, {2 * std::max(num_lines, inputs.num_rows)}, wide);
    partial_ = allocate(hidden, {std::is_same_v<Device, Cpu> ? 0 : 2 * LineShares::kMostSums}, wide);
    noise_ = allocate(hidden, {num_lines * weights.noise_size()});
    row_planes_ = allocate(hidden, {3 * inputs.num_rows * size_});
    torch::stable::fill_(row_planes_, 0);  // what a head without blocks gives to its context
    products_ = input<T>(products), stream_ = input<Wide>(stream), contexts_ = input<T>(contexts);
  }

  // grad_latents [lines, L] to the gradient of the last block's stream.
  void last_layers(const T* grad_latents) {
    const int64_t num_blocks = weights_.num_blocks(), first = weights_.final_first(), second = weights_.final_second();
    const int64_t latent_size = weights_.latent_size();
    tiles([&](int64_t line, int64_t count, const auto& product) {
      const Matrix<T> grad = plane(Planes::kFirst, line, count);
      product(Matrix<T>{grad_latents + line * latent_size, count, latent_size}, weights_.matrix<T>(second), grad);
      add_silu(kept(HeadPlanes::final_first(num_blocks), line), weights_.data<T>(first + 1), 1, Planes::kFirst,
               Planes::kFirstHidden, line, count);
      product(grad, weights_.matrix<T>(first), plane(Planes::kGradNormal, line, count));
      norm(num_blocks, nullptr, line, count);
    });
    turn_ = 1 - turn_;
    if (grads_.empty()) return;
    const Matrix<T> latents{grad_latents, num_lines_, latent_size};
    weight_product(~latents, plane(Planes::kFirstHidden), grad_matrix(second));
    weight_product(~plane(Planes::kFirst), plane(Planes::kNormal), grad_matrix(first));
    run_products();
    bias(latents, second);
    bias(plane(Planes::kFirst), first);
    norm_gradients(num_blocks);
  }

  void block(int64_t block) {
    tiles([&](int64_t line, int64_t count, const auto& product) {
      const T* data = plane(Planes::kGated, line, count).data;
      const Matrix<T> grad_third = plane(Planes::kThird, line, count, 2);
      product(stream(turn_, line, count), weights_.matrix<T>(weights_.down(block)), Matrix<T>{data, count, size_});
      launch(device_, BiasSwiGluBackward<T>{.product = kept(HeadPlanes::third(block), line, 2),
                                            .bias = weights_.data<T>(weights_.third(block) + 1),
                                            .grad = data,
                                            .grad_product = const_cast<T*>(grad_third.data),
                                            .out = const_cast<T*>(data),
                                            .num_lines = count,
                                            .size = size_});
      product(grad_third, weights_.matrix<T>(weights_.third(block)), plane(Planes::kSecond, line, count));
      add_silu(kept(HeadPlanes::second(block), line), weights_.data<T>(weights_.second(block) + 1), 1, Planes::kSecond,
               Planes::kSecondHidden, line, count);
      product(plane(Planes::kSecond, line, count), weights_.matrix<T>(weights_.second(block)),
              plane(Planes::kFirst, line, count));
      add_silu(kept(HeadPlanes::first(block), line), row_kept(HeadPlanes::context(block)), inputs_.num_rows,
               Planes::kFirst, Planes::kFirstHidden, line, count);
      product(plane(Planes::kFirst, line, count), weights_.first_of_line<T>(block),
              plane(Planes::kGradNormal, line, count));
      norm(block, wide(turn_, line), line, count);
    });
    context_of_block(block);
    if (!grads_.empty()) {
      const Matrix<T> grad_first = grad_matrix(weights_.first(block));
      const Matrix<T> context{row_kept(HeadPlanes::kContext), inputs_.num_rows, size_};
      weight_product(~stream(turn_), plane(Planes::kGated), grad_matrix(weights_.down(block)));
      weight_product(~plane(Planes::kThird, 0, num_lines_, 2), plane(Planes::kSecondHidden),
                     grad_matrix(weights_.third(block)));
      weight_product(~plane(Planes::kSecond), plane(Planes::kFirstHidden), grad_matrix(weights_.second(block)));
      weight_product(~plane(Planes::kFirst), plane(Planes::kNormal), grad_first.column_range(0, size_));
      weight_product(~rows(kGradHalf), context, grad_first.column_range(size_, size_));
      run_products();
      bias(stream(turn_), weights_.down(block));
      bias(plane(Planes::kThird, 0, num_lines_, 2), weights_.third(block));
      bias(plane(Planes::kSecond), weights_.second(block));
      bias(rows(kGradHalf), weights_.first(block));
      norm_gradients(block);
    }
    turn_ = 1 - turn_;
  }

  // The stream's gradient to the noise's map.
  void noise() {
    if (grads_.empty()) return;
    const NormInput<T> input = of_product(kept(HeadPlanes::kNoise, 0), weights_.kNoise);
    const int64_t noise_size = weights_.noise_size();
    const Matrix<T> noise{output<T>(noise_), num_lines_, noise_size}, grad = plane(Planes::kFirst);
    launch(device_,
           HeadNoise<T>{inputs_.seed, inputs_.rows, output<T>(noise_), 0, num_lines_, inputs_.num_rows, noise_size});
    launch(device_, LayerNormBackward<T, Wide>{.input = input,
                                               .weight = weights_.data<Wide>(weights_.kNoiseNorm),
                                               .grad = wide(turn_, 0),
                                               .residual = nullptr,
                                               .stream = nullptr,
                                               .out = const_cast<T*>(grad.data),
                                               .statistics = output<Wide>(statistics_),
                                               .num_lines = num_lines_,
                                               .size = size_,
                                               .eps = inputs_.eps});
    weight_product(~grad, noise, grad_matrix(weights_.kNoise));
    run_products();
    bias(grad, weights_.kNoise);
    launch(device_, NormGradients<T, Wide>{
                        input, output<Wide>(statistics_), wide(turn_, 0), output<Wide>(grads_[weights_.kNoiseNorm]),
                        output<Wide>(grads_[weights_.kNoiseNorm + 1]), num_lines_, size_, output<Wide>(partial_)});
  }

  // The gradient of every block's half to hidden [R, H].
  void context(const T* hidden, T* grad_hidden) {
    const int64_t num_rows = inputs_.num_rows;
    const NormInput<T> input = of_product(row_kept(HeadPlanes::kHidden), weights_.kHidden);
    const Matrix<T> grad = rows(kGradHalf);  // of the hidden map's product from here on
    launch(device_, LayerNormBackward<T>{.input = input,
                                         .weight = weights_.data<Wide>(weights_.kHiddenNorm),
                                         .grad = rows(kGradContext).data,
                                         .residual = nullptr,
                                         .stream = nullptr,
                                         .out = const_cast<T*>(grad.data),
                                         .statistics = output<Wide>(statistics_),
                                         .num_lines = num_rows,
                                         .size = size_,
                                         .eps = inputs_.eps});
    each_tile<Device, T>(num_rows, head_tile<Device>(num_rows, size_, sizeof(T)), like_,
                         [&](int64_t row, int64_t count, int64_t, const auto& product) {
                           product(Matrix<T>{grad.data + row * size_, count, size_},
                                   weights_.matrix<T>(weights_.kHidden),
                                   Matrix<T>{grad_hidden + row * size_, count, size_});
                         });
    if (grads_.empty()) return;
    weight_product(~grad, Matrix<T>{hidden, num_rows, size_}, grad_matrix(weights_.kHidden));
    run_products();
    bias(grad, weights_.kHidden);
    launch(device_,
           NormGradients<T>{input, output<Wide>(statistics_), rows(kGradContext).data,
                            output<Wide>(grads_[weights_.kHiddenNorm]), output<Wide>(grads_[weights_.kHiddenNorm + 1]),
                            num_rows, size_, output<Wide>(partial_)});
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<T, Wide>;
  static constexpr int64_t kGradHalf = 0, kProduct = 1, kGradContext = 2;  // planes of T [R, H]

  struct Product {
    Matrix<T> a, b, out;
  };

  // ---- where tensors lie ----

  Matrix<T> plane(int64_t index, int64_t line, int64_t count, int64_t width = 1) const {
    return {output<T>(planes_) + (index * num_lines_ + line * width) * size_, count, width * size_};
  }
  Matrix<T> plane(int64_t index) const { return plane(index, 0, num_lines_); }
  Matrix<T> rows(int64_t index) const {
    const int64_t num_rows = inputs_.num_rows;
    return {output<T>(row_planes_) + index * num_rows * size_, num_rows, size_};
  }
  Wide* wide(int64_t turn, int64_t line) const {
    return output<Wide>(wide_planes_) + (turn * num_lines_ + line) * size_;
  }
  // The stream's gradient as products take it.
  Matrix<T> stream(int64_t turn, int64_t line, int64_t count) const {
    if constexpr (kNarrow)
      return plane(Planes::kStream + turn, line, count);
    else
      return {wide(turn, line), count, size_};
  }
  Matrix<T> stream(int64_t turn) const { return stream(turn, 0, num_lines_); }
  const T* kept(int64_t index, int64_t line, int64_t width = 1) const {
    return products_ + (index * num_lines_ + line * width) * size_;
  }
  const T* row_kept(int64_t index) const { return contexts_ + index * inputs_.num_rows * size_; }
  NormInput<T> of_stream(int64_t block, int64_t line) const {
    return {stream_ + (block * num_lines_ + line) * size_, nullptr, nullptr};
  }
  NormInput<T> of_product(const T* product, int64_t index) const {
    return {nullptr, product, weights_.data<T>(index + 1)};
  }
  Matrix<T> grad_matrix(int64_t index) const {
    const Tensor& grad = grads_[index];
    return {output<T>(grad), grad.size(0), grad.size(1)};
  }

  // ---- steps of a tile ----

  template <class Body>
  void tiles(const Body& body) const {
    each_tile<Device, T>(
        num_lines_, head_tile<Device>(num_lines_, size_, sizeof(T)), like_,
        [&](int64_t line, int64_t count, int64_t, const auto& product) { body(line, count, product); });
  }

  void add_silu(const T* product, const T* added, int64_t period, int64_t grad, int64_t out, int64_t line,
                int64_t count) const {
    T* grad_data = const_cast<T*>(plane(grad, line, count).data);
    launch(device_, AddSiluBackward<T>{.product = product,
                                       .added = added,
                                       .grad = grad_data,
                                       .grad_product = grad_data,
                                       .out = const_cast<T*>(plane(out, line, count).data),
                                       .first_line = line,
                                       .num_lines = count,
                                       .period = period,
                                       .size = size_});
  }

  // Through the norm in front of a block, and the norm once more, to the stream's gradient of the other turn.
  void norm(int64_t block, const Wide* residual, int64_t line, int64_t count) const {
    const Wide* weight = weights_.data<Wide>(weights_.norm(block));
    if (!grads_.empty()) {
      launch(device_, LayerNorm<T>{.input = of_stream(block, line),
                                   .sum = nullptr,
                                   .weight = weight,
                                   .bias = weights_.data<Wide>(weights_.norm(block) + 1),
                                   .out = const_cast<T*>(plane(Planes::kNormal, line, count).data),
                                   .num_lines = count,
                                   .size = size_,
                                   .eps = inputs_.eps});
    }
    T* narrow = kNarrow ? const_cast<T*>(stream(1 - turn_, line, count).data) : nullptr;
    launch(device_, LayerNormBackward<T>{.input = of_stream(block, line),
                                         .weight = weight,
                                         .grad = plane(Planes::kGradNormal, line, count).data,
                                         .residual = residual,
                                         .stream = wide(1 - turn_, line),
                                         .out = narrow,
                                         .statistics = output<Wide>(statistics_) + 2 * line,
                                         .num_lines = count,
                                         .size = size_,
                                         .eps = inputs_.eps});
  }

  // The draws of a row share their context.
  void context_of_block(int64_t block) const {
    const int64_t num_rows = inputs_.num_rows, columns = num_rows * size_;
    if (num_rows == 0) return;
    launch(device_, ColumnSums<T>{plane(Planes::kFirst).data, const_cast<T*>(rows(kGradHalf).data),
                                  num_lines_ / num_rows, columns, output<Wide>(partial_)});
    each_tile<Device, T>(num_rows, head_tile<Device>(num_rows, size_, sizeof(T)), like_,
                         [&](int64_t row, int64_t count, int64_t, const auto& product) {
                           auto part = [&](int64_t index) {
                             return Matrix<T>{rows(index).data + row * size_, count, size_};
                           };
                           product(part(kGradHalf), weights_.first_of_context<T>(block), part(kProduct));
                         });
    T* sum = const_cast<T*>(rows(kGradContext).data);
    launch(device_, AddResidual<T>{sum, rows(kProduct).data, sum, columns});
  }

  // ---- gradients of weights ----

  // Adds out = a b to the products to come, some of its rows to a task.
  void weight_product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
    const int64_t most = std::is_same_v<Device, Cpu> ? 128 : std::max<int64_t>(1, out.rows);
    for (int64_t row = 0; row < out.rows; row += most) {
      const int64_t count = std::min(most, out.rows - row);
      coming_.push_back({~(~a).column_range(row, count), b, ~(~out).column_range(row, count)});
    }
  }

  void run_products() {
    each_task<Device>(static_cast<int64_t>(coming_.size()), [&](int64_t task, int64_t) {
      const Product& product = coming_[task];
      multiply<Device>(product.a, product.b, product.out, like_);
    });
    coming_.clear();
  }

  void bias(const Matrix<T>& grad, int64_t index) const {
    launch(device_,
           ColumnSums<T>{grad.data, output<T>(grads_[index + 1]), grad.rows, grad.columns, output<Wide>(partial_)});
  }

  void norm_gradients(int64_t block) const {
    const int64_t index = weights_.norm(block);
    launch(device_, NormGradients<T>{of_stream(block, 0), output<Wide>(statistics_), plane(Planes::kGradNormal).data,
                                     output<Wide>(grads_[index]), output<Wide>(grads_[index + 1]), num_lines_, size_,
                                     output<Wide>(partial_)});
  }

  Device device_;
  const HeadInputs& inputs_;
  const HeadWeights& weights_;
  int64_t num_lines_, size_ = weights_.size(), turn_ = 0;
  const Tensor& like_;
  std::vector<Tensor>& grads_;
  Tensor planes_, wide_planes_, statistics_, partial_, noise_, row_planes_;
  const T *products_, *contexts_;
  const Wide* stream_;
  std::vector<Product> coming_;
};

// grad_latents [S, R, L] of hidden's dtype, the arguments and what the forward kept -> grad_hidden [R, H], and the
// weights' gradients if `need_grad_weights`
template <class Device>
std::tuple<Tensor, std::vector<Tensor>> sample_latents_backward(const Tensor& grad_latents, const Tensor& hidden,
                                                                std::vector<Tensor> weights, const Tensor& seed,
                                                                const Tensor& rows, const Tensor& products,
                                                                const Tensor& stream, const Tensor& contexts,
                                                                double eps, bool need_grad_weights) {
  STD_TORCH_CHECK(hidden.dim() == 2 && grad_latents.dim() == 3, "sample_latents_backward: hidden must be [R, H]");
  const int64_t num_rows = hidden.size(0), size = hidden.size(1), num_lines = grad_latents.size(0) * num_rows;
  const HeadWeights head(weights, hidden);
  const ScalarType type = hidden.scalar_type();
  const int64_t num_blocks = head.num_blocks();
  STD_TORCH_CHECK(
      has_shape(grad_latents, type, {grad_latents.size(0), num_rows, head.latent_size()}) &&
          has_shape(seed, ScalarType::Long, {}) && has_shape(rows, ScalarType::Long, {num_rows}) &&
          has_shape(products, type, {HeadPlanes::count(num_blocks), num_lines, size}) &&
          has_shape(stream, accumulate_type(type), {num_blocks + 1, num_lines, size}) &&
          has_shape(contexts, type, {HeadPlanes::row_count(num_blocks), num_rows, size}),
      "sample_latents_backward: expected grad_latents [S, R, L] and what sample_latents kept of these arguments");

  Guard<Device> guard(hidden);
  Tensor grad_latents_ = guard.factor(grad_latents), hidden_ = guard.factor(hidden), seed_ = guard.contiguous(seed);
  Tensor rows_ = guard.contiguous(rows), products_ = guard.factor(products), stream_ = guard.contiguous(stream);
  Tensor contexts_ = guard.factor(contexts), grad_hidden = allocate(hidden, {num_rows, size});
  std::vector<Tensor> grads;
  for (const Tensor& weight : head.tensors()) {
    if (need_grad_weights) grads.push_back(allocate(weight, weight.sizes()));
  }
  dispatch<Device>(type, "sample_latents_backward", [&](auto element) {
    using T = decltype(element);
    const HeadInputs inputs{input<int64_t>(seed_), input<int64_t>(rows_), num_rows, eps};
    HeadBackward<Device, T> backward(guard.device(), inputs, head, num_lines, hidden_, products_, stream_, contexts_,
                                     grads);
    backward.last_layers(input<T>(grad_latents_));
    for (int64_t block = num_blocks - 1; block >= 0; --block) backward.block(block);
    backward.noise();
    backward.context(input<T>(hidden_), output<T>(grad_hidden));
  });
  return {grad_hidden, grads};
}

}  // namespace calm_rt
