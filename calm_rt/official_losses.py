"""The official code's training losses in eager PyTorch: what a training step here is timed against.

On the parameters of our modules, with the tensors that the official code makes and with torch's own
generator. Each takes its random numbers as arguments too, so that the same numbers give the same
loss as losses.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt import official, reference
from calm_rt.losses import MASK_ID
from calm_rt.nn import Autoencoder, Calm


class AutoencoderNoise(NamedTuple):
    """The random numbers of one autoencoder loss."""

    masked: Tensor  # [R, K] bool, input tokens that become MASK_ID
    eps: Tensor  # [R, L] normals
    kept: Tensor  # [R, L] bool, what dropout leaves of the latent vector


class EnergyNoise(NamedTuple):
    """The random numbers of one energy loss."""

    head: Tensor  # [S, R, N], uniform in [-0.5, 0.5)
    eps: Tensor  # [M, R, L] normals


def autoencoder_loss(
    model: Autoencoder, ids: Tensor, noise: AutoencoderNoise | None = None
) -> Tensor:
    """`Autoencoder.forward`: all logits, and once more in float32.

    ids: [B, P K] int64.
    returns: [].
    """
    config = model.config
    patches = ids.reshape(-1, config.patch_size)  # [R, K]
    if noise is None:
        noise = _autoencoder_noise(model, patches)
    inputs = torch.where(noise.masked, MASK_ID, patches)
    mean, log_std = official.encode(inputs, model.encoder.weights(), eps=config.rms_norm_eps)
    latents = (mean + log_std.exp() * noise.eps) * noise.kept / (1 - config.ae_dropout)
    weights = model.decoder.weights()
    hidden = reference.decode_hidden(latents, weights, config.rms_norm_eps).flatten(0, 1)
    cross_entropy = official.linear_cross_entropy(hidden, weights.vocabulary, patches.flatten())
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    clipped = kl.clamp(min=config.kl_clamp).sum(-1).mean()
    return config.patch_size * cross_entropy + config.kl_weight * clipped


def energy_loss(
    model: Calm, ids: Tensor, num_targets: int = 100, noise: EnergyNoise | None = None
) -> Tensor:
    """`EnergyTransformer.forward`: the encoder on every token, the head on repeated contexts, the
    score through all differences.

    ids: [B, P K] int64, P >= 2.
    returns: [].
    """
    patch_size, autoencoder = model.config.patch_size, model.ae_model
    patches = ids[:, patch_size:].reshape(-1, patch_size)
    with torch.no_grad():
        weights = autoencoder.encoder.weights()
        mean, log_std = official.encode(patches, weights, eps=autoencoder.config.rms_norm_eps)
    hidden = model.hidden_states(ids[:, :-patch_size]).flatten(0, 1)
    head, eps = (None, None) if noise is None else noise
    draws = official.sample_latents(
        hidden, model.generative_head.weights(), num_samples=model.config.num_samples, noise=head
    )
    options = {"num_targets": num_targets, "beta": model.config.beta, "eps": eps}
    return -official.energy_score(draws, mean, log_std, **options).mean()


def _autoencoder_noise(model: Autoencoder, patches: Tensor) -> AutoencoderNoise:
    p, size, device = model.config.ae_dropout, model.config.latent_size, patches.device
    return AutoencoderNoise(
        torch.rand(patches.shape, device=device) < p,
        torch.randn(len(patches), size, device=device),
        torch.rand(len(patches), size, device=device) >= p,
    )
