"""Sampling of the next patch: one draw at T = 1, a vote in a pool of draws below (paper
algorithm 2)."""

import math
from fractions import Fraction
from numbers import Rational
from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt import ops
from calm_rt.nn import Calm
from calm_rt.ops.check import check

SNAP = (
    2.0**-20
)  # 1 / T this close (relative) to an integer is that integer: covers T rounded to float32


def parse_temperature(temperature: float | Fraction | str) -> Fraction:
    """The temperature as 0 or an exact 1 / n.

    temperature: a number, a Fraction or text such as "1/3" or "0.5"; 1 / T is snapped to an integer
        within rounding.
    returns: Fraction(0) or Fraction(1, n).
    raises: ValueError for anything that is neither.
    """
    expected = "0, or 1/n such as 1, 1/2 or 0.25"
    try:
        exact = isinstance(temperature, Rational | str)
        value = Fraction(temperature) if exact else Fraction(float(temperature))
    except (ValueError, OverflowError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"temperature: expected {expected}, got {temperature!r}") from error
    if value == 0:
        return value
    if not 0 < value <= 1:
        raise ValueError(f"temperature: expected {expected}, got {temperature}")
    n = round(1 / value)
    if abs(n * value - 1) <= SNAP:
        return Fraction(1, n)
    n = math.floor(1 / value)
    neighbours = f"1/{n + 1} and {Fraction(1, n)}"
    raise ValueError(
        f"temperature: expected {expected}, got {temperature}; the nearest are {neighbours}"
    )


class PatchSample(NamedTuple):
    """One patch of tokens for every context, and what it took."""

    patches: Tensor  # [B, K] int64, the chosen tokens
    draws: Tensor  # [B] int64, vectors that the head drew for each context
    slots: Tensor  # [B] int64, tokens decoded for it; all of them would be draws * K
    exact: Tensor  # [B] bool, drawn by algorithm 1 or at T = 1; False where a pool chose


def sample_patches(
    model: Calm,
    hidden: Tensor,
    *,
    temperature: float | Fraction | str = 1,
    num_candidates: int = 200,
    method: str = "pool",
    max_draws: int = 10_000,
    on_budget: str = "raise",
    prefix: Tensor | None = None,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
) -> PatchSample:
    """One patch of tokens for every context.

    T = 1: the decoded latent vector of one draw.
    T = 1/n: algorithm 2 on a pool of num_candidates draws.
    T = 0: the most frequent patch of the pool, ties decided uniformly (algorithm 2 with the largest
        n that the pool can show).
    hidden: [B, H], hidden states of the backbone.
    method: "pool", or "exact" for algorithm 1.
    max_draws: of one context, by algorithm 1 or in search of a prefix.
    on_budget: what follows max_draws in algorithm 1: "raise", or "pool" to let a pool choose.
    prefix: [B, K] int64, known first tokens of each patch and -1 where it is free.
    rows: [B] int64, row ids; None for 0, 1, ....
    raises: ValueError for a temperature outside {0, 1, 1/2, 1/3, ...} or an empty pool.
    """
    temperature = parse_temperature(temperature)
    check(num_candidates >= 1, "num_candidates", "at least 1", num_candidates)
    check(method in ("pool", "exact"), "method", '"pool" or "exact"', repr(method))
    check(on_budget in ("raise", "pool"), "on_budget", '"raise" or "pool"', repr(on_budget))
    if method == "exact" or prefix is not None:
        raise NotImplementedError
    num_draws = 1 if temperature == 1 else num_candidates
    latents = model.sample(hidden, num_draws, seed, rows)  # [S, B, L]
    pool = model.ae_model.decode(latents).transpose(0, 1)  # [B, S, K]
    n = temperature.denominator if temperature else num_candidates
    chosen = ops.select_patch(pool, n=n, seed=seed, rows=rows)
    patches = pool[torch.arange(len(pool), device=pool.device), chosen]
    draws = torch.full_like(chosen, num_draws)
    exact = torch.full_like(chosen, temperature == 1, dtype=torch.bool)
    return PatchSample(patches, draws, draws * patches.shape[1], exact)
