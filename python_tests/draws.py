"""Losses of the official stand-in, drawn many times and compared as distributions."""

import torch
from official_standin import AE
from torch import Tensor, nn

DRAWS = 200  # of a loss, to compare two means
SIGMAS = 5.0  # two means of the same distribution differ by more once in two million times


def token_ids(batch: int = 2, patches: int = 4, patch_size: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, AE["vocab_size"], (batch, patches * patch_size), generator=generator)


def losses(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """[DRAWS] losses with new noise each."""
    labels = ids if labels is None else labels
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=ids, labels=labels).loss for _ in range(DRAWS)]
        ).double()


def assert_same_mean(first: Tensor, second: Tensor) -> None:
    """first, second: [N, ...] draws of what should be one distribution."""
    spread = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    error = (first.mean(0) - second.mean(0)).abs()
    assert (error <= SIGMAS * spread).all(), (error / spread).max()
