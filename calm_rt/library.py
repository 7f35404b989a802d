"""Other people's functions that do what an op does, with their best options: torch's, which
`library` rows time, and on a GPU Liger's, which `liger` rows do."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from torch 2.13 on

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, **_) -> Tensor:
        """The chunked path, with the options that torch picks for the device and the type."""
        return torch.nn.functional.linear_cross_entropy(
            hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
        )


@functools.cache
def liger(op: str) -> Callable | None:
    """Liger's function for an op; None where it has none or cannot be imported."""
    if op != "linear_cross_entropy":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target, **_: loss(weight, hidden, target)
