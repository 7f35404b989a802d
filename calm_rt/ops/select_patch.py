"""Sampling below temperature 1: the choice of one patch from a pool of draws."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_int, check_int64, check_shape, seed_and_rows

DTYPES = {"cpu": (torch.int64,), "cuda": (torch.int64,)}


def select_patch(
    tokens: Tensor, *, n: int, seed: int | Tensor = 0, rows: Tensor | None = None
) -> Tensor:
    """Algorithm 2 at temperature 1 / n.

    The patches that occur at least m times in the pool compete with weight C(count, m), for the
    largest m <= n that any patch reaches.

    tokens: [B, S, K] int64, a pool of S candidate patches for each context.
    n: at least 1; from S on the most frequent patches compete alone.
    seed: an int, or [] int64 (under torch.compile and in CUDA graphs).
    rows: [B] int64, logical row ids, on which a row's choice depends; None for 0 .. B-1.
    returns: [B] int64, the index in the pool of the chosen patch's first occurrence; the same on
        every device.
    raises: ValueError for other shapes or types, an empty pool or n below 1.
    source: paper algorithm 2, the official CALM.temperature_sampling.
    """
    # in a fifth of what the checks take
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.dtype != torch.int64:
        check_shape("tokens", tokens, B=None, S=None, K=None)
        check_int64("tokens", tokens)
    num_rows, pool, _ = tokens.shape
    check(pool >= 1, "tokens", "at least one candidate in shape [B, S, K]", tokens.shape)
    n = min(check_int("n", n, 1), pool)  # no patch can occur more often
    seed, rows = seed_and_rows(seed, rows, num_rows, tokens.device)
    if not _native.use_native("select_patch", tokens, torch.int64, DTYPES):
        return _native.call_reference(reference.select_patch, tokens, n, seed, rows)
    return _native.call("select_patch", tokens, seed, rows, n)


def _fake(tokens, seed, rows, n):
    return tokens.new_empty(tokens.shape[0])


_native.register("select_patch", _fake)
