"""Sizes of the models, under the field names of the official config.json files."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from calm_rt.ops.check import check

ONLY = "the only value supported"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    check(condition, f"config {name}", expected, repr(got))


def _check_sizes(config: object, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        _require(is_int and value >= least, name, f"an int of at least {least}", value)


def _check_numbers(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
        _require(is_number and value >= 0, name, "a finite number of at least 0", value)


def _check_special_ids(config: object, vocab_size: int) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        valid = value is None or (isinstance(value, int) and 0 <= value < vocab_size)
        _require(valid, name, f"None or a token id below vocab_size {vocab_size}", value)


@dataclass
class _Config:
    """from_dict and to_dict of both configurations."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration in a parsed config.json; keys that mean nothing here are ignored.

        raises: ValueError naming the field where a value is not usable.
        """
        _require(isinstance(values, dict), "file", "a JSON object", values)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json holds them."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class AutoencoderConfig(_Config):
    """Sizes of an autoencoder; defaults as in the official configuration_autoencoder.py."""

    patch_size: int = 4  # K, tokens a patch
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1280
    latent_size: int = 128
    num_encoder_layers: int = 2  # even: half of them for single tokens, half for whole patches
    num_decoder_layers: int = 2
    ae_dropout: float = 0.15  # of input tokens and of latent dimensions, in training only
    kl_clamp: float = 0.5  # nats a dimension below which the KL term does not push
    kl_weight: float = 1e-3
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        _check_sizes(
            self, "patch_size", "vocab_size", "hidden_size", "intermediate_size", "latent_size"
        )
        _check_sizes(self, "num_encoder_layers", "num_decoder_layers", least=0)
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            halves = "an even number, half for tokens and half for patches"
            _require(layers % 2 == 0, name, halves, layers)
        _check_numbers(
            self, "ae_dropout", "kl_clamp", "kl_weight", "rms_norm_eps", "initializer_range"
        )
        _require(self.ae_dropout < 1, "ae_dropout", "a probability below 1", self.ae_dropout)
        _require(self.hidden_act == "silu", "hidden_act", f"'silu', {ONLY}", self.hidden_act)
        _require(not self.mlp_bias, "mlp_bias", f"false, {ONLY}", self.mlp_bias)
        _check_special_ids(self, self.vocab_size)


@dataclass(kw_only=True)
class CalmConfig(_Config):
    """Sizes of a language model; defaults as in the official configuration_calm.py."""

    patch_size: int = 4  # K, tokens a patch
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    latent_size: int = 128
    noise_size: int = 64
    num_mlp_layers: int = 4  # blocks of the energy head
    num_samples: int = 8  # model draws a patch in training
    beta: float = 1.0  # exponent of the energy score
    max_position_embeddings: int = 2048  # in patches; the length trained on, not a limit
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_scaling: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As above; also reads the rotary base where newer `transformers` write it."""
        _require(isinstance(values, dict), "file", "a JSON object", values)
        rope = values.get("rope_parameters")
        if isinstance(rope, dict):
            kind = rope.get("rope_type", "default")
            _require(kind == "default", "rope_parameters", f"rope_type 'default', {ONLY}", kind)
            values = {"rope_theta": rope.get("rope_theta", cls.rope_theta)} | values
        config = super().from_dict(values)
        size, given = config.head_dim, values.get("head_dim")
        _require(given in (None, size), "head_dim", f"hidden_size / heads = {size}", given)
        return config

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        _check_sizes(self, "patch_size", "vocab_size", "hidden_size", "intermediate_size")
        _check_sizes(self, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _check_sizes(self, "latent_size", "noise_size", "max_position_embeddings")
        _check_sizes(self, "num_mlp_layers", least=0)
        _check_sizes(self, "num_samples", least=2)
        _check_numbers(
            self, "beta", "rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout"
        )
        _require(0 < self.beta <= 2, "beta", "an exponent in (0, 2]", self.beta)
        _require(self.rope_theta > 0, "rope_theta", "a positive number", self.rope_theta)
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        paired = self.hidden_size % (2 * heads) == 0  # rotary embedding turns pairs of features
        fits = f"a number of which the double divides hidden_size {self.hidden_size}"
        _require(paired, "num_attention_heads", fits, heads)
        fits = f"a divisor of num_attention_heads {heads}"
        _require(heads % key_heads == 0, "num_key_value_heads", fits, key_heads)
        _require(self.hidden_act == "silu", "hidden_act", f"'silu', {ONLY}", self.hidden_act)
        for name in ("mlp_bias", "attention_bias", "attention_dropout", "rope_scaling"):
            value = getattr(self, name)
            _require(not value, name, f"unset, {ONLY}", value)
        _check_special_ids(self, self.vocab_size)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads
