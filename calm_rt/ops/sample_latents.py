"""The energy head: draws of the next latent vector."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    check,
    check_float,
    check_head,
    check_int,
    check_shape,
    check_weights_device,
    is_autocast_on,
    seed_and_rows,
)
from calm_rt.reference import HEAD_EPS, HeadWeights, LinearWeights

DTYPES = _native.FLOATS


def sample_latents(
    hidden: Tensor,
    weights: HeadWeights,
    *,
    num_samples: int,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """num_samples draws of the next latent vector for every context.

    hidden: [R, H].
    weights: of the energy head, in hidden's dtype.
    num_samples: S, at least 1.
    seed: an int, or [] int64 (under torch.compile and in CUDA graphs).
    rows: [R] int64, logical row ids, on which a row's noise depends; None for 0 .. R-1.
    returns: [S, R, L] in hidden's dtype; once differentiable in hidden and weights.
    memory: the context is never repeated or concatenated S times. With gradients every draw keeps
        the products of each block, [4, H] in hidden's dtype, and its input, [H] in float32 for
        16-bit types; activations are computed again in the backward.
    Under torch.autocast hidden and weights are cast as F.linear casts them, and so is what returns;
    the sum over the blocks stays in float32.
    raises: ValueError for other shapes, types or devices.
    source: paper section 3.3, the official MLPGenerator.sample.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_float("hidden", hidden)
    check_head(weights, hidden.shape[1])
    check_weights_device(hidden.device, weights)
    num_samples = check_int("num_samples", num_samples, 1)
    seed, rows = seed_and_rows(seed, rows, hidden.shape[0], hidden.device)
    dtype = hidden.dtype
    if dtype != torch.float64 and is_autocast_on(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        maps = [pair for pair in _pairs(weights) if pair.weight.ndim == 2]  # others are norms
        types = {part.dtype for pair in maps for part in pair}
        check(types == {dtype}, "weights", f"maps of hidden's {dtype}", types)
    if not _native.use_native("sample_latents", hidden, dtype, DTYPES):
        return _native.call_reference(
            reference.sample_latents, hidden, weights, num_samples, seed, rows
        )
    hidden, flat = hidden.to(dtype), _flat(weights, dtype)
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (hidden, *flat))
    return _native.call("sample_latents", hidden, flat, seed, rows, num_samples, HEAD_EPS, keep)[0]


def _pairs(weights: HeadWeights) -> list[LinearWeights]:
    """Every map and norm in the kernel's order."""
    first = [weights.noise, weights.noise_norm, weights.hidden, weights.hidden_norm]
    blocks = [pair for block in weights.blocks for pair in block]
    return [*first, *blocks, weights.final_norm, weights.final_first, weights.final_second]


def _flat(weights: HeadWeights, dtype: torch.dtype) -> list[Tensor]:
    """The weights as the kernel's schema lists them, norms in the accumulation type."""
    wide, flat = torch.promote_types(dtype, torch.float32), []
    for pair in _pairs(weights):
        kind = wide if pair.weight.ndim == 1 else dtype
        flat += [part if part.dtype == kind else part.to(kind) for part in pair]
    return flat


def _fake(hidden, weights, seed, rows, num_samples, eps, keep):
    num_rows, size = hidden.shape
    num_blocks, num_lines = (len(weights) - 14) // 10, num_samples * num_rows
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def planes(count, lines, dtype):
        return hidden.new_empty((count, lines, size) if keep else (0,), dtype=dtype)

    return (
        hidden.new_empty(num_samples, num_rows, weights[-1].shape[0]),
        planes(4 * num_blocks + 2, num_lines, hidden.dtype),
        planes(num_blocks + 1, num_lines, wide),
        planes(num_blocks + 2, num_rows, hidden.dtype),
    )


def _setup_context(ctx, inputs, output):
    hidden, weights, seed, rows, _, ctx.eps, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, seed, rows, *kept, *weights)


def _backward(ctx, grad_latents, *_):
    if torch.is_grad_enabled():  # create_graph=True: what was kept knows nothing of hidden
        raise RuntimeError(
            "sample_latents: the kernel's gradient cannot be differentiated again; "
            'use calm_rt.backend("reference")'
        )
    hidden, seed, rows, products, stream, contexts, *weights = ctx.saved_tensors
    grad_hidden, grad_weights = None, None
    if grad_latents is not None:
        need_grad_weights = any(ctx.needs_input_grad[1])
        grad_hidden, grad_weights = _native.call(
            "sample_latents_backward",
            grad_latents,
            hidden,
            weights,
            seed,
            rows,
            products,
            stream,
            contexts,
            ctx.eps,
            need_grad_weights,
        )
    return grad_hidden, grad_weights or [None] * len(weights), None, None, None, None, None


def _fake_backward(
    grad_latents,
    hidden,
    weights,
    seed,
    rows,
    products,
    stream,
    contexts,
    eps,
    need_grad_weights,
):
    grads = [weight.new_empty(weight.shape) for weight in weights] if need_grad_weights else []
    return hidden.new_empty(hidden.shape), grads


_native.register("sample_latents", _fake, _backward, _setup_context)
_native.register("sample_latents_backward", _fake_backward)
