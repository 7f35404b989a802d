"""The autoencoder: K tokens to a Gaussian over latent vectors and back (paper section 2).

Modules hold parameters under the official names; the arithmetic is `ops.encode` and `ops.decode`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_rt import ops, reference
from calm_rt.nn.config import AutoencoderConfig
from calm_rt.ops.check import check, check_patches
from calm_rt.reference import DecoderWeights, EncoderWeights, LinearWeights, MlpWeights


def init_weights(module: nn.Module, std: float) -> None:
    """The official initialisation: linear and embedding weights N(0, std), biases 0, norms 1."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H].  returns: [..., H] in x's type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), the MLP of Llama."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H].  returns: [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AutoencoderLayer(nn.Module):
    """The parameters of one residual gated MLP."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def weights(self) -> MlpWeights:
        """The parameters as `ops` take them."""
        mlp = self.mlp
        return MlpWeights(
            self.layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        )


class Encoder(nn.Module):
    """The parameters of the encoder: half of the layers see single tokens, half the whole patch."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden_size)
        self.encoder_layers = nn.ModuleList(
            AutoencoderLayer(config) for _ in range(config.num_encoder_layers)
        )
        self.squeeze_layer = nn.Linear(config.patch_size * hidden_size, hidden_size)
        self.hidden_to_latent = nn.Linear(hidden_size, 2 * config.latent_size)
        self.norm = RMSNorm(hidden_size, config.rms_norm_eps)

    def weights(self) -> EncoderWeights:
        """The parameters as `ops.encode` takes them."""
        layers = [layer.weights() for layer in self.encoder_layers]
        half = len(layers) // 2
        return EncoderWeights(
            self.embed_tokens.weight,
            layers[:half],
            LinearWeights(self.squeeze_layer.weight, self.squeeze_layer.bias),
            layers[half:],
            self.norm.weight,
            LinearWeights(self.hidden_to_latent.weight, self.hidden_to_latent.bias),
        )


class Decoder(nn.Module):
    """The parameters of the decoder; `lm_head_weight` is the encoder's embedding."""

    def __init__(self, config: AutoencoderConfig, embedding: nn.Parameter):
        super().__init__()
        hidden_size = config.hidden_size
        self.lm_head_weight = embedding
        self.latent_to_hidden = nn.Linear(config.latent_size, hidden_size)
        self.decoder_layers = nn.ModuleList(
            AutoencoderLayer(config) for _ in range(config.num_decoder_layers)
        )
        self.expand_layer = nn.Linear(hidden_size, config.patch_size * hidden_size)
        self.norm = RMSNorm(hidden_size, config.rms_norm_eps)

    def weights(self) -> DecoderWeights:
        """The parameters as `ops.decode` takes them."""
        layers = [layer.weights() for layer in self.decoder_layers]
        half = len(layers) // 2
        return DecoderWeights(
            LinearWeights(self.latent_to_hidden.weight, self.latent_to_hidden.bias),
            layers[:half],
            LinearWeights(self.expand_layer.weight, self.expand_layer.bias),
            layers[half:],
            self.norm.weight,
            self.lm_head_weight,
        )


class Autoencoder(nn.Module):
    """Patches to latent Gaussians, latent vectors to tokens; named as the official Autoencoder.

    Embedding and output projection are one parameter, which a state dict shows under both official
    names.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, self.encoder.embed_tokens.weight)
        init_weights(self, config.initializer_range)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log standard deviation of every patch.

        ids: [B, P K] int64.
        returns: two [B, P, L]. A frozen autoencoder ignores autocast, so that a language model's
            targets are the same in training and in evaluation.
        Raises ValueError for a shape that is not whole patches, IndexError (on CPU) for an id
        outside the vocabulary.
        """
        patch_size = self.config.patch_size
        check_patches("ids", ids, patch_size)
        device, trained = ids.device.type, self.encoder.embed_tokens.weight.requires_grad
        patches, weights = ids.reshape(-1, patch_size), self.encoder.weights()
        with torch.autocast(device, enabled=trained and torch.is_autocast_enabled(device)):
            mean, log_std = ops.encode(patches, weights, eps=self.config.rms_norm_eps)
        shape = (ids.shape[0], ids.shape[1] // patch_size, self.config.latent_size)
        return mean.view(shape), log_std.view(shape)

    def logits(self, latents: Tensor) -> Tensor:
        """Scores of the whole vocabulary for every token of every patch.

        latents: [..., L].
        returns: [..., K, V].
        """
        rows, weights = self._rows(latents), self.decoder.weights()
        hidden = reference.decode_hidden(rows, weights, self.config.rms_norm_eps)  # [R, K, H]
        logits = F.linear(hidden, weights.vocabulary)
        return logits.view(*latents.shape[:-1], *logits.shape[1:])

    def decode(self, latents: Tensor) -> Tensor:
        """The most probable token of every slot of every patch.

        latents: [..., L].
        returns: [..., K] int64.
        """
        ids = ops.decode(self._rows(latents), self.decoder.weights(), eps=self.config.rms_norm_eps)
        return ids.view(*latents.shape[:-1], self.config.patch_size)

    def save(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder; see `checkpoint.save`."""
        from calm_rt.checkpoint import save  # imported late: checkpoint builds these classes

        save(self, path)

    def _rows(self, latents: Tensor) -> Tensor:
        size, shape = self.config.latent_size, list(latents.shape)
        check(shape[-1:] == [size], "latents", f"shape [..., L={size}]", shape)
        return latents.reshape(-1, size)
