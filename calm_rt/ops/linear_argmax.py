"""Which row of a matrix has the largest product with a vector: the most probable token."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_device, check_float, check_shape

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """id[r] = argmax_v <hidden_r, weight_v>, ties to the lowest id.

    hidden: [R, H].
    weight: [V, H], V at least 1.
    returns: [R] int64; no gradient. The kernel's ids are those of exact arithmetic on the inputs
        on every device, the reference's those of a product rounded to the inputs' type.
    Memory: no [R, V] logits; on the CPU no score at all, [R, H] of 8-bit numbers, on a GPU a block.
    Raises ValueError for other shapes, types or devices.
    Source: the argmax in the official CALM.temperature_sampling.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_shape("weight", weight, V=None, H=hidden.shape[1])
    check(weight.shape[0] >= 1, "weight", "at least one row", list(weight.shape))
    check_float("hidden", hidden)
    check_float("weight", weight)
    check_device(hidden.device, weight=weight)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    if not _native.use_native("linear_argmax", hidden, dtype, DTYPES):
        return reference.linear_argmax(hidden, weight)
    return torch.ops.calm_rt.linear_argmax(hidden, weight)


def _fake(hidden, weight):
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


_native.register("linear_argmax", _fake)
