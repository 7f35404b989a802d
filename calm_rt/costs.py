"""What an op costs at least, from its formula alone, one function a op: the roofline's two numbers.

Arithmetic is that of the matrix products, two FLOP a multiplication and addition, where an op has
products, and of its inner loop elsewhere. Traffic is every argument read once and every result
written once, whatever a rival makes in between.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from calm_rt.reference import (
    DecoderWeights,
    EncoderWeights,
    FoldedEncoderWeights,
    HeadWeights,
    LinearWeights,
    MlpWeights,
)

ID_BYTES = 8
NORMAL_FLOP = 50  # a number: a quarter of ten Philox rounds, and Box-Muller by polynomials
UNIFORM_FLOP = 20
DISTANCE_FLOP = 3  # a coordinate: difference, square, sum
DISTANCE_BACKWARD_FLOP = 4  # a coordinate: its share added to both ends
HASH_FLOP = 4  # a token


class Cost(NamedTuple):
    """One call's arithmetic and traffic."""

    flop: float
    bytes: float
    screened: float = 0  # of the FLOP, those that the CPU's kernel takes in 8 bits


def noise(
    backward: bool, *, rows: Tensor, num_draws: int, length: int, distribution: str, **_
) -> Cost:
    numbers = num_draws * rows.shape[0] * length
    flop = NORMAL_FLOP if distribution == "normal" else UNIFORM_FLOP
    return Cost(flop * numbers, 4 * numbers + rows.nbytes)


def energy_score(
    backward: bool, *, x: Tensor, mean: Tensor, log_std: Tensor, num_targets: int, **_
) -> Cost:
    draws = x.shape[0]
    pairs = draws * (draws - 1) // 2 + draws * num_targets
    distance = DISTANCE_FLOP + DISTANCE_BACKWARD_FLOP * backward
    flop = mean.numel() * (pairs * distance + num_targets * NORMAL_FLOP)
    traffic = x.nbytes * (1 + backward) + mean.nbytes + log_std.nbytes
    return Cost(flop, traffic + x.shape[1] * mean.itemsize)


def linear_argmax(
    backward: bool,
    *,
    hidden: Tensor,
    weight: Tensor,
    screen: Tensor | None = None,
    count: Tensor | None = None,
) -> Cost:
    read = weight if screen is None else screen
    if count is not None:
        hidden = hidden[: int(count)]
    traffic = hidden.nbytes + read.nbytes + hidden.shape[0] * ID_BYTES
    flop = _product(hidden.shape[0], weight)
    return Cost(flop, traffic, flop if weight.dtype != torch.float64 else 0)


def linear_cross_entropy(
    backward: bool, *, hidden: Tensor, weight: Tensor, target: Tensor, **_
) -> Cost:
    flop = _product(hidden.shape[0], weight) * (3 if backward else 1)
    return Cost(flop, (hidden.nbytes + weight.nbytes) * (1 + backward) + target.nbytes)


def gated_mlp(
    backward: bool, *, x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, **_
) -> Cost:
    weights = MlpWeights(norm_weight, gate, up, down)
    flop = _mlps(x.numel() // x.shape[-1], [weights]) * (3 if backward else 1)
    return Cost(flop, (2 * x.nbytes + _nbytes(weights)) * (1 + backward))


def encode(
    backward: bool, *, ids: Tensor, weights: EncoderWeights | FoldedEncoderWeights, **_
) -> Cost:
    """Of the tables, the gathered rows are read."""
    rows, patch = ids.shape
    flop = _mlps(rows, weights.patch_layers) + _product(rows, weights.latent.weight)
    if not isinstance(weights, FoldedEncoderWeights):
        flop += _mlps(rows * patch, weights.token_layers) + _product(rows, weights.squeeze.weight)
    tables, *rest = weights
    gathered = ids.numel() * tables.shape[-1] * tables.itemsize
    result = rows * weights.latent.weight.shape[0] * tables.itemsize
    return Cost(flop, ids.nbytes + gathered + _nbytes(rest) + result)


def decode(backward: bool, *, latents: Tensor, weights: DecoderWeights, **_) -> Cost:
    rows, size = latents.shape[0], weights.vocabulary.shape[1]
    tokens = rows * (weights.expand.weight.shape[0] // size)
    flop = _product(rows, weights.latent.weight) + _product(rows, weights.expand.weight)
    flop += _mlps(rows, weights.patch_layers) + _mlps(tokens, weights.token_layers)
    screened = _product(tokens, weights.vocabulary)
    flop += screened
    *layers, vocabulary, screen = weights
    read = _nbytes(layers) + (vocabulary if screen is None else screen).nbytes
    return Cost(flop, latents.nbytes + read + tokens * ID_BYTES)


def sample_latents(
    backward: bool, *, hidden: Tensor, weights: HeadWeights, num_samples: int, **_
) -> Cost:
    """The half of a block's first product that sees the context is taken once a context."""
    rows = hidden.shape[0]
    draws = rows * num_samples
    flop = _product(rows, weights.hidden.weight) + _product(draws, weights.noise.weight)
    for block in weights.blocks:
        flop += _product(rows + draws, block.first.weight) // 2
        flop += _products(draws, block.second, block.third, block.down)
    flop += _products(draws, weights.final_first, weights.final_second)
    result = draws * weights.final_second.weight.shape[0] * hidden.itemsize
    traffic = (hidden.nbytes + _nbytes(weights)) * (1 + backward) + result
    return Cost(flop * (3 if backward else 1), traffic)


def select_patch(backward: bool, *, tokens: Tensor, **_) -> Cost:
    return Cost(HASH_FLOP * tokens.numel(), tokens.nbytes + tokens.shape[0] * ID_BYTES)


def survivors(backward: bool, *, tokens: Tensor, depth: int, **_) -> Cost:
    candidates = tokens.shape[0] * tokens.shape[1]
    known = candidates * depth
    return Cost(HASH_FLOP * known, (known + candidates + tokens.shape[0] + 1) * ID_BYTES)


def _product(rows: int, weight: Tensor) -> int:
    """FLOP of [rows, in] times a weight [out, in]."""
    return 2 * rows * weight.numel()


def _products(rows: int, *maps: LinearWeights) -> int:
    return sum(_product(rows, weights.weight) for weights in maps)


def _mlps(rows: int, layers: list[MlpWeights]) -> int:
    return sum(_product(rows, matrix) for layer in layers for matrix in layer[1:])


def _nbytes(weights: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(weights))
