"""Which row of a matrix has the largest product with a vector: the most probable token."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_device, check_float, check_shape


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """id[r] = argmax_v <hidden_r, weight_v>, ties to the lowest id.

    hidden: [R, H].
    weight: [V, H], V at least 1.
    returns: [R] int64; no gradient.
    Raises ValueError for other shapes, types or devices.
    Source: the argmax in the official CALM.temperature_sampling.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_shape("weight", weight, V=None, H=hidden.shape[1])
    check(weight.shape[0] >= 1, "weight", "at least one row", list(weight.shape))
    check_float("hidden", hidden)
    check_float("weight", weight)
    check_device(hidden.device, weight=weight)
    _native.reference_only("linear_argmax")
    return reference.linear_argmax(hidden, weight)
