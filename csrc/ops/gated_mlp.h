// gated_mlp: tiles of rows, each of them one task from x to out; the library multiplies, kernels normalise, gate and
// add (see kernels/gated_mlp.h).
#pragma once
#include <algorithm>
#include <tuple>

#include "kernels/gated_mlp.h"
#include "ops/product.h"

namespace calm_rt {

template <class T>
struct MlpWeights {
  const AccumulateType<T>* norm;  // [H]
  Matrix<T> gate, up, down;       // [I, H], [I, H], [H, I]

  int64_t hidden_size() const { return down.rows; }
  int64_t intermediate_size() const { return down.columns; }
};

// Where the products of `gate` and `up` stay for the backward; nowhere without one.
template <class T>
struct GatedMlpProducts {
  T *gate = nullptr, *up = nullptr;  // [R, I]
};

// What `count` elements take up, so that whatever follows them is aligned as they are: the library's bits may depend on
// it.
inline int64_t aligned(int64_t count) { return (count + 63) / 64 * 64; }

inline int64_t gated_mlp_scratch(int64_t rows, int64_t hidden_size, int64_t intermediate_size) {
  return aligned(rows * hidden_size) + 2 * aligned(rows * intermediate_size);
}

constexpr int64_t kFewRows = 512;     // of which no tasks are made, so that weights are packed once
constexpr int64_t kSharedSize = 128;  // from which H on their products are worth several threads

// Rows of a tile on the GPU, where tiles follow each other: memory does not grow with R, and the intermediate, 21 MB in
// bfloat16 at I 1,280, stays in the 50 MB of an H200's second cache.
constexpr int64_t kCudaTileRows = 4096;

// Rows of a task on the CPU: as many as make packing the weights cheap, and several tasks for as many threads. 2,048
// rows at H 512 and I 1,280 take 31 ms in tiles of 128, whose products stay in the second cache, and 28 ms in tiles of
// 256.
template <class Device>
int64_t gated_mlp_tile(int64_t num_rows, int64_t intermediate_size, int64_t element_size) {
  if (std::is_same_v<Device, Cuda>) return std::min(num_rows, kCudaTileRows);
  if (num_rows <= kFewRows) return num_rows;
  constexpr int64_t kTileBytes = 5 << 20;
  const int64_t most = std::clamp<int64_t>(kTileBytes / (2 * element_size * intermediate_size + 1), 32, 1024);
  const int64_t num_tiles = std::max((num_rows + most - 1) / most, std::min<int64_t>(8, (num_rows + 15) / 16));
  return num_tiles == 0 ? 0 : (num_rows + num_tiles - 1) / num_tiles;
}

// out [rows, H] = x + down (silu(gate n) * up n) with n = rms_norm(x), in a task; out may be x. `scratch` holds
// gated_mlp_scratch(rows, H, I) elements; `like` has the device and type of the weights.
template <class Device, class X, class T>
void gated_mlp_rows(Device device, const X* x, int64_t rows, const MlpWeights<T>& weights, double eps, T* scratch,
                    X* out, const Tensor& like, GatedMlpProducts<T> kept = {}) {
  const int64_t hidden_size = weights.hidden_size(), intermediate_size = weights.intermediate_size();
  const Matrix<T> normal{scratch, rows, hidden_size};  // and then the product of `down`
  T* gated = scratch + aligned(rows * hidden_size);
  T* gate = kept.gate ? kept.gate : gated;
  T* up = kept.up ? kept.up : gated + aligned(rows * intermediate_size);
  launch(device, RmsNorm<X, T>{x, weights.norm, scratch, rows, hidden_size, eps});
  multiply<Device>(normal, ~weights.gate, Matrix<T>{gate, rows, intermediate_size}, like);
  multiply<Device>(normal, ~weights.up, Matrix<T>{up, rows, intermediate_size}, like);
  launch(device, SwiGlu<T>{gate, up, gated, rows * intermediate_size});
  multiply<Device>(Matrix<T>{gated, rows, intermediate_size}, ~weights.down, normal, like);
  launch(device, AddResidual<X, T>{x, scratch, out, rows * hidden_size});
}

// Calls body with values of x's type and of the weights' type.
template <class Device, class Body>
void dispatch_mixed(ScalarType x_type, ScalarType type, const char* op, const Body& body) {
  dispatch<Device>(type, op, [&](auto element) {
    if (x_type == type) return body(element, element);
    if constexpr (sizeof(element) == 2) {
      if (x_type == ScalarType::Float) return body(float{}, element);
    }
    STD_TORCH_CHECK(false, op, ": x must have the weights' dtype or be float beside 16-bit weights");
  });
}

// What both directions take: x [R, H], float or of the weights' dtype; norm_weight [H] of the accumulation type; gate,
// up [I, H] and down [H, I] of one dtype.
inline void check_gated_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& gate, const Tensor& up,
                            const Tensor& down) {
  STD_TORCH_CHECK(x.dim() == 2 && gate.dim() == 2, "gated_mlp: x must be [R, H] and gate [I, H]");
  const int64_t hidden_size = x.size(1), intermediate_size = gate.size(0);
  const ScalarType type = gate.scalar_type();
  STD_TORCH_CHECK(has_shape(gate, type, {intermediate_size, hidden_size}) &&
                      has_shape(up, type, {intermediate_size, hidden_size}) &&
                      has_shape(down, type, {hidden_size, intermediate_size}),
                  "gated_mlp: gate and up must be [I, H] and down [H, I], all of one dtype");
  STD_TORCH_CHECK(has_shape(norm_weight, accumulate_type(x.scalar_type()), {hidden_size}),
                  "gated_mlp: norm_weight must be [H] in the accumulation type of x");
}

// -> out [R, H] of x's dtype, and the products of gate and up, [R, I] if `keep_products`, otherwise [0]
template <class Device>
std::tuple<Tensor, Tensor, Tensor> gated_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& gate,
                                             const Tensor& up, const Tensor& down, double eps, bool keep_products) {
  check_gated_mlp(x, norm_weight, gate, up, down);
  const int64_t num_rows = x.size(0), hidden_size = x.size(1), intermediate_size = gate.size(0);

  Guard<Device> guard(x);
  Tensor x_ = guard.contiguous(x), norm_weight_ = guard.contiguous(norm_weight);
  Tensor gate_ = guard.factor(gate), up_ = guard.factor(up), down_ = guard.factor(down);
  Tensor out = allocate(x, {num_rows, hidden_size});
  auto product = [&] { return keep_products ? allocate(gate, {num_rows, intermediate_size}) : allocate(gate, {0}); };
  Tensor gate_product = product(), up_product = product();
  const int64_t tile = gated_mlp_tile<Device>(num_rows, intermediate_size, gate.element_size());
  const int64_t scratch_size = gated_mlp_scratch(tile, hidden_size, intermediate_size);
  Tensor scratch = allocate(gate, {num_workers<Device>() * scratch_size});
  if (num_rows == 0) return {out, gate_product, up_product};

  dispatch_mixed<Device>(x.scalar_type(), gate.scalar_type(), "gated_mlp", [&](auto x_element, auto element) {
    using X = decltype(x_element);
    using T = decltype(element);
    const MlpWeights<T> weights{input<AccumulateType<T>>(norm_weight_),
                                {input<T>(gate_), intermediate_size, hidden_size},
                                {input<T>(up_), intermediate_size, hidden_size},
                                {input<T>(down_), hidden_size, intermediate_size}};
    const X* x_data = input<X>(x_);
    X* out_data = output<X>(out);
    T *scratch_data = output<T>(scratch), *gate_data = output<T>(gate_product), *up_data = output<T>(up_product);
    each_task<Device>((num_rows + tile - 1) / tile,
                      [&](int64_t task, int64_t worker) {
                        const int64_t row = task * tile, rows = std::min(tile, num_rows - row);
                        GatedMlpProducts<T> kept;
                        if (keep_products)
                          kept = {gate_data + row * intermediate_size, up_data + row * intermediate_size};
                        gated_mlp_rows(guard.device(), x_data + row * hidden_size, rows, weights, eps,
                                       scratch_data + worker * scratch_size, out_data + row * hidden_size, gate_, kept);
                      },
                      hidden_size >= kSharedSize);
  });
  return {out, gate_product, up_product};
}

// grad_out [R, H] of x's dtype, grad_product the same in the weights' dtype, gate_product and up_product from the
// forward
// -> grad_x [R, H], grad_norm_weight [H]; grad_gate and grad_up [I, H], grad_down [H, I], or [0] each
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_mlp_backward(
    const Tensor& grad_out, const Tensor& grad_product, const Tensor& x, const Tensor& norm_weight, const Tensor& gate,
    const Tensor& up, const Tensor& down, const Tensor& gate_product, const Tensor& up_product, double eps,
    bool need_grad_matrices) {
  check_gated_mlp(x, norm_weight, gate, up, down);
  const int64_t num_rows = x.size(0), hidden_size = x.size(1), intermediate_size = gate.size(0);
  const ScalarType type = gate.scalar_type();
  STD_TORCH_CHECK(has_shape(grad_out, x.scalar_type(), {num_rows, hidden_size}) &&
                      has_shape(grad_product, type, {num_rows, hidden_size}) &&
                      has_shape(gate_product, type, {num_rows, intermediate_size}) &&
                      has_shape(up_product, type, {num_rows, intermediate_size}),
                  "gated_mlp_backward: gradients must be [R, H] and products [R, I]");

  Guard<Device> guard(x);
  Tensor grad_out_ = guard.contiguous(grad_out), grad_product_ = guard.factor(grad_product);
  Tensor x_ = guard.contiguous(x), norm_weight_ = guard.contiguous(norm_weight);
  Tensor gate_ = guard.factor(gate), up_ = guard.factor(up), down_ = guard.factor(down);
  Tensor gate_product_ = guard.contiguous(gate_product), up_product_ = guard.contiguous(up_product);
  auto matrix = [&](int64_t rows, int64_t columns) {
    return need_grad_matrices ? allocate(gate, {rows, columns}) : allocate(gate, {0});
  };
  Tensor grad_x = allocate(x, {num_rows, hidden_size}), grad_norm_weight = allocate(norm_weight, {hidden_size});
  Tensor grad_gate = matrix(intermediate_size, hidden_size), grad_up = matrix(intermediate_size, hidden_size);
  Tensor grad_down = matrix(hidden_size, intermediate_size);

  const int64_t tile = gated_mlp_tile<Device>(num_rows, intermediate_size, gate.element_size());
  const int64_t num_tiles = tile == 0 ? 0 : (num_rows + tile - 1) / tile;
  const int64_t partials_of_tile = (tile + kPartialRows - 1) / kPartialRows;
  Tensor partial = allocate(norm_weight, {num_tiles * partials_of_tile, hidden_size});
  torch::stable::fill_(partial, 0);
  // What the gradients of the matrices take of all rows: the normalised input, silu(gate n) * up n, and the gradients
  // of gate n and up n.
  Tensor normal = allocate(gate, {num_rows, hidden_size}), gated = allocate(gate, {num_rows, intermediate_size});
  Tensor grad_gate_product = allocate(gate, {num_rows, intermediate_size});
  Tensor grad_up_product = allocate(gate, {num_rows, intermediate_size});
  const int64_t scratch_size = aligned(tile * hidden_size);
  Tensor scratch = allocate(gate, {num_workers<Device>() * 2 * scratch_size});

  dispatch_mixed<Device>(x.scalar_type(), type, "gated_mlp_backward", [&](auto x_element, auto element) {
    using X = decltype(x_element);
    using T = decltype(element);
    using Wide = AccumulateType<T>;
    const Wide* norm_data = input<Wide>(norm_weight_);
    T *normal_data = output<T>(normal), *gated_data = output<T>(gated);
    T *grad_gate_data = output<T>(grad_gate_product), *grad_up_data = output<T>(grad_up_product);
    each_task<Device>(
        num_tiles,
        [&](int64_t task, int64_t worker) {
          const int64_t row = task * tile, rows = std::min(tile, num_rows - row);
          const int64_t of_hidden = row * hidden_size, of_products = row * intermediate_size;
          const X* x_rows = input<X>(x_) + of_hidden;
          const auto products = [&](const T* data) { return Matrix<T>{data + of_products, rows, intermediate_size}; };
          T* grad_normal = output<T>(scratch) + worker * 2 * scratch_size;
          launch(guard.device(), RmsNorm<X, T>{x_rows, norm_data, normal_data + of_hidden, rows, hidden_size, eps});
          multiply<Device>(Matrix<T>{input<T>(grad_product_) + of_hidden, rows, hidden_size},
                           Matrix<T>{input<T>(down_), hidden_size, intermediate_size}, products(gated_data), gate_);
          launch(guard.device(), SwiGluBackward<T>{.gate = input<T>(gate_product_) + of_products,
                                                   .up = input<T>(up_product_) + of_products,
                                                   .grad_gated = gated_data + of_products,
                                                   .grad_gate = grad_gate_data + of_products,
                                                   .grad_up = grad_up_data + of_products,
                                                   .gated = gated_data + of_products,
                                                   .count = rows * intermediate_size});
          multiply<Device>(products(grad_gate_data), Matrix<T>{input<T>(gate_), intermediate_size, hidden_size},
                           Matrix<T>{grad_normal, rows, hidden_size}, gate_);
          multiply<Device>(products(grad_up_data), Matrix<T>{input<T>(up_), intermediate_size, hidden_size},
                           Matrix<T>{grad_normal + scratch_size, rows, hidden_size}, gate_);
          launch(guard.device(),
                 RmsNormBackward<X, T>{.x = x_rows,
                                       .weight = norm_data,
                                       .grad_normal = {grad_normal, grad_normal + scratch_size},
                                       .grad_out = input<X>(grad_out_) + of_hidden,
                                       .grad_x = output<X>(grad_x) + of_hidden,
                                       .partial = output<Wide>(partial) + task * partials_of_tile * hidden_size,
                                       .num_rows = rows,
                                       .size = hidden_size,
                                       .eps = eps});
        },
        hidden_size >= kSharedSize);
    launch(guard.device(), SumRows<Wide>{input<Wide>(partial), output<Wide>(grad_norm_weight),
                                         num_tiles * partials_of_tile, hidden_size});
    if (!need_grad_matrices) return;

    // A task is a range of the rows of one gradient.
    const Matrix<T> all_normal{normal_data, num_rows, hidden_size}, all_gated{gated_data, num_rows, intermediate_size};
    const auto product_task = [&](const T* left, int64_t left_size, const Matrix<T>& right, const Tensor& out,
                                  int64_t first, int64_t count) {
      const Matrix<T> columns{left + first, num_rows, count, false, left_size};
      multiply<Device>(~columns, right, Matrix<T>{output<T>(out) + first * right.columns, count, right.columns}, gate_);
    };
    const int64_t parts = std::is_same_v<Device, Cpu> ? 4 : 1;
    each_task<Device>(3 * parts, [&](int64_t task, int64_t) {
      const int64_t size = task / parts == 2 ? hidden_size : intermediate_size, part = task % parts;
      const int64_t each = (size + parts - 1) / parts, first = part * each, count = std::min(each, size - first);
      if (count <= 0) return;
      if (task / parts == 0) product_task(grad_gate_data, size, all_normal, grad_gate, first, count);
      if (task / parts == 1) product_task(grad_up_data, size, all_normal, grad_up, first, count);
      if (task / parts == 2) product_task(input<T>(grad_product_), size, all_gated, grad_down, first, count);
    });
  });
  return {grad_x, grad_norm_weight, grad_gate, grad_up, grad_down};
}

}  // namespace calm_rt
