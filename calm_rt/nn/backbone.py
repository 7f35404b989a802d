"""The Transformer over patches: Llama's, fed with embeddings, with a static key-value cache."""

import copy
import math
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_rt import ops, reference
from calm_rt.nn.autoencoder import GatedMLP, RMSNorm, init_weights
from calm_rt.nn.config import CalmConfig
from calm_rt.nn.plain import check_whole, is_plain
from calm_rt.ops.check import check, check_int, check_shape, may_look

ALIGNMENT = 64  # bytes, of a cache's rows: a library's bits may depend on where an operand lies


class Place(NamedTuple):
    """Where the patches of one forward pass stand; the same for every layer."""

    cos: Tensor  # [B, P, 1, head size / 2]
    sin: Tensor
    slots: tuple[Tensor, Tensor] | None  # [B, 1] and [B, P] int64, where the cache takes them
    num_patches: int  # T of the cache that are read
    mask: Tensor | None  # [B, 1, P, T], which of them are seen; None for all, or without a cache


def rotary_angles(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x theta^(-2 i / size).

    positions: [B, P] int64.  size: features of one head.  dtype: float32 or float64.
    returns: two [B, P, 1, size / 2].
    """
    exponents = torch.arange(0, size, 2, device=positions.device).to(dtype) / size
    angles = positions[..., None, None].to(dtype) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on features i and i + size / 2, as Llama does in `transformers`.

    x: [B, P, heads, size].  cos, sin: [B, P, 1, size / 2].
    returns: as x.
    """
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class KVCache:
    """Keys and values of the patches read so far, for a batch of rows of unequal lengths.

    One allocation of fixed size. `lengths` [B] int64 counts the patches of each row; a forward pass
    writes its P new patches behind them, and the caller then says with `advance` how many of them
    were real.
    """

    def __init__(
        self,
        config: CalmConfig,
        batch_size: int,
        max_patches: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """batch_size: B rows.  max_patches: the most patches that a row may reach."""
        batch_size = check_int("batch_size", batch_size, 0)
        max_patches = check_int("max_patches", max_patches, 1)
        self.max_patches = self.width = max_patches
        # one more slot than patches: padding behind a row's end is written there and read by nobody
        rows = (config.num_hidden_layers, 2, batch_size)
        patch = config.num_key_value_heads * config.head_dim * dtype.itemsize  # bytes
        whole = ALIGNMENT // math.gcd(ALIGNMENT, patch)
        patches = max_patches + 1 + -(max_patches + 1) % whole
        sizes = (*rows, patches, config.num_key_value_heads, config.head_dim)
        with torch.inference_mode(False):  # in it a tensor is made that nobody may write outside
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.storage = torch.zeros(sizes, dtype=dtype, device=device)

    def advance(self, counts: Tensor) -> None:
        """Counts the last forward pass's first `counts[b]` patches of row b as read.

        counts: [B] int64.
        raises: ValueError (in eager CPU code) if a row would exceed max_patches.
        """
        check_shape("counts", counts, B=self.lengths.shape[0])
        if may_look(self.lengths):
            most, limit = int((self.lengths + counts).max()), self.max_patches
            check(most <= limit, "counts", f"at most max_patches = {limit} patches a row", most)
        self.lengths += counts

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch only.

        rows: [B'] int64, indices into the batch.
        """
        self.storage, self.lengths = self.storage[:, :, rows], self.lengths[rows]

    def slots(self, first: int, last: int, width: int | None = None) -> Self:
        """Rows first .. last - 1 as a cache of their own, in the same memory.

        width: patches of each row that attention reads, which must be all that the next forward
            pass looks at; None for max_patches.
        """
        part = copy.copy(self)
        part.width = self.max_patches if width is None else width
        part.storage, part.lengths = self.storage[:, :, first:last], self.lengths[first:last]
        return part

    def move(self, source: int, target: int) -> None:
        """Copies one row over another."""
        count = int(self.lengths[source])
        self.storage[:, :, target, :count] = self.storage[:, :, source, :count]
        self.lengths[target] = count

    def clear(self, row: int) -> None:
        """Forgets a row, also what lies behind its end: there NaN would spoil masked attention."""
        self.storage[:, :, row].zero_()
        self.lengths[row] = 0

    def write(self, layer: int, slots: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Stores one layer's keys and values.

        slots: [B, 1] rows and [B, P] places, int64.  keys, values: [B, P, key heads, head size].
        """
        rows, places = slots
        both = torch.stack([keys, values]).to(self.storage.dtype)  # [2, B, P, key heads, head size]
        self.storage[layer][:, rows, places] = both

    def read(self, layer: int, num_patches: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first patches: two [B, num_patches, key heads, head size]."""
        return self.storage[layer, :, :, :num_patches].unbind()


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: CalmConfig, index: int):
        super().__init__()
        hidden_size, key_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.index = index
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        """x: [B, P, H].  returns: [B, P, H]."""
        queries = self.q_proj(x)
        num_queries = queries.shape[-1] // self.head_dim
        both = torch.cat([queries, self.k_proj(x)], -1).unflatten(-1, (-1, self.head_dim))
        both = rotate(both, place.cos, place.sin)
        queries, keys = both[:, :, :num_queries], both[:, :, num_queries:]
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            cache.write(self.index, place.slots, keys, values)
            stored = cache.read(self.index, place.num_patches)
            keys, values = (part.to(queries.dtype) for part in stored)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=place.mask,
            is_causal=cache is None,
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Embedding(nn.Embedding):
    """torch's, but for an id outside the table it gives NaN on a GPU (see `reference.embed`)."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] int64.  returns: [..., H]."""
        check_whole(self.weight)
        return reference.embed(ids, self.weight)


class TransformerLayer(nn.Module):
    """Attention and gated MLP, each on a normalised input and added to its input."""

    def __init__(self, config: CalmConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        """x: [B, P, H].  returns: [B, P, H]."""
        x = x + self.self_attn(self.input_layernorm(x), place, cache)
        norm, mlp = self.post_attention_layernorm, self.mlp
        plain = is_plain(norm, RMSNorm) and is_plain(mlp, GatedMLP)
        if not (plain and all(is_plain(part, nn.Linear) for part in mlp.children())):
            return x + mlp(norm(x))
        return ops.gated_mlp(x, norm.weight, *mlp.weights(), eps=norm.eps)


class Transformer(nn.Module):
    """Llama's decoder without an output projection; parameters as in `transformers`' LlamaModel.

    `embed_tokens` is used by `Calm` to embed the tokens of a patch; every row is trained, also the
    padding token's (the official code leaves that row zero).
    """

    def __init__(self, config: CalmConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """The whole initialisation."""
        init_weights(self, self.config.initializer_range)

    def forward(self, embeds: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states of patches that follow what the cache holds.

        embeds: [B, P, H], one vector a patch.
        cache: the P patches of row b stand at positions cache.lengths[b] and on. They are written
            into the cache but not counted: call cache.advance. States of patches beyond
            cache.max_patches mean nothing.
        returns: [B, P, H].
        """
        check_shape("embeds", embeds, B=None, P=None, H=self.config.hidden_size)
        place = self._place(embeds, cache)
        hidden = embeds.to(self.norm.weight.dtype)  # float32 also under autocast
        for layer in self.layers:
            hidden = layer(hidden, place, cache)
        return self.norm(hidden)

    def _place(self, embeds: Tensor, cache: KVCache | None) -> Place:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]  # [1, P]
        wide = torch.promote_types(embeds.dtype, torch.float32)
        slots, mask, num_patches = None, None, 0
        if cache is not None:
            check_shape("cache.lengths", cache.lengths, B=embeds.shape[0])
            positions = positions + cache.lengths[:, None]  # [B, P]
            places = positions.clamp(max=cache.max_patches)
            slots = torch.arange(len(places), device=embeds.device)[:, None], places
            num_patches, mask = _seen(positions, cache.width)
        return Place(*self._angles(positions, wide), slots, num_patches, mask)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta, dtype)


def _seen(positions: Tensor, width: int) -> tuple[int, Tensor | None]:
    """How many patches of a cache attention reads, and which of them each position sees.

    In eager CPU code, where looking is free, no more than the longest row has, and no mask where
    every position sees them all.
    positions: [B, P].  width: patches that are enough.
    returns: T; [B, 1, P, T] bool, or None.
    """
    num_patches = width
    if may_look(positions):
        least, most = (int(bound) for bound in positions.aminmax())
        num_patches = min(width, most + 1)
        if least == most:
            return num_patches, None
    slots = torch.arange(num_patches, device=positions.device)
    return num_patches, (slots <= positions[..., None])[:, None]
