"""Functions of torch that do what an op does, with their best options: what `library` rows time."""

import torch
from torch import Tensor

if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from torch 2.13 on

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, **_) -> Tensor:
        """The chunked path, with the options that torch picks for the device and the type."""
        return torch.nn.functional.linear_cross_entropy(
            hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
        )
