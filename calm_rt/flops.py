"""What the ops' matrix products count in torch.utils.flop_counter, two FLOP a multiply and add.

Formulas take the arguments of the ops' schemas with shapes in place of tensors. They count the
products of the algorithm: what a kernel leaves out for the values that it meets (the same token
twice, rows behind `count`, what a screen decides) is in them, and so is what it does in 8 bits.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Shape = Sequence[int]


def gated_mlp(x: Shape, norm_weight: Shape, *matrices_eps_keep: Any, **_: Any) -> int:
    return _layers(x[0], [norm_weight, *matrices_eps_keep[:3]])


def gated_mlp_backward(
    grad_out: Shape, grad_product: Shape, x: Shape, norm_weight: Shape, *others: Any, **_: Any
) -> int:
    need_grad_matrices = others[-1]
    return _layers(x[0], [norm_weight, *others[:3]]) * (1 + need_grad_matrices)


def linear_cross_entropy(hidden: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    *_, need_grad_hidden, need_grad_weight, _ = others
    return _product(hidden[0], weight) * (1 + need_grad_hidden + need_grad_weight)


def linear_cross_entropy_backward(
    grad_logits: Shape, hidden: Shape, weight: Shape, *needs: bool, **_: Any
) -> int:
    return _product(hidden[0], weight) * sum(needs)


def linear_argmax(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(hidden[0], weight)


def encode(
    ids: Shape,
    tables: Shape,
    token_layers: list[Shape],
    squeeze: Shape | None,
    squeeze_bias: Shape | None,
    patch_layers: list[Shape],
    norm: Shape,
    latent: Shape,
    *_: Any,
    **__: Any,
) -> int:
    rows = ids[0]
    before = _layers(prod(ids), token_layers) + (_product(rows, squeeze) if squeeze else 0)
    return before + _layers(rows, patch_layers) + _product(rows, latent)


def decode(
    latents: Shape,
    latent: Shape,
    latent_bias: Shape,
    patch_layers: list[Shape],
    expand: Shape,
    expand_bias: Shape,
    token_layers: list[Shape],
    norm: Shape,
    vocabulary: Shape,
    *_: Any,
    **__: Any,
) -> int:
    rows = latents[0]
    tokens = rows * (expand[0] // norm[0])
    of_patches = _product(rows, latent) + _layers(rows, patch_layers) + _product(rows, expand)
    return of_patches + _layers(tokens, token_layers) + _product(tokens, vocabulary)


def sample_latents(
    hidden: Shape, weights: list[Shape], seed: Shape, rows: Shape, num_samples: int, *_: Any, **__
) -> int:
    return _head(hidden[0], hidden[0] * num_samples, weights)


def sample_latents_backward(
    grad_latents: Shape, hidden: Shape, weights: list[Shape], *others: Any, **_: Any
) -> int:
    """To the inputs of all maps but the noise's, and to the maps themselves if anybody asks."""
    need_grad_weights, draws = others[-1], grad_latents[0] * grad_latents[1]
    forward = _head(hidden[0], draws, weights)
    return forward * (1 + need_grad_weights) - _product(draws, weights[0])


FORMULAS: tuple[Callable[..., int], ...] = (
    gated_mlp,
    gated_mlp_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_argmax,
    encode,
    decode,
    sample_latents,
    sample_latents_backward,
)


def _product(rows: int, matrix: Shape) -> int:
    return 2 * rows * prod(matrix)


def _layers(rows: int, flat: list[Shape]) -> int:
    """Of gated MLPs whose norms, gates, ups and downs stand one after another."""
    return sum(_product(rows, shape) for shape in flat if len(shape) == 2)


def _head(rows: int, draws: int, weights: list[Shape]) -> int:
    """The half of a block's first map that sees the context is taken once a row."""
    noise, _, hidden, _, *inner = weights[::2]  # without biases
    final_first, final_second = inner[-2:]
    flop = _product(rows, hidden)
    flop += sum(_product(draws, shape) for shape in (noise, final_first, final_second))
    for start in range(0, len(inner) - 3, 5):
        _, first, *others = inner[start : start + 5]
        flop += _product(rows + draws, first) // 2
        flop += sum(_product(draws, shape) for shape in others)
    return flop


def register() -> None:
    """Makes torch.utils.flop_counter count the ops that the extension has; to be called before a
    FlopCounterMode is made. (Not done at import, for the counter imports triton where it can.)"""
    from torch.utils import flop_counter

    for formula in FORMULAS:
        packet = getattr(torch.ops.calm_rt, formula.__name__, None)
        if packet is not None and packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(formula)
