// encode: the encoder over tiles of patches, everything between the ids and the posterior in one task's scratch; the
// library multiplies (see kernels/encode.h and kernels/gated_mlp.h).
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/encode.h"
#include "ops/mlp_layers.h"
#include "ops/product.h"

namespace calm_rt {

// ids [R, K] int64; layers: norm, gate, up and down of each. With a squeeze [H, K H] and its bias [H], tables is the
// embedding [V, H]; without, the encoder is folded and tables is [K, V, H]. norm [H], latent [2 L, H], latent_bias [2
// L]
// -> mean, log_std [R, L]
template <class Device>
std::tuple<Tensor, Tensor> encode(const Tensor& ids, const Tensor& tables, std::vector<Tensor> token_layers,
                                  std::optional<Tensor> squeeze, std::optional<Tensor> squeeze_bias,
                                  std::vector<Tensor> patch_layers, const Tensor& norm, const Tensor& latent,
                                  const Tensor& latent_bias, double eps) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(1) > 0 && ids.scalar_type() == ScalarType::Long,
                  "encode: ids must be [R, K] int64 with K > 0");
  const bool folded = !squeeze.has_value();
  const int64_t num_rows = ids.size(0), patch = ids.size(1), size = norm.numel(), latent_size = latent.size(0) / 2;
  STD_TORCH_CHECK(folded ? tables.dim() == 3 && tables.size(0) == patch && tables.size(2) == size
                         : tables.dim() == 2 && tables.size(1) == size,
                  "encode: tables must be [V, H] with a squeeze and [K, V, H] without");
  const ScalarType type = tables.scalar_type();
  STD_TORCH_CHECK(folded || (squeeze_bias && has_shape(*squeeze, type, {size, patch * size}) &&
                             has_shape(*squeeze_bias, type, {size})),
                  "encode: squeeze must be [H, K H] and squeeze_bias [H]");
  STD_TORCH_CHECK(
      has_shape(norm, accumulate_type(type), {size}) && has_shape(latent, type, {2 * latent_size, size}) &&
          has_shape(latent_bias, type, {2 * latent_size}),
      "encode: norm must be [H] in the accumulation type, latent [2 L, H] and latent_bias [2 L] of tables' dtype");

  Guard<Device> guard(ids);
  Tensor ids_ = guard.contiguous(ids), tables_ = guard.contiguous(tables), norm_ = guard.contiguous(norm);
  Tensor latent_ = guard.factor(latent), latent_bias_ = guard.factor(latent_bias);
  Tensor squeeze_ = folded ? tables_ : guard.factor(*squeeze),
         squeeze_bias_ = folded ? norm_ : guard.factor(*squeeze_bias);
  const MlpLayers token_mlps(token_layers, type, size, guard, "encode"),
      patch_mlps(patch_layers, type, size, guard, "encode");
  Tensor mean = allocate(tables, {num_rows, latent_size}), log_std = allocate(tables, {num_rows, latent_size});

  const int64_t tile = patches_per_task<Device>(num_rows, folded ? 1 : patch), tokens = folded ? 0 : tile * patch;
  const int64_t hidden_size = aligned(tile * size), token_hidden_size = aligned(tokens * size);
  const int64_t mlp_scratch = std::max(token_mlps.scratch(tokens), patch_mlps.scratch(tile));
  const int64_t scratch_size = hidden_size + token_hidden_size + mlp_scratch;
  Tensor scratch = allocate(tables, {num_workers<Device>() * scratch_size});
  dispatch<Device>(type, "encode", [&](auto element) {
    using T = decltype(element);
    const Matrix<T> mean_weight{input<T>(latent_), latent_size, size};
    const Matrix<T> log_std_weight{mean_weight.data + latent_size * size, latent_size, size};
    each_task<Device>((num_rows + tile - 1) / tile,
                      [&](int64_t task, int64_t worker) {
                        const int64_t row = task * tile, rows = std::min(tile, num_rows - row);
                        T* hidden = output<T>(scratch) + worker * scratch_size;
                        T* token_hidden = hidden + hidden_size;
                        T* rest = token_hidden + token_hidden_size;
                        const Matrix<T> patches{hidden, rows, size};
                        launch(guard.device(), GatherSum<T>{.ids = input<int64_t>(ids_) + row * patch,
                                                            .tables = input<T>(tables_),
                                                            .out = folded ? hidden : token_hidden,
                                                            .num_rows = folded ? rows : rows * patch,
                                                            .num_tables = folded ? patch : 1,
                                                            .vocabulary = tables.size(-2),
                                                            .size = size});
                        if (!folded) {
                          token_mlps.run(guard.device(), token_hidden, rows * patch, eps, rest, tables_);
                          multiply<Device>(Matrix<T>{token_hidden, rows, patch * size},
                                           ~Matrix<T>{input<T>(squeeze_), size, patch * size}, input<T>(squeeze_bias_),
                                           patches, tables_);
                        }
                        patch_mlps.run(guard.device(), hidden, rows, eps, rest, tables_);
                        launch(guard.device(),
                               RmsNorm<T>{hidden, input<AccumulateType<T>>(norm_), hidden, rows, size, eps});
                        multiply<Device>(patches, ~mean_weight, input<T>(latent_bias_),
                                         Matrix<T>{output<T>(mean) + row * latent_size, rows, latent_size}, tables_);
                        multiply<Device>(patches, ~log_std_weight, input<T>(latent_bias_) + latent_size,
                                         Matrix<T>{output<T>(log_std) + row * latent_size, rows, latent_size}, tables_);
                      },
                      size >= kSharedSize);
  });
  return {mean, log_std};
}

}  // namespace calm_rt
