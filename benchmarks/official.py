"""The official code's formulas in eager PyTorch, one function a op: what `official` rows time.

Written from the paper and from what the official code computes, with the intermediate tensors that
it makes and with torch's own generator.
"""

import torch
from torch import Tensor


def noise(
    rows: Tensor, num_draws: int, length: int, *, distribution: str = "normal", **_
) -> Tensor:
    """torch's own generator: what users call where they do not care which numbers come."""
    make = torch.randn if distribution == "normal" else torch.rand
    return make(num_draws, rows.shape[0], length, device=rows.device)


def energy_score(
    x: Tensor, mean: Tensor, log_std: Tensor, *, num_targets: int, beta: float = 1.0, **_
) -> Tensor:
    """`EnergyTransformer.energy_score`: all draws against all targets at once."""
    eps = torch.randn(num_targets, *mean.shape, device=mean.device, dtype=mean.dtype)
    targets = mean + log_std.exp() * eps  # [M, R, L]
    draws = x.shape[0]
    among = torch.norm(x[:, None] - x[None], p=2, dim=-1).pow(beta).sum((0, 1)) / (
        draws * (draws - 1)
    )
    toward = (
        torch.norm(x[:, None] - targets[None], p=2, dim=-1).pow(beta).mean((0, 1))
    )  # of [S, M, R, L]
    return among - 2 * toward
