// sample_latents: tiles of lines (draw, context), each of them one task from its noise to its latent vectors; the
// library multiplies, kernels do what stands between the products (see kernels/sample_latents.h). The context's half
// of every block is computed before, once a row.
#pragma once
#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels/sample_latents.h"
#include "ops/mlp_layers.h"
#include "ops/product.h"

namespace calm_rt {

// The head's tensors, each a matrix [out, in] or the weight of a norm [H], and then its bias: of the noise and its
// norm, of the context and its norm, of the blocks (norm, first, second, third, down), of the last norm and two maps.
class HeadWeights {
 public:
  static constexpr int64_t kNoise = 0, kNoiseNorm = 2, kHidden = 4, kHiddenNorm = 6;

  HeadWeights(const std::vector<Tensor>& weights, const Tensor& hidden)
      : size_(hidden.size(1)), num_blocks_((static_cast<int64_t>(weights.size()) - 14) / 10) {
    STD_TORCH_CHECK(weights.size() >= 14 && weights.size() % 10 == 4, "sample_latents: a block has ten weights");
    const ScalarType type = hidden.scalar_type();
    auto check_norm = [&](int64_t index) {
      STD_TORCH_CHECK(has_shape(weights[index], accumulate_type(type), {size_}) &&
                          has_shape(weights[index + 1], accumulate_type(type), {size_}),
                      "sample_latents: norms must be [H] in the accumulation type of hidden");
    };
    auto check_linear = [&](int64_t index, int64_t outputs, int64_t inputs) {
      STD_TORCH_CHECK(
          has_shape(weights[index], type, {outputs, inputs}) && has_shape(weights[index + 1], type, {outputs}),
          "sample_latents: weights must have the head's shapes and hidden's dtype");
    };
    check_linear(kNoise, size_, weights[kNoise].size(-1));
    check_linear(kHidden, size_, size_);
    for (int64_t index : {kNoiseNorm, kHiddenNorm, norm(num_blocks_)}) check_norm(index);
    for (int64_t block = 0; block < num_blocks_; ++block) {
      check_norm(norm(block));
      check_linear(first(block), size_, 2 * size_);
      check_linear(second(block), size_, size_);
      check_linear(third(block), 2 * size_, size_);
      check_linear(down(block), size_, size_);
    }
    check_linear(final_first(), size_, size_);
    check_linear(final_second(), weights[final_second()].size(0), size_);
    const Operands operands(hidden);
    for (const Tensor& weight : weights) weights_.push_back(operands.factor(weight));
  }

  int64_t size() const { return size_; }  // H
  int64_t num_blocks() const { return num_blocks_; }
  int64_t noise_size() const { return weights_[kNoise].size(1); }           // N
  int64_t latent_size() const { return weights_[final_second()].size(0); }  // L

  static int64_t norm(int64_t block) { return 8 + 10 * block; }  // of num_blocks(): the last norm
  static int64_t first(int64_t block) { return norm(block) + 2; }
  static int64_t second(int64_t block) { return norm(block) + 4; }
  static int64_t third(int64_t block) { return norm(block) + 6; }
  static int64_t down(int64_t block) { return norm(block) + 8; }
  int64_t final_first() const { return norm(num_blocks_) + 2; }
  int64_t final_second() const { return norm(num_blocks_) + 4; }

  const std::vector<Tensor>& tensors() const { return weights_; }
  template <class T>
  const T* data(int64_t index) const {
    return input<T>(weights_[index]);
  }
  template <class T>
  Matrix<T> matrix(int64_t index) const {
    return {data<T>(index), weights_[index].size(0), weights_[index].size(1)};
  }
  // The halves of a block's first matrix, [H, H] each.
  template <class T>
  Matrix<T> first_of_line(int64_t block) const {
    return matrix<T>(first(block)).column_range(0, size_);
  }
  template <class T>
  Matrix<T> first_of_context(int64_t block) const {
    return matrix<T>(first(block)).column_range(size_, size_);
  }

 private:
  int64_t size_, num_blocks_;
  std::vector<Tensor> weights_;
};

// The planes that a forward keeps, each of as many elements as there are lines times H: products [lines, H] of the
// noise, of each block (first, second, and third over two planes), of the last map but one; and of rows, [R, H] each.
struct HeadPlanes {
  static constexpr int64_t kNoise = 0, kHidden = 0, kContext = 1;
  static int64_t first(int64_t block) { return 1 + 4 * block; }
  static int64_t second(int64_t block) { return 2 + 4 * block; }
  static int64_t third(int64_t block) { return 3 + 4 * block; }
  static int64_t final_first(int64_t num_blocks) { return 1 + 4 * num_blocks; }
  static int64_t count(int64_t num_blocks) { return 2 + 4 * num_blocks; }
  static int64_t context(int64_t block) { return 2 + block; }  // its half of the first product, with the bias
  static int64_t row_count(int64_t num_blocks) { return 2 + num_blocks; }
};

// Lines of a task: its tensors stay in a core's cache, and there are several tasks for as many threads. All lines in
// one while reading and packing the weights for each task costs more: 200 lines at H 512 take 11.2 ms in 8 tiles and
// 8.0 ms in one, 1,024 lines 41 and 37 ms.
template <class Device>
int64_t head_tile(int64_t num_lines, int64_t size, int64_t element_size) {
  constexpr int64_t kTileBytes = 5 << 18, kFew = 1024;
  if (!std::is_same_v<Device, Cpu> || num_lines <= kFew) return num_lines;
  const int64_t most = std::clamp<int64_t>(kTileBytes / (5 * element_size * size + 1), 32, 1024);
  const int64_t num_tiles = std::max((num_lines + most - 1) / most, std::min<int64_t>(8, (num_lines + 15) / 16));
  return (num_lines + num_tiles - 1) / num_tiles;
}

// out = a b, or bias + a b.
template <class Device, class T>
struct HeadProduct {
  const Tensor& like;

  void operator()(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out, const T* bias = nullptr) const {
    if (bias) return multiply<Device>(a, b, bias, out, like);
    multiply<Device>(a, b, out, like);
  }
};

// Calls body(first line, number of lines, worker, product) for every tile.
template <class Device, class T, class Body>
void each_tile(int64_t num_lines, int64_t tile, const Tensor& like, const Body& body) {
  if (num_lines == 0) return;
  each_task<Device>((num_lines + tile - 1) / tile,
                    [&](int64_t task, int64_t worker) {
                      const int64_t line = task * tile;
                      body(line, std::min(tile, num_lines - line), worker, HeadProduct<Device, T>{like});
                    },
                    true);
}

// hidden [R, H] through its map and norm, and from there to every block's half: planes of [R, H].
template <class Device, class T>
void head_context(Device device, const T* hidden, int64_t num_rows, const HeadWeights& weights, double eps, T* rows,
                  const Tensor& like) {
  using Wide = AccumulateType<T>;
  const int64_t size = weights.size(), tile = head_tile<Device>(num_rows, size, sizeof(T));
  each_tile<Device, T>(num_rows, tile, like, [&](int64_t row, int64_t count, int64_t, const auto& product) {
    auto plane = [&](int64_t index) { return Matrix<T>{rows + (index * num_rows + row) * size, count, size}; };
    const Matrix<T> mapped = plane(HeadPlanes::kHidden), context = plane(HeadPlanes::kContext);
    product(Matrix<T>{hidden + row * size, count, size}, ~weights.matrix<T>(weights.kHidden), mapped);
    launch(device, LayerNorm<T>{.input = {nullptr, mapped.data, weights.data<T>(weights.kHidden + 1)},
                                .sum = nullptr,
                                .weight = weights.data<Wide>(weights.kHiddenNorm),
                                .bias = weights.data<Wide>(weights.kHiddenNorm + 1),
                                .out = const_cast<T*>(context.data),
                                .num_lines = count,
                                .size = size,
                                .eps = eps});
    for (int64_t block = 0; block < weights.num_blocks(); ++block) {
      product(context, ~weights.first_of_context<T>(block), plane(HeadPlanes::context(block)),
              weights.data<T>(weights.first(block) + 1));
    }
  });
}

// Where a tile's tensors lie: kept ones in planes of all lines, the others in the worker's scratch.
template <class T>
struct HeadTile {
  using Wide = AccumulateType<T>;
  T* products;   // planes of num_lines, or nullptr
  Wide* stream;  // planes of num_lines, or nullptr
  T* scratch;    // head_scratch elements
  Wide* wide_scratch;
  int64_t num_lines, size, line, count;

  T* normal() const { return scratch; }                             // [count, H]
  T* hidden() const { return scratch + aligned(count * size); }     // [count, H]
  T* gates() const { return scratch + 2 * aligned(count * size); }  // [count, 2 H], or the noise
  T* product(int64_t plane, T* spare, int64_t width = 1) const {    // [count, width H]
    return products ? products + (plane * num_lines + width * line) * size : spare;
  }
  Wide* x(int64_t block) const { return stream ? stream + (block * num_lines + line) * size : wide_scratch; }
};

inline int64_t head_scratch(int64_t lines, int64_t size, int64_t noise_size) {
  return 2 * aligned(lines * size) + aligned(lines * std::max(2 * size, noise_size));
}

// What a launch reads beside weights and tiles.
struct HeadInputs {
  const int64_t *seed, *rows;  // [], [R]
  int64_t num_rows;            // R
  double eps;
};

// A tile's lines, from the noise to out [count, L].
template <class Device, class T, class Product>
void head_lines(Device device, const HeadInputs& inputs, const HeadWeights& weights, const T* contexts,
                const HeadTile<T>& tile, T* out, const Product& product) {
  using Wide = AccumulateType<T>;
  const int64_t size = weights.size(), num_blocks = weights.num_blocks(), count = tile.count;
  auto lines = [&](const T* data, int64_t width = 1) { return Matrix<T>{data, count, width * size}; };
  auto add_silu = [&](const T* z, const T* added, int64_t period, T* to) {
    launch(device, AddSilu<T>{z, added, to, tile.line, count, period, size});
  };
  T *normal = tile.normal(), *hidden = tile.hidden();
  Wide* x = tile.x(0);
  auto norm = [&](int64_t block, const T* added, const T* bias, Wide* sum) {
    launch(device, LayerNorm<T>{.input = {x, added, bias},
                                .sum = sum,
                                .weight = weights.data<Wide>(weights.norm(block)),
                                .bias = weights.data<Wide>(weights.norm(block) + 1),
                                .out = normal,
                                .num_lines = count,
                                .size = size,
                                .eps = inputs.eps});
  };

  const Matrix<T> noise{tile.gates(), count, weights.noise_size()};
  launch(device,
         HeadNoise<T>{inputs.seed, inputs.rows, tile.gates(), tile.line, count, inputs.num_rows, weights.noise_size()});
  T* mapped = tile.product(HeadPlanes::kNoise, normal);
  product(noise, ~weights.matrix<T>(weights.kNoise), lines(mapped));
  launch(device, LayerNorm<T, Wide>{.input = {nullptr, mapped, weights.data<T>(weights.kNoise + 1)},
                                    .sum = nullptr,
                                    .weight = weights.data<Wide>(weights.kNoiseNorm),
                                    .bias = weights.data<Wide>(weights.kNoiseNorm + 1),
                                    .out = x,
                                    .num_lines = count,
                                    .size = size,
                                    .eps = inputs.eps});
  norm(0, nullptr, nullptr, nullptr);
  for (int64_t block = 0; block < num_blocks; ++block) {
    T* first = tile.product(HeadPlanes::first(block), hidden);
    product(lines(normal), ~weights.first_of_line<T>(block), lines(first));
    add_silu(first, contexts + HeadPlanes::context(block) * inputs.num_rows * size, inputs.num_rows, hidden);
    T* second = tile.product(HeadPlanes::second(block), normal);
    product(lines(hidden), ~weights.matrix<T>(weights.second(block)), lines(second));
    add_silu(second, weights.data<T>(weights.second(block) + 1), 1, normal);
    T* third = tile.product(HeadPlanes::third(block), tile.gates(), 2);
    product(lines(normal), ~weights.matrix<T>(weights.third(block)), lines(third, 2));
    launch(device, BiasSwiGlu<T>{third, weights.data<T>(weights.third(block) + 1), hidden, count, size});
    product(lines(hidden), ~weights.matrix<T>(weights.down(block)), lines(normal));
    Wide* sum = tile.x(block + 1);
    norm(block + 1, normal, weights.data<T>(weights.down(block) + 1), sum);
    x = sum;
  }
  T* last = tile.product(HeadPlanes::final_first(num_blocks), hidden);
  product(lines(normal), ~weights.matrix<T>(weights.final_first()), lines(last));
  add_silu(last, weights.data<T>(weights.final_first() + 1), 1, hidden);
  product(lines(hidden), ~weights.matrix<T>(weights.final_second()), Matrix<T>{out, count, weights.latent_size()},
          weights.data<T>(weights.final_second() + 1));
}

// hidden [R, H]; weights as in HeadWeights, norms in the accumulation type of hidden, the others of its dtype; seed [],
// rows [R] int64 -> latents [S, R, L], and what the backward needs if `keep`, otherwise [0] each: products [4 B + 2, S
// R, H] and rows [B + 2, R, H] of hidden's dtype, stream [B + 1, S R, H] in its accumulation type, B blocks
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> sample_latents(const Tensor& hidden, std::vector<Tensor> weights,
                                                          const Tensor& seed, const Tensor& rows, int64_t num_samples,
                                                          double eps, bool keep) {
  STD_TORCH_CHECK(hidden.dim() == 2 && num_samples >= 0, "sample_latents: hidden must be [R, H]");
  const int64_t num_rows = hidden.size(0), size = hidden.size(1), num_lines = num_samples * num_rows;
  STD_TORCH_CHECK(has_shape(seed, ScalarType::Long, {}) && has_shape(rows, ScalarType::Long, {num_rows}),
                  "sample_latents: seed must be [] and rows [R] int64");
  const HeadWeights head(weights, hidden);
  const ScalarType type = hidden.scalar_type(), wide = accumulate_type(type);

  Guard<Device> guard(hidden);
  Tensor hidden_ = guard.factor(hidden), seed_ = guard.contiguous(seed), rows_ = guard.contiguous(rows);
  const int64_t num_blocks = head.num_blocks(), latent_size = head.latent_size();
  auto planes = [&](bool needed, int64_t count, int64_t lines, ScalarType element) {
    return needed ? allocate(hidden, {count, lines, size}, element) : allocate(hidden, {0}, element);
  };
  Tensor latents = allocate(hidden, {num_samples, num_rows, latent_size});
  Tensor products = planes(keep, HeadPlanes::count(num_blocks), num_lines, type);
  Tensor stream = planes(keep, num_blocks + 1, num_lines, wide);
  Tensor contexts = planes(true, HeadPlanes::row_count(num_blocks), num_rows, type);

  const int64_t tile = head_tile<Device>(num_lines, size, hidden.element_size());
  const int64_t scratch_size = head_scratch(tile, size, head.noise_size()), wide_size = aligned(tile * size);
  Tensor scratch = allocate(hidden, {num_workers<Device>() * scratch_size});
  Tensor wide_scratch = allocate(hidden, {keep ? 0 : num_workers<Device>() * wide_size}, wide);
  dispatch<Device>(type, "sample_latents", [&](auto element) {
    using T = decltype(element);
    using Wide = AccumulateType<T>;
    head_context<Device, T>(guard.device(), input<T>(hidden_), num_rows, head, eps, output<T>(contexts), hidden_);
    const HeadInputs inputs{input<int64_t>(seed_), input<int64_t>(rows_), num_rows, eps};
    each_tile<Device, T>(num_lines, tile, hidden_,
                         [&](int64_t line, int64_t count, int64_t worker, const auto& product) {
                           const HeadTile<T> place{.products = output<T>(products),
                                                   .stream = output<Wide>(stream),
                                                   .scratch = output<T>(scratch) + worker * scratch_size,
                                                   .wide_scratch = output<Wide>(wide_scratch) + worker * wide_size,
                                                   .num_lines = num_lines,
                                                   .size = size,
                                                   .line = line,
                                                   .count = count};
                           head_lines(guard.device(), inputs, head, input<T>(contexts), place,
                                      output<T>(latents) + line * latent_size, product);
                         });
  });
  return {latents, products, stream, keep ? contexts : planes(false, 0, 0, type)};
}

}  // namespace calm_rt
