"""Sampling below temperature 1: the choice of one patch from a pool of draws."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_int64, check_shape, seed_and_rows


def select_patch(
    tokens: Tensor, *, n: int, seed: int | Tensor = 0, rows: Tensor | None = None
) -> Tensor:
    """Algorithm 2 at temperature 1 / n.

    The patches that occur at least m times in the pool compete with weight C(count, m), for the
    largest m <= n that any patch reaches.

    tokens: [B, S, K] int64, a pool of S candidate patches for each context.
    n: at least 1.
    seed: an int, or [] int64 (under torch.compile and in CUDA graphs).
    rows: [B] int64, logical row ids, on which a row's choice depends; None for 0 .. B-1.
    returns: [B] int64, the index in the pool of the chosen patch's first occurrence.
    Raises ValueError for other shapes or types, an empty pool or n below 1.
    Source: paper algorithm 2, the official CALM.temperature_sampling.
    """
    check_shape("tokens", tokens, B=None, S=None, K=None)
    check_int64("tokens", tokens)
    check(
        tokens.shape[1] >= 1,
        "tokens",
        "at least one candidate in shape [B, S, K]",
        list(tokens.shape),
    )
    check(n >= 1, "n", "at least 1", n)
    seed, rows = seed_and_rows(seed, rows, tokens.shape[0], tokens.device)
    _native.reference_only("select_patch")
    return reference.select_patch(tokens, n, seed, rows)
