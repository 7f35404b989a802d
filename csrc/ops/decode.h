// decode: the decoder over tiles of latent vectors, then linear_argmax. A composition: it has no kernel of its own.
#pragma once
#include <vector>

#include "ops/linear_argmax.h"
#include "ops/mlp_layers.h"
#include "ops/product.h"

namespace calm_rt {

// latents [R, L]; latent [H, L] and latent_bias [H]; layers: norm, gate, up and down of each; expand [K H, H] and
// expand_bias [K H]; norm [H], vocabulary [V, H] and its screen -> ids [R, K] int64
template <class Device>
Tensor decode(const Tensor& latents, const Tensor& latent, const Tensor& latent_bias, std::vector<Tensor> patch_layers,
              const Tensor& expand, const Tensor& expand_bias, std::vector<Tensor> token_layers, const Tensor& norm,
              const Tensor& vocabulary, std::optional<Tensor> screen, double eps) {
  STD_TORCH_CHECK(latents.dim() == 2 && latent.dim() == 2 && expand.dim() == 2, "decode: latents must be [R, L]");
  const ScalarType type = latents.scalar_type();
  const int64_t num_rows = latents.size(0), latent_size = latents.size(1), size = norm.numel();
  const int64_t patch = size > 0 ? expand.size(0) / size : 0;
  STD_TORCH_CHECK(
      has_shape(latent, type, {size, latent_size}) && has_shape(latent_bias, type, {size}) &&
          has_shape(expand, type, {patch * size, size}) && has_shape(expand_bias, type, {patch * size}) &&
          has_shape(norm, accumulate_type(type), {size}),
      "decode: latent must be [H, L], expand [K H, H], of latents' dtype, norm [H] of its accumulation type");

  Guard<Device> guard(latents);
  Tensor latents_ = guard.factor(latents), latent_ = guard.factor(latent), latent_bias_ = guard.factor(latent_bias);
  Tensor expand_ = guard.factor(expand), expand_bias_ = guard.factor(expand_bias), norm_ = guard.contiguous(norm);
  const MlpLayers patch_mlps(patch_layers, type, size, guard, "decode"),
      token_mlps(token_layers, type, size, guard, "decode");
  Tensor hidden = allocate(latents, {num_rows * patch, size});

  const int64_t tile = patches_per_task<Device>(num_rows, patch);
  const int64_t hidden_size = aligned(tile * size);
  const int64_t scratch_size = hidden_size + std::max(patch_mlps.scratch(tile), token_mlps.scratch(tile * patch));
  Tensor scratch = allocate(latents, {num_workers<Device>() * scratch_size});
  dispatch<Device>(type, "decode", [&](auto element) {
    using T = decltype(element);
    each_task<Device>(
        (num_rows + tile - 1) / tile,
        [&](int64_t task, int64_t worker) {
          const int64_t row = task * tile, rows = std::min(tile, num_rows - row);
          T* patch_hidden = output<T>(scratch) + worker * scratch_size;
          T* rest = patch_hidden + hidden_size;
          T* token_hidden = output<T>(hidden) + row * patch * size;
          const Matrix<T> patches{patch_hidden, rows, size};
          multiply<Device>(Matrix<T>{input<T>(latents_) + row * latent_size, rows, latent_size},
                           ~Matrix<T>{input<T>(latent_), size, latent_size}, input<T>(latent_bias_), patches, latents_);
          patch_mlps.run(guard.device(), patch_hidden, rows, eps, rest, latents_);
          multiply<Device>(patches, ~Matrix<T>{input<T>(expand_), patch * size, size}, input<T>(expand_bias_),
                           Matrix<T>{token_hidden, rows, patch * size}, latents_);
          token_mlps.run(guard.device(), token_hidden, rows * patch, eps, rest, latents_);
          launch(guard.device(),
                 RmsNorm<T>{token_hidden, input<AccumulateType<T>>(norm_), token_hidden, rows * patch, size, eps});
        },
        size >= kSharedSize);
  });
  return torch::stable::view(linear_argmax<Device>(hidden, vocabulary, screen, {}), {num_rows, patch});
}

}  // namespace calm_rt
