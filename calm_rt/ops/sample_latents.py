"""The energy head: draws of the next latent vector."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    check,
    check_device,
    check_float,
    check_head,
    check_shape,
    seed_and_rows,
)
from calm_rt.reference import HeadWeights


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
    weights: of the energy head.
    num_samples: S, at least 1.
    seed: an int, or [] int64 (under torch.compile and in CUDA graphs).
    rows: [R] int64, logical row ids, on which a row's noise depends; None for 0 .. R-1.
    returns: [S, R, L].
    Raises ValueError for other shapes, types or devices.
    Source: paper section 3.3, the official MLPGenerator.sample.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_float("hidden", hidden)
    check_head(weights, hidden.shape[1])
    check_device(hidden.device, weights=weights.noise.weight)
    check(num_samples >= 1, "num_samples", "at least 1", num_samples)
    seed, rows = seed_and_rows(seed, rows, hidden.shape[0], hidden.device)
    _native.reference_only("sample_latents")
    return reference.sample_latents(hidden, weights, num_samples, seed, rows)
