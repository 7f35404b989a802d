"""The autoencoder's layer: a residual gated MLP on a normalised input."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    alike,
    check,
    check_device,
    check_float,
    check_number,
    check_shape,
    check_tensor,
    is_autocast_on,
)
from calm_rt.reference import MlpWeights

DTYPES = _native.FLOATS


def gated_mlp(
    x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """x + down(silu(gate n) * up n), n = x / sqrt(mean(x^2) + eps) * norm_weight.

    x: [..., H].
    norm_weight: [H], of any floating-point type.
    gate, up: [I, H].
    down: [H, I].
    eps: of the norm.
    returns: [..., H] in x's type; once differentiable in everything but eps.
    memory: with gradients the products of gate and up are kept, two [..., I]; nothing of that size
        without.
    Under torch.autocast the products are taken in its type, and x and what is returned keep theirs.
    raises: ValueError for other shapes, types or devices.
    source: the official AELayer.
    """
    check_tensor("x", x)
    dtype = x.dtype
    autocast = dtype != torch.float64 and is_autocast_on(x.device)
    _check_shapes(x, norm_weight, gate, up, down)
    if not alike(x, norm_weight, gate, up, down):
        _check_types(autocast, x, norm_weight=norm_weight, gate=gate, up=up, down=down)
    check_number("eps", eps)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
    if not _native.use_native("gated_mlp", x, dtype, DTYPES):
        arguments = x, norm_weight, gate, up, down, eps
        return _native.call_reference(reference.gated_mlp, *arguments).to(dtype=x.dtype)

    wide = x if x.dtype == dtype else x.float()
    leaves = (x, norm_weight, gate, up, down)
    keep_products = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    rows = wide if wide.ndim == 2 else wide.flatten(0, -2) if wide.ndim > 2 else wide[None]
    out, _, _ = _native.call(
        "gated_mlp",
        rows,
        norm_weight.to(torch.promote_types(wide.dtype, torch.float32)),
        gate.to(dtype),
        up.to(dtype),
        down.to(dtype),
        eps,
        keep_products,
    )
    return out.view(x.shape).to(x.dtype)


def _check_shapes(x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raises ValueError unless the layer takes x."""
    check(x.ndim >= 1, "x", "shape [..., H]", x.shape)
    check_tensor("gate", gate)
    hidden_size, intermediate_size = x.shape[-1], gate.shape[0] if gate.ndim else None
    check_shape("norm_weight", norm_weight, H=hidden_size)
    check_shape("gate", gate, I=None, H=hidden_size)
    check_shape("up", up, I=intermediate_size, H=hidden_size)
    check_shape("down", down, H=hidden_size, I=intermediate_size)


def _check_types(autocast: bool, x: Tensor, **weights: Tensor) -> None:
    """Raises ValueError unless types and devices fit; the matrices' type may only under autocast
    differ from x's."""
    for name, tensor in dict(x=x, **weights).items():
        check_float(name, tensor)
    check_device(x.device, **weights)
    for name, tensor in weights.items():
        fits = autocast or tensor.dtype == x.dtype or name == "norm_weight"
        check(fits, name, f"x's dtype {x.dtype}", tensor.dtype)


def flat_layers(layers: list[MlpWeights]) -> list[Tensor]:
    """The weights of a chain of layers as kernels list them, norms in the accumulation type."""
    flat = []
    for norm, *matrices in layers:
        flat += [norm.to(torch.promote_types(matrices[0].dtype, torch.float32)), *matrices]
    return flat


def _fake(x, norm_weight, gate, up, down, eps, keep_products):
    products = (x.shape[0], gate.shape[0]) if keep_products else (0,)
    return x.new_empty(x.shape), gate.new_empty(products), gate.new_empty(products)


def _fake_backward(
    grad_out,
    grad_product,
    x,
    norm_weight,
    gate,
    up,
    down,
    gate_product,
    up_product,
    eps,
    need_grad_matrices,
):
    matrices = [
        matrix.new_empty(matrix.shape if need_grad_matrices else (0,))
        for matrix in (gate, up, down)
    ]
    return x.new_empty(x.shape), norm_weight.new_empty(norm_weight.shape), *matrices


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _ = inputs
    _, *products = output
    ctx.mark_non_differentiable(*products)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *products)


def _backward(ctx, grad_out, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gated_mlp: the kernel's gradient cannot be differentiated again; "
            'use calm_rt.backend("reference")'
        )
    if grad_out is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # once: under checkpointing they are computed anew when asked for
    gradients = _native.call(
        "gated_mlp_backward",
        grad_out,
        grad_out.to(saved[2].dtype),  # gate's
        *saved,
        ctx.eps,
        any(ctx.needs_input_grad[2:5]),
    )
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    return *[gradient if need else None for gradient, need in needed], None, None


_native.register("gated_mlp", _fake, _backward, _setup_context)
_native.register("gated_mlp_backward", _fake_backward)
