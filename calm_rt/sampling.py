"""Sampling of the next patch at a temperature.

T = 1 is one draw. Below it either a pool of draws votes (paper algorithm 2), at a cost that is
bounded beforehand and with a distribution that comes near p^(1/T) / Z in large pools: a few tuples
of the pool are tried first (calm_rt.tuples), which often spares the rest, then all vote, decoded as
far as need be (calm_rt.pool). Or draws are rejected (algorithm 1, calm_rt.rejection), which is
exact and takes as long as it takes.
"""

import math
import warnings
from fractions import Fraction
from numbers import Rational
from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt import ops
from calm_rt.draws import Draws
from calm_rt.matches import gather_matches
from calm_rt.nn import Calm
from calm_rt.ops.check import (
    check,
    check_device,
    check_int,
    check_int64,
    check_shape,
    may_look,
    seed_and_rows,
)
from calm_rt.pool import draw_blindly, vote
from calm_rt.rejection import LARGEST_ROUND, BudgetError, reject
from calm_rt.tuples import Tuples, take_tuples

MAX_DRAWS = 10_000  # of a context, 50 pools of the official size
POOL_BYTES = 1 << 28  # of draws that are held at once, but for a larger pool of a single context
# Pools whose search of the vocabulary takes fewer multiplications are decoded whole: deciding what
# can be spared takes longer, 2 ms where 200 draws of 2 tokens from 1,024 take 1.
WHOLE_SEARCH = 1 << 30
# Largest 1 / T of algorithm 1, which counts as many calls a trial; no patch is found near it.
LARGEST_POWER = 1 << 30
# 1 / T this close (relative) to an integer is that integer: covers T rounded to float32
SNAP = 2.0**-19

METHODS = ("pool", "exact")


class PatchSample(NamedTuple):
    """One patch of tokens for every context, and what it took."""

    patches: Tensor  # [B, K] int64, the chosen tokens
    draws: Tensor  # [B] int64, vectors that the head drew for each context
    slots: Tensor  # [B] int64, tokens decoded for it; all of them would be draws * K
    exact: Tensor  # [B] bool, of p^(1/T) / Z: algorithm 1 or T = 1; False where a pool chose
    matched: Tensor  # [B] bool, no known token had to be put over another patch
    trials: Tensor  # [B] int64, of algorithm 1, 0 without it: one in so many was accepted
    calls: Tensor  # [B] int64, its calls of the sampler, as the paper's theorem 2 counts them
    spared: Tensor  # [B] int64, those of them that took no draw, e.g. after a first difference
    sure: Tensor  # [B] bool, a tuple of a pool's first draws was equal, which decided


_COUNTS = ("draws", "slots", "trials", "calls", "spared")
_FLAGS = ("exact", "matched", "sure")


def parse_temperature(temperature: float | Fraction | str, method: str = "pool") -> Fraction:
    """The temperature as an exact number.

    temperature: a number, a Fraction or text such as "1/3" or "0.5"; within rounding of 1 / n it
        is 1 / n.
    method: "pool", or "exact" for algorithm 1.
    returns: Fraction(0) or Fraction(1, n) for "pool", any in (0, 1] for "exact".
    raises: ValueError for anything else.
    """
    check(method in METHODS, "method", '"pool" or "exact"', repr(method))
    exact = method == "exact"
    expected = "a number in (0, 1]" if exact else "0, or 1/n such as 1, 1/2 or 0.25"
    try:
        if isinstance(temperature, Rational):  # of numpy ints Fraction would keep the parts
            value = Fraction(int(temperature.numerator), int(temperature.denominator))
        else:
            text = isinstance(temperature, str)
            value = Fraction(temperature if text else float(temperature))
    except (ValueError, OverflowError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"temperature: expected {expected}, got {temperature!r}") from error
    if value == 0 and not exact:
        return value
    check(0 < value <= 1, "temperature", expected, temperature)
    if exact:
        expected = f'{expected}, at least 2^-30 with method="exact" (0 or 1/n with a pool)'
        check(value * LARGEST_POWER >= 1, "temperature", expected, repr(temperature))
    n = round(1 / value)
    if abs(n * value - 1) <= SNAP:
        return Fraction(1, n)
    if exact:
        return value
    n = math.floor(1 / value)
    raise ValueError(
        f"temperature: expected {expected}, got {_shortly(value)}; the nearest are 1/{n + 1} and "
        f'{Fraction(1, n)}, and method="exact" takes any'
    )


@torch.no_grad()
def sample_patches(
    model: Calm,
    hidden: Tensor,
    *,
    temperature: float | Fraction | str = 1,
    num_candidates: int = 200,
    method: str = "pool",
    max_draws: int = MAX_DRAWS,
    on_budget: str = "raise",
    prefix: Tensor | None = None,
    tuples_first: bool = False,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
) -> PatchSample:
    """One patch of tokens for every context.

    T = 1: the decoded latent vector of one draw.
    method "pool": algorithm 2 on a pool of num_candidates draws, T = 1/n; at T = 0 the most
        frequent patch of the pool, ties decided uniformly. Where no patch repeats it is one draw.
    method "exact": algorithm 1, any T in (0, 1].
    hidden: [B, H], hidden states of the backbone.
    num_candidates: of a pool, at least 1.
    max_draws: of one context, by algorithm 1 or in search of a prefix.
    on_budget: what follows when algorithm 1 has made max_draws: "raise", or "pool" to let a new
        pool choose, at the 1/n with n nearest to 1/T (then exact is False).
    prefix: [B, K] int64, known first tokens of each patch, -1 where it is free. The patch comes
        from the conditional distribution at the temperature: a pool is num_candidates draws that
        begin with the tokens, gathered over rounds of num_candidates draws (T = 1 takes the first
        that does). Where max_draws end the search before, those found are the pool: the fewer they
        are the nearer it comes to T = 1, which is what a single one gives. If there is none, a
        warning and `matched` say so, and the tokens are put over what a pool of any draws chooses.
    tuples_first: whether the few draws that may decide for a pool are made and decoded before its
        others. The same patches, up to the rounding of matrix products, which in float32 is another
        for few rows than for many. Cheaper where many contexts are sure (`PatchSample.sure`),
        dearer where few are, for those draws are made again with the others.
    seed: an int, or [] int64.
    rows: [B] int64, row ids, on which a context's draws depend; None for 0, 1, ....
    returns: PatchSample. The draws of a context depend on (seed, row id, number of the draw) only.
    raises: ValueError for a temperature that the method does not have, and for other arguments out
        of range; BudgetError for contexts for which algorithm 1 found no patch.
    source: paper algorithms 1 and 2, the official CALM.temperature_sampling.
    """
    temperature = parse_temperature(temperature, method)
    check_shape("hidden", hidden, B=None, H=model.config.hidden_size)
    num_candidates = check_int("num_candidates", num_candidates, 1)
    max_draws = check_int("max_draws", max_draws, 1)
    check(on_budget in ("raise", "pool"), "on_budget", '"raise" or "pool"', repr(on_budget))
    if prefix is not None:
        _check_prefix(model, hidden, prefix)
    seed, rows = seed_and_rows(seed, rows, len(hidden), hidden.device)
    if temperature == 1 and prefix is None:
        patches = sample_blindly(model, hidden, temperature, 1, seed, rows)
        one, none = torch.ones_like(rows), torch.zeros_like(rows)
        return PatchSample(
            patches=patches,
            draws=one,
            slots=one * patches.shape[1],
            exact=one > 0,
            matched=one > 0,
            trials=none,
            calls=none,
            spared=none,
            sure=none > 0,
        )

    largest = num_candidates if method == "pool" else max(num_candidates, LARGEST_ROUND)
    largest *= 1 if prefix is None else 2  # a round, and what is kept of those before
    contexts, parts = torch.arange(len(rows), device=rows.device), []
    for part in contexts.split(contexts_at_once(model, largest)):
        draws = Draws(model, hidden[part], seed, rows[part])
        known = None if prefix is None else prefix[part]
        if method == "exact":
            settings = (num_candidates, max_draws, on_budget, known)
            parts.append(sample_by_rejection(draws, temperature, *settings))
        else:
            settings = (num_candidates, max_draws, known, tuples_first)
            parts.append(sample_from_pool(draws, temperature, *settings))
    return PatchSample(*map(torch.cat, zip(*parts, strict=True)))


def sample_blindly(
    model: Calm,
    hidden: Tensor,
    temperature: Fraction,
    num_candidates: int,
    seed: Tensor,
    rows: Tensor,
) -> Tensor:
    """What `sample_patches` draws at T = 1 or by pools: nothing waits for the host.

    hidden: [B, H].  temperature: of parse_temperature.  seed: [] int64.  rows: [B] int64.
    returns: [B, K] int64.
    """
    if temperature == 1:
        return model.ae_model.decode(model.sample(hidden, 1, seed, rows)[0])
    contexts = contexts_at_once(model, num_candidates)
    parts = zip(hidden.split(contexts), rows.split(contexts), strict=True)
    n, patches = _level(temperature, num_candidates), []
    for some_hidden, some_rows in parts:
        draws = Draws(model, some_hidden, seed, some_rows)
        tuples = take_tuples(draws, n, num_candidates)
        spares = not decodes_whole(draws, num_candidates)
        pool = (draw_blindly if spares else Draws.whole_patches)(draws, 0, num_candidates)
        patches.append(_choose(draws, pool, n, tuples)[0])
    return torch.cat(patches)


def contexts_at_once(model: Calm, count: int) -> int:
    """How many contexts' `count` draws fit in POOL_BYTES; others wait."""
    config, item = model.ae_model.config, model.ae_model.decoder.lm_head_weight.itemsize
    return max(1, POOL_BYTES // (count * item * (config.latent_size + 2 * config.hidden_size)))


def decodes_whole(draws: Draws, count: int) -> bool:
    """Whether pools of `count` draws are decoded without a look at what can be spared."""
    return draws.search_size(count) < WHOLE_SEARCH


def sample_from_pool(
    draws: Draws,
    temperature: Fraction,
    num_candidates: int,
    max_draws: int,
    prefix: Tensor | None,
    tuples_first: bool = False,
    first_round: int = 0,
) -> PatchSample:
    """Algorithm 2 on all contexts, each on a round of draws; see `sample_patches`.

    first_round: number of the first pool's round.
    """
    n = _level(temperature, num_candidates)
    settings = (n, num_candidates, first_round, tuples_first)
    if prefix is None:
        sample = _sample_freely(draws, *settings)
    else:
        sample, known = _no_sample(draws), (prefix >= 0).any(1)
        free, behind = (~known).nonzero().squeeze(1), known.nonzero().squeeze(1)
        if len(free):
            _put(sample, free, _sample_freely(draws.of(free), *settings))
        if len(behind):
            settings = (n, num_candidates, max_draws, prefix[behind], first_round)
            _put(sample, behind, _sample_behind(draws.of(behind), *settings))
    if temperature != 1:
        sample.exact.fill_(False)
    return sample


def _sample_freely(
    draws: Draws, n: int, num_candidates: int, number: int, tuples_first: bool
) -> PatchSample:
    """The choice of the whole of a round, drawn and decoded as far as the choice depends on it."""
    tuples = take_tuples(draws, n, num_candidates, number)
    if tuples is None or not tuples_first:
        return _sample_by_vote(draws, n, num_candidates, number, tuples)
    tokens = draws.whole_patches(number, tuples.drawn)  # [B, T n, K]
    found, chosen = tuples.find(tokens)
    sample = _no_sample(draws)._replace(patches=_pick(tokens, chosen), sure=found)
    sample.draws.fill_(tuples.drawn)
    sample.slots.fill_(tuples.drawn * draws.patch_size)
    missing = (~found).nonzero().squeeze(1)
    if len(missing):
        _put(sample, missing, _sample_by_vote(draws.of(missing), n, num_candidates, number))
    return sample


def _sample_by_vote(
    draws: Draws, n: int, num_candidates: int, number: int, tuples: Tuples | None = None
) -> PatchSample:
    """The vote of a whole round, where no tuple decides.  tuples: those that are not tried yet."""
    sample = _no_sample(draws)
    sample.draws.fill_(num_candidates)
    sample.exact.fill_(True)
    if n > 1 and decodes_whole(draws, num_candidates):
        patches, sure = _choose(draws, draws.whole_patches(number, num_candidates), n, tuples)
        sample.slots.fill_(num_candidates * draws.patch_size)
        return sample._replace(patches=patches, sure=sure)
    choice = vote(draws, draws.draw(number, num_candidates), n, tuples=tuples)
    return sample._replace(patches=choice.patches, slots=choice.slots, sure=choice.sure)


def _sample_behind(
    draws: Draws, n: int, num_candidates: int, max_draws: int, prefix: Tensor, first_round: int
) -> PatchSample:
    """The vote of candidates that begin with known tokens; at T = 1 the first of them."""
    wanted = num_candidates if n > 1 else 1
    known = gather_matches(draws, prefix, wanted, num_candidates, max_draws, first_round)
    choice = vote(draws, known.states, n, tokens=known.tokens, alive=known.alive())
    matched = known.found > 0
    if not matched.all():
        rows = draws.rows[~matched].tolist()
        warnings.warn(
            f"prefix: no draw of {max_draws} begins with them in {len(rows)} of {len(matched)} "
            f"contexts with known tokens, with row ids {_some(rows)}; they are put over another "
            "patch",
            stacklevel=5,
        )
    patches = torch.where(prefix < 0, choice.patches, prefix)
    slots = known.slots + choice.slots
    sample = _no_sample(draws)._replace(patches=patches, draws=known.draws, slots=slots)
    return sample._replace(exact=matched, matched=matched.clone())


def _level(temperature: Fraction, num_candidates: int) -> int:
    """How often a patch must occur to compete, if any does; T = 0 asks for the most frequent."""
    return min(temperature.denominator, num_candidates) if temperature else num_candidates


def _choose(draws: Draws, pool: Tensor, n: int, tuples: Tuples | None) -> tuple[Tensor, Tensor]:
    """The choice from decoded pools.  pool: [B, S, K].  returns: [B, K]; [B] bool, by a tuple."""
    chosen = ops.select_patch(pool, n=n, seed=draws.seed, rows=draws.rows)  # [B]
    if tuples is None:
        return _pick(pool, chosen), torch.zeros_like(chosen, dtype=torch.bool)
    found, equal = tuples.find(pool)
    return _pick(pool, torch.where(found, equal, chosen)), found


def _pick(pool: Tensor, chosen: Tensor) -> Tensor:
    """pool: [B, S, K].  chosen: [B].  returns: [B, K]."""
    return pool[torch.arange(len(pool), device=pool.device), chosen]


def sample_by_rejection(
    draws: Draws,
    temperature: Fraction,
    num_candidates: int,
    max_draws: int,
    on_budget: str,
    prefix: Tensor | None,
) -> PatchSample:
    """Algorithm 1 on all contexts; see `sample_patches`."""
    result = reject(draws, temperature, max_draws, prefix)
    counts = {name: getattr(result, name) for name in _COUNTS}
    sample = _no_sample(draws)._replace(patches=result.patches, exact=result.found, **counts)
    missing = (~result.found).nonzero().squeeze(1)
    if not len(missing):
        return sample
    if on_budget == "raise":
        rows = draws.rows[missing].tolist()
        raise BudgetError(
            f"algorithm 1 at temperature {_shortly(temperature)}: no patch within "
            f"max_draws = {max_draws} in {len(missing)} of {len(result.found)} contexts, the first "
            f"with row id {rows[0]}; "
            'raise max_draws, or pass on_budget="pool"',
            result,
        )
    nearest = Fraction(1, round(1 / temperature))
    known = None if prefix is None else prefix[missing]
    rest = sample_from_pool(
        draws.of(missing), nearest, num_candidates, max_draws, known, first_round=result.rounds
    )
    _put(sample, missing, rest._replace(exact=sample.exact[missing]))
    return sample


def _no_sample(draws: Draws) -> PatchSample:
    """Nothing drawn yet, to be filled in."""
    patches = draws.rows.new_full((len(draws.rows), draws.patch_size), -1)
    counts = dict(zip(_COUNTS, draws.rows.new_zeros(len(_COUNTS), len(draws.rows)), strict=True))
    flags = torch.zeros(3, len(draws.rows), dtype=torch.bool, device=patches.device)
    flags = dict(zip(_FLAGS, flags, strict=True))
    flags["matched"].fill_(True)
    return PatchSample(patches=patches, **flags, **counts)


def _put(sample: PatchSample, contexts: Tensor, rest: PatchSample) -> None:
    """Gives some contexts their patches, and adds what those took.  contexts: [C] int64."""
    sample.patches[contexts] = rest.patches
    for name in _COUNTS:
        getattr(sample, name)[contexts] += getattr(rest, name)
    for name in _FLAGS:
        getattr(sample, name)[contexts] = getattr(rest, name)


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _shortly(value: Fraction) -> str:
    """A fraction as it may have been written: 1/3, or 0.7 for the double that is nearest to it."""
    return str(value) if value.denominator < 1000 else f"{float(value):.6g}"


def _check_prefix(model: Calm, hidden: Tensor, prefix: Tensor) -> None:
    check_shape("prefix", prefix, B=len(hidden), K=model.config.patch_size)
    check_int64("prefix", prefix)
    check_device(hidden.device, prefix=prefix)
    if may_look(prefix):
        low, high = (int(bound) for bound in prefix.aminmax())
        sizes = f"token ids below {model.config.vocab_size}, or -1"
        check(-1 <= low and high < model.config.vocab_size, "prefix", sizes, (low, high))
        known = prefix >= 0
        ordered = bool((known[:, 1:] <= known[:, :-1]).all())
        check(ordered, "prefix", "known tokens first, then -1", prefix.tolist())
