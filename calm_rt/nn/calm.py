"""The language model: embed K tokens, run the backbone, draw the next latent (paper section 3)."""

from pathlib import Path
from typing import Self

from torch import Tensor, nn

from calm_rt import ops
from calm_rt.nn.autoencoder import Autoencoder, init_weights
from calm_rt.nn.backbone import KVCache, Transformer
from calm_rt.nn.config import AutoencoderConfig, CalmConfig
from calm_rt.nn.heads import EnergyHead
from calm_rt.nn.plain import check_plain
from calm_rt.ops.check import check, check_ids, check_patches

EMBED_EPS = 1e-6  # of the LayerNorm behind embed_proj, as in the official code


class Calm(nn.Module):
    """A CALM with an energy head; parameters named as in the official EnergyTransformer.

    The autoencoder inside is frozen: it gets no gradient and stays in evaluation mode under
    `train()`.
    raises: ValueError if the two configurations disagree on patch_size, latent_size or vocab_size.
    """

    numbered_draws = True  # draw i of a row does not depend on how many draws are asked for

    def __init__(self, config: CalmConfig, autoencoder_config: AutoencoderConfig):
        super().__init__()
        got = type(config).__name__, type(autoencoder_config).__name__
        check(isinstance(config, CalmConfig), "config", "a CalmConfig", got[0])
        ours, kind = isinstance(autoencoder_config, AutoencoderConfig), "an AutoencoderConfig"
        check(ours, "autoencoder_config", kind, got[1])
        for name in ("patch_size", "latent_size", "vocab_size"):
            expected, got = getattr(config, name), getattr(autoencoder_config, name)
            argument = f"autoencoder_config.{name}"
            check(got == expected, argument, f"the language model's {expected}", got)
        size = config.hidden_size
        self.config = config
        self.ae_model = Autoencoder(autoencoder_config).requires_grad_(False).eval()
        self.transformer = Transformer(config)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.patch_size * size, 2 * size),
            nn.SiLU(),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size, eps=EMBED_EPS),
        )
        self.generative_head = EnergyHead(config)
        self._init_projection()  # the other parts did so as they were made

    def init_weights(self) -> None:
        """The whole initialisation, also of a module that was made on `meta` (`to_empty`)."""
        for part in (self.ae_model, self.transformer, self.generative_head):
            part.init_weights()
        self._init_projection()

    def _init_projection(self) -> None:
        init_weights(self.embed_proj, self.config.initializer_range)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The backbone's state after every patch, from which the next patch is drawn.

        ids: [B, P K] int64.
        cache: the P patches of row b follow its cache.lengths[b] earlier ones. They are written
            into the cache but not counted, so rows of unequal length may be padded on the right:
            call cache.advance with the true counts.
        returns: [B, P, H].
        raises: ValueError for a shape that is not whole patches, IndexError (on CPU) for an id
        outside the vocabulary.
        """
        patch_size = self.config.patch_size
        check_patches("ids", ids, patch_size)
        check_ids("ids", ids, self.config.vocab_size)
        tokens = self.transformer.embed_tokens(ids)  # [B, P K, H]
        num_patches, width = ids.shape[1] // patch_size, patch_size * tokens.shape[-1]
        patches = tokens.reshape(ids.shape[0], num_patches, width)
        return self.transformer(self.embed_proj(patches), cache)

    def sample(
        self, hidden: Tensor, num_samples: int, seed: int | Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Draws of the next latent vector.

        hidden: [R, H].  seed: [] int64 or int.
        rows: [R] int64, logical row ids; None for 0 .. R-1.
        returns: [S, R, L], S = num_samples.
        """
        check_plain(self.generative_head, EnergyHead)
        weights = self.generative_head.weights()
        return ops.sample_latents(hidden, weights, num_samples=num_samples, seed=seed, rows=rows)

    def train(self, mode: bool = True) -> Self:
        """As for every module, but the autoencoder stays in evaluation mode."""
        super().train(mode)
        self.ae_model.eval()
        return self

    def save(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder; see `checkpoint.save`."""
        from calm_rt.checkpoint import save  # imported late: checkpoint builds these classes

        save(self, path)
