// gated_mlp: tiles of rows, each of them one task from x to out; the library multiplies, kernels normalise, gate and
// add (see kernels/gated_mlp.h).
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

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

// Rows of a task: the two products stay in a core's cache, and there are several tasks for as many threads.
template <class Device>
int64_t gated_mlp_tile(int64_t num_rows, int64_t intermediate_size, int64_t element_size) {
  if (!std::is_same_v<Device, Cpu>) return num_rows;
  constexpr int64_t kTileBytes = 5 << 18;
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

// x [R, H], float or of the weights' dtype; norm_weight [H] of the accumulation type; gate, up [I, H] and down [H, I]
// of one dtype -> out [R, H] of x's dtype, and the products of gate and up, [R, I] if `keep_products`, otherwise [0]
template <class Device>
std::tuple<Tensor, Tensor, Tensor> gated_mlp(const Tensor& x, const Tensor& norm_weight, const Tensor& gate,
                                             const Tensor& up, const Tensor& down, double eps, bool keep_products) {
  STD_TORCH_CHECK(x.dim() == 2 && gate.dim() == 2, "gated_mlp: x must be [R, H] and gate [I, H]");
  const int64_t num_rows = x.size(0), hidden_size = x.size(1), intermediate_size = gate.size(0);
  auto is_matrix = [&](const Tensor& matrix, int64_t rows, int64_t columns) {
    return matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns &&
           matrix.scalar_type() == gate.scalar_type();
  };
  STD_TORCH_CHECK(is_matrix(gate, intermediate_size, hidden_size) && is_matrix(up, intermediate_size, hidden_size) &&
                      is_matrix(down, hidden_size, intermediate_size),
                  "gated_mlp: gate and up must be [I, H] and down [H, I], all of one dtype");
  STD_TORCH_CHECK(norm_weight.dim() == 1 && norm_weight.size(0) == hidden_size &&
                      norm_weight.scalar_type() == accumulate_type(x.scalar_type()),
                  "gated_mlp: norm_weight must be [H] in the accumulation type of x");

  Guard<Device> guard(x);
  using torch::stable::contiguous, torch::stable::new_empty;
  Tensor x_ = contiguous(x), norm_weight_ = contiguous(norm_weight);
  Tensor gate_ = contiguous(gate), up_ = contiguous(up), down_ = contiguous(down);
  Tensor out = new_empty(x, {num_rows, hidden_size});
  auto product = [&] { return keep_products ? new_empty(gate, {num_rows, intermediate_size}) : new_empty(gate, {0}); };
  Tensor gate_product = product(), up_product = product();
  const int64_t tile = gated_mlp_tile<Device>(num_rows, intermediate_size, gate.element_size());
  const int64_t scratch_size = gated_mlp_scratch(tile, hidden_size, intermediate_size);
  Tensor scratch = new_empty(gate, {num_workers<Device>() * scratch_size});
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
    each_task<Device>((num_rows + tile - 1) / tile, [&](int64_t task, int64_t worker) {
      const int64_t row = task * tile, rows = std::min(tile, num_rows - row);
      GatedMlpProducts<T> kept;
      if (keep_products) kept = {gate_data + row * intermediate_size, up_data + row * intermediate_size};
      gated_mlp_rows(guard.device(), x_data + row * hidden_size, rows, weights, eps,
                     scratch_data + worker * scratch_size, out_data + row * hidden_size, gate_, kept);
    });
  });
  return {out, gate_product, up_product};
}

}  // namespace calm_rt
