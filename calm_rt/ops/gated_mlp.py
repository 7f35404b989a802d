"""The autoencoder's layer: a residual gated MLP on a normalised input."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_device, check_float, check_shape
from calm_rt.reference import MlpWeights


def gated_mlp(
    x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """x + down(silu(gate n) * up n), n = x / sqrt(mean(x^2) + eps) * norm_weight.

    x: [..., H].
    norm_weight: [H].
    gate, up: [I, H].
    down: [H, I].
    returns: [..., H].
    Raises ValueError for other shapes, types or devices.
    Source: the official AELayer.
    """
    check(x.ndim >= 1, "x", "shape [..., H]", list(x.shape))
    hidden_size, intermediate_size = x.shape[-1], gate.shape[0] if gate.ndim else None
    check_shape("norm_weight", norm_weight, H=hidden_size)
    check_shape("gate", gate, I=None, H=hidden_size)
    check_shape("up", up, I=intermediate_size, H=hidden_size)
    check_shape("down", down, H=hidden_size, I=intermediate_size)
    for name, tensor in dict(x=x, norm_weight=norm_weight, gate=gate, up=up, down=down).items():
        check_float(name, tensor)
    check_device(x.device, norm_weight=norm_weight, gate=gate, up=up, down=down)
    _native.reference_only("gated_mlp")
    return reference.gated_mlp(x, norm_weight, gate, up, down, eps)


def flat_layers(layers: list[MlpWeights]) -> list[Tensor]:
    """The weights of a chain of layers as kernels list them, norms in the accumulation type."""
    flat = []
    for norm, *matrices in layers:
        flat += [norm.to(torch.promote_types(norm.dtype, torch.float32)), *matrices]
    return flat
