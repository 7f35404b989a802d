"""The autoencoder: K tokens to a Gaussian over latent vectors and back (paper section 2).

Modules hold parameters under the official names; the arithmetic is `ops.encode` and `ops.decode`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_rt import ops
from calm_rt.nn.config import AutoencoderConfig
from calm_rt.nn.plain import check_plain, weight_of, weights_of
from calm_rt.ops.check import check, check_patches, check_tensor, is_autocast_on, may_look
from calm_rt.ops.decode import decode_hidden
from calm_rt.ops.linear_argmax import screen_vocabulary
from calm_rt.reference import (
    DecoderWeights,
    EncoderWeights,
    FoldedEncoderWeights,
    MlpWeights,
)

EMBEDDING, EMBEDDING_ALIAS = "encoder.embed_tokens.weight", "decoder.lm_head_weight"
FOLDED_TOKENS = 8192  # that go through the token layers at a time when an encoder is folded
SAMPLED = 64  # numbers of a vocabulary, in which writes are looked for that torch does not count


def init_weights(module: nn.Module, std: float) -> None:
    """The official initialisation: linear and embedding weights N(0, std), biases 0, norms 1."""
    for part in module.modules():
        if isinstance(part, RMSNorm | nn.LayerNorm):
            part.reset_parameters()
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's norms have it, for modules that were made on `meta`."""
        nn.init.ones_(self.weight)

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

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate and up [I, H], down [H, I], as `ops` take them."""
        check_plain(self, GatedMLP)
        gate, up, down = (weight_of(part, nn.Linear) for part in self.children())
        return gate, up, down


class AutoencoderLayer(nn.Module):
    """The parameters of one residual gated MLP."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def weights(self) -> MlpWeights:
        """The parameters as `ops` take them."""
        check_plain(self, AutoencoderLayer)
        return MlpWeights(weight_of(self.layernorm, RMSNorm), *self.mlp.weights())


class Encoder(nn.Module):
    """The parameters of the encoder: half of the layers see single tokens, half the whole patch."""

    tables: Tensor | None  # [K, V, H], see fold_encoder

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
        self.register_buffer("tables", None, persistent=False)
        self.register_load_state_dict_post_hook(Encoder._drop_tables)

    def weights(self) -> EncoderWeights | FoldedEncoderWeights:
        """The parameters as `ops.encode` takes them, folded where that was asked for."""
        layers = [layer.weights() for layer in self.encoder_layers]
        half = len(layers) // 2
        first = (
            weight_of(self.embed_tokens, nn.Embedding),
            layers[:half],
            weights_of(self.squeeze_layer),
        )
        rest = (
            layers[half:],
            weight_of(self.norm, RMSNorm),
            weights_of(self.hidden_to_latent),
        )
        tables, trained = self.tables, self.is_trained()
        if tables is not None and not trained and tables.dtype == first[0].dtype:
            return FoldedEncoderWeights(tables, *rest)
        if trained and not torch.compiler.is_compiling():
            self.tables = None  # what is trained is another encoder when it is frozen again
        return EncoderWeights(*first, *rest)

    def is_trained(self) -> bool:
        """Whether any parameter gets a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @staticmethod
    def _drop_tables(encoder: "Encoder", _: object) -> None:
        encoder.tables = None  # they belong to the parameters that were there before


class Decoder(nn.Module):
    """The parameters of the decoder; `lm_head_weight` is the encoder's embedding."""

    screen: Tensor | None  # see screen_decoder

    def __init__(self, config: AutoencoderConfig, embedding: Tensor):
        super().__init__()
        hidden_size = config.hidden_size
        self.lm_head_weight = embedding
        self.latent_to_hidden = nn.Linear(config.latent_size, hidden_size)
        self.decoder_layers = nn.ModuleList(
            AutoencoderLayer(config) for _ in range(config.num_decoder_layers)
        )
        self.expand_layer = nn.Linear(hidden_size, config.patch_size * hidden_size)
        self.norm = RMSNorm(hidden_size, config.rms_norm_eps)
        self.register_buffer("screen", None, persistent=False)
        self._screened: tuple[int, int] | None = None  # which values of the vocabulary it is of
        self._sample: Tensor | None = None  # some of these values

    def forward(self, latents: Tensor) -> Tensor:
        """What the vocabulary projection sees of every slot.  [R, L] -> [R, K, H]."""
        return decode_hidden(latents, self.weights(), eps=self.norm.eps)

    def weights(self) -> DecoderWeights:
        """The parameters as `ops.decode` takes them."""
        layers = [layer.weights() for layer in self.decoder_layers]
        half = len(layers) // 2
        return DecoderWeights(
            weights_of(self.latent_to_hidden),
            layers[:half],
            weights_of(self.expand_layer),
            layers[half:],
            weight_of(self.norm, RMSNorm),
            self.lm_head_weight,
            self._current_screen(),
        )

    def _current_screen(self) -> Tensor | None:
        """The screen while it is of the vocabulary as it is now; a compiled graph has none."""
        if self.screen is None or not may_look(self.screen):
            return None
        same = self._screened == self._values() and torch.equal(self._sample, self._some_values())
        return self.screen if same else None

    def _values(self) -> tuple[int, int]:
        """Changes whenever the vocabulary moves or is written to, but for what torch counts no
        writes of: `.data`, and tensors of torch.inference_mode."""
        weight = self.lm_head_weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def _some_values(self) -> Tensor:
        """Of the vocabulary, from its first row to its last and in all columns."""
        numbers = self.lm_head_weight.detach().flatten()
        return numbers[:: len(numbers) // SAMPLED | 1]


class Autoencoder(nn.Module):
    """Patches to latent Gaussians, latent vectors to tokens; named as the official Autoencoder.

    Embedding and output projection are one parameter, which a state dict shows under both official
    names and takes under either; it stays one whatever is loaded or moved.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, self.encoder.embed_tokens.weight)
        self.init_weights()
        self.register_load_state_dict_pre_hook(Autoencoder._complete)
        self.register_load_state_dict_post_hook(Autoencoder._tie)

    def init_weights(self) -> None:
        """The whole initialisation, also of a module that was made on `meta` (`to_empty`)."""
        self._tie(self, None)
        init_weights(self, self.config.initializer_range)
        self.encoder.tables = None  # they were of other parameters

    @staticmethod
    def _complete(_: "Autoencoder", tensors: dict[str, Tensor], prefix: str, *__: object) -> None:
        """A file holds the shared parameter under one of its names."""
        names = [prefix + EMBEDDING, prefix + EMBEDDING_ALIAS]
        for name, other in zip(names, names[::-1], strict=True):
            if other in tensors:
                tensors.setdefault(name, tensors[other])

    @staticmethod
    def _tie(autoencoder: "Autoencoder", _: object) -> None:
        autoencoder.decoder.lm_head_weight = autoencoder.encoder.embed_tokens.weight

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """As for every module; `to_empty` would leave two parameters where there was one."""
        super()._apply(*arguments, **options)
        self._tie(self, None)
        return self

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log standard deviation of every patch.

        ids: [B, P K] int64.
        returns: two [B, P, L]. A frozen autoencoder ignores autocast, so that a language model's
            targets are the same in training and in evaluation.
        raises: ValueError for a shape that is not whole patches, IndexError (on CPU) for an id
        outside the vocabulary.
        """
        patch_size = self.config.patch_size
        check_patches("ids", ids, patch_size)
        check_plain(self.encoder, Encoder)
        patches, weights = ids.reshape(-1, patch_size), self.encoder.weights()
        ignored = is_autocast_on(ids.device) and not self.encoder.is_trained()
        with torch.autocast(ids.device.type, enabled=False) if ignored else nullcontext():
            mean, log_std = ops.encode(patches, weights, eps=self.config.rms_norm_eps)
        shape = (ids.shape[0], ids.shape[1] // patch_size, self.config.latent_size)
        return mean.view(shape), log_std.view(shape)

    def logits(self, latents: Tensor) -> Tensor:
        """Scores of the whole vocabulary for every token of every patch.

        latents: [..., L].
        returns: [..., K, V].
        """
        hidden = self.decoder(self._rows(latents))  # [R, K, H]
        logits = F.linear(hidden, self.decoder.lm_head_weight)
        return logits.view(*latents.shape[:-1], *logits.shape[1:])

    def decode(self, latents: Tensor) -> Tensor:
        """The most probable token of every slot of every patch.

        latents: [..., L].
        returns: [..., K] int64.
        """
        check_plain(self.decoder, Decoder)
        ids = ops.decode(self._rows(latents), self.decoder.weights(), eps=self.config.rms_norm_eps)
        return ids.view(*latents.shape[:-1], self.config.patch_size)

    def save(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder; see `checkpoint.save`."""
        from calm_rt.checkpoint import save  # imported late: checkpoint builds these classes

        save(self, path)

    def _rows(self, latents: Tensor) -> Tensor:
        check_tensor("latents", latents)
        size, shape = self.config.latent_size, list(latents.shape)
        check(shape[-1:] == [size], "latents", f"shape [..., L={size}]", shape)
        return latents.reshape(-1, size).to(self.decoder.latent_to_hidden.weight.dtype)


@torch.no_grad()
def fold_encoder(autoencoder: Autoencoder) -> None:
    """Lets a frozen autoencoder encode by table: what its first half makes of a token in a slot.

    Everything before the squeeze's sum depends on one token and its slot, so it is computed here
    once for all K V of them; `encode` then adds K rows (at the official size 4.2 instead of 22
    MFLOP a patch). The tables take K V H numbers (`folded_bytes`; 1.05 GB at the official size in
    float32) and 2 K V H (H + 3 I / K) FLOP (0.8 TFLOP). They move with the module, are not saved,
    and go when a state dict is loaded or the encoder encodes while it is trained (in eager code);
    after changing parameters in place, fold again. Under DistributedDataParallel fold behind the
    wrapping, or with broadcast_buffers=False, for they are a buffer. Parameters that
    torch.func.functional_call puts in their place do not change them; while parameters are of
    another type than the tables (mixed precision of FSDP2) these are not used.
    raises: ValueError where a parameter of the encoder requires a gradient.
    """
    _check_autoencoder(autoencoder)
    encoder = autoencoder.encoder
    encoder.tables = None
    frozen = "a frozen autoencoder: call requires_grad_(False) first"
    check(not encoder.is_trained(), "autoencoder", frozen, "parameters that require a gradient")
    weights, eps = encoder.weights(), autoencoder.config.rms_norm_eps
    slots = weights.squeeze.weight.chunk(autoencoder.config.patch_size, 1)  # K times [H, H]
    tables = weights.embedding.new_empty(len(slots), *weights.embedding.shape)
    for start in range(0, tables.shape[1], FOLDED_TOKENS):
        hidden = weights.embedding[start : start + FOLDED_TOKENS]
        for layer in weights.token_layers:
            hidden = ops.gated_mlp(hidden, *layer, eps=eps)
        for table, slot in zip(tables[:, start : start + FOLDED_TOKENS], slots, strict=True):
            torch.mm(hidden, slot.T, out=table)
    tables[0] += weights.squeeze.bias
    encoder.tables = tables


def screen_decoder(autoencoder: Autoencoder) -> None:
    """Lets an autoencoder on a CPU decode few patches faster: reads a rounded vocabulary.

    The ids stay the same, see `ops.linear_argmax`. The screen takes V H bytes (66 MB at the
    official size) and is not saved; once the vocabulary is written to or moved it is no longer
    used, so after training or loading make it again. Through `.data` and in torch.inference_mode
    torch counts no writes: there a change is seen in a sample of the numbers, so that one of single
    rows may be missed. Nothing happens where no kernel takes one.
    """
    _check_autoencoder(autoencoder)
    decoder = autoencoder.decoder
    if decoder.weights().screen is not None:
        return
    decoder.screen = screen_vocabulary(decoder.lm_head_weight)
    decoder._screened, decoder._sample = decoder._values(), decoder._some_values().clone()


def folded_bytes(autoencoder: Autoencoder) -> int:
    """The memory that `fold_encoder` takes."""
    return autoencoder.config.patch_size * autoencoder.encoder.embed_tokens.weight.nbytes


def _check_autoencoder(autoencoder: Autoencoder) -> None:
    ours = "an Autoencoder (a Calm's is its ae_model)"
    check(isinstance(autoencoder, Autoencoder), "autoencoder", ours, type(autoencoder).__name__)
