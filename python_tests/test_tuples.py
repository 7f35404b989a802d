"""Tuples of equal draws are Algorithm 2's choice, so they spare a pool without changing it."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from planted import PlantedDraws, planted_pools
from scipy import stats
from test_reference import FALSE_ALARM, distribution
from torch import Tensor

from calm_rt import pool, tuples
from calm_rt.pool import vote
from calm_rt.sampling import PatchSample, sample_from_pool
from calm_rt.tuples import num_tuples, take_tuples

PATCHES = torch.tensor([[3, 1], [3, 2], [4, 1], [9, 9]])
WEIGHTS = torch.tensor([0.6, 0.2, 0.15, 0.05], dtype=torch.float64)
CONTEXTS = 3000


def rows_of(seed: int) -> Tensor:
    return torch.arange(CONTEXTS) + (seed << 33)


def draws_of(seed: int, count: int = CONTEXTS) -> PlantedDraws:
    return PlantedDraws(PATCHES, WEIGHTS, seed, rows_of(seed)[:count])


def sample(draws: PlantedDraws, n: int, size: int, first: bool, **options) -> PatchSample:
    options = {"max_draws": 1000, "prefix": None, **options}
    return sample_from_pool(draws, Fraction(1, n), size, tuples_first=first, **options)


def algorithm_2(size: int, n: int) -> Tensor:
    """Its distribution over all pools of `size` draws: [4] float64."""
    expected = torch.zeros(len(PATCHES), dtype=torch.float64)
    for counts in itertools.product(range(size + 1), repeat=len(PATCHES)):
        if sum(counts) != size:
            continue
        chance = math.factorial(size) * math.prod(
            weight**count / math.factorial(count)
            for weight, count in zip(WEIGHTS.tolist(), counts, strict=True)
        )
        pool = [(kind,) for kind, count in enumerate(counts) for _ in range(count)]
        for index, share in distribution(pool, n).items():
            expected[pool[index][0]] += chance * float(share)
    return expected


def p_values(size: int, n: int, expected: Tensor) -> list[float]:
    """Of a chi^2 test a seed."""
    values = []
    for seed in range(20):
        got = sample(draws_of(seed), n, size, first=True)
        tried = num_tuples(n, size) * n
        assert got.draws.unique().tolist() == [tried, tried + size]  # both ways were taken
        seen = (got.patches[:, None] == PATCHES).all(-1).sum(0)
        values.append(stats.chisquare(seen, CONTEXTS * expected).pvalue)
    return values


@pytest.mark.parametrize(("size", "n"), [(4, 2), (6, 2), (6, 3), (9, 4)])
def test_the_distribution_is_that_of_algorithm_2(size: int, n: int, monkeypatch) -> None:
    """Also in pools so small that tuples often take one draw twice, or all of the pool."""
    monkeypatch.setattr(tuples, "LARGEST_SHARE", 10.0)
    values = p_values(size, n, algorithm_2(size, n))
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM, values


@pytest.mark.parametrize("fault", ["a draw is a pair with itself", "pairs without replacement"])
def test_faults_are_told_apart(fault: str, monkeypatch) -> None:
    """The test can fail: two ways to take pairs that look right and are not."""
    monkeypatch.setattr(tuples, "LARGEST_SHARE", 10.0)
    size, n = (4, 2) if "itself" in fault else (8, 2)
    if "itself" in fault:
        monkeypatch.setattr(torch.Tensor, "diff", lambda x, dim: torch.ones_like(x))
    else:
        apart = torch.arange(8).view(4, 2) / 8
        monkeypatch.setattr(PlantedDraws, "places", lambda s, *_: apart.repeat(len(s.rows), 1, 1))
    values = p_values(size, n, algorithm_2(size, n))
    assert stats.kstest(values, "uniform").pvalue < 1e-6


@pytest.mark.parametrize(("n", "size"), [(2, 200), (3, 200), (8, 64), (25, 200), (2, 5)])
def test_candidates_follow_the_tuples(n: int, size: int, monkeypatch) -> None:
    """Numbers grow by one where a candidate is new, and come back where its place does."""
    monkeypatch.setattr(tuples, "LARGEST_SHARE", 10.0)
    draws = draws_of(1)
    taken = take_tuples(draws, n, size)
    places = (draws.places(0, num_tuples(n, size), n) * size).long()
    assert places.min() == 0 and places.max() == size - 1
    for number, place in zip(taken.candidates[:200], places, strict=False):
        known: dict[int, int] = {}
        for got, where in zip(number.flatten().tolist(), place.flatten().tolist(), strict=True):
            assert got == known.setdefault(where, len(known)) < taken.drawn


def test_the_first_equal_tuple_is_found() -> None:
    tokens = torch.tensor([[[1, 2], [1, 3], [1, 2], [1, 2]]]).expand(5, -1, -1)  # B 5, S 4, K 2
    candidates = torch.tensor(
        [
            [[0, 1], [2, 3]],  # the second
            [[0, 2], [2, 3]],  # the first
            [[0, 1], [1, 2]],  # none
            [[0, 0], [0, 1]],  # none: a draw is no pair with itself
            [[0, 0], [3, 0]],  # the second
        ]
    )
    found, chosen = tuples.Tuples(candidates, 4).find(tokens)
    assert found.tolist() == [True, True, False, False, True]
    assert chosen[found].tolist() == [2, 0, 3]


@pytest.mark.parametrize(("n", "size"), [(1, 200), (2, 60), (26, 200), (200, 200)])
def test_no_tuples_where_they_cost_too_much(n: int, size: int) -> None:
    assert num_tuples(n, size) == 0
    got = sample(draws_of(0, 9), n, size, first=True)
    assert (got.draws == size).all() and not got.sure.any()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("whole", [False, True], ids=["lazy", "whole"])
def test_the_order_changes_what_it_takes_alone(n: int, whole: bool) -> None:
    draws = draws_of(n, 500)
    draws.size_of_search = 0 if whole else 1 << 62
    last, first = (sample(draws, n, 200, first=way) for way in (False, True))
    assert torch.equal(first.patches, last.patches) and torch.equal(first.sure, last.sure)
    assert 0 < first.sure.sum() < 500 and (last.draws == 200).all()
    tried = num_tuples(n, 200) * n
    assert torch.equal(first.draws, torch.where(first.sure, tried, tried + 200))
    assert (first.slots[first.sure] == 2 * tried).all()
    assert not first.exact.any() and not last.exact.any()


@pytest.mark.parametrize("price", [-1, 32, 10**9])
@pytest.mark.parametrize("kinds", [(2, 2), (1, 1, 1), (9, 3, 30, 2), (400, 400)])
def test_a_lazy_pool_finds_them(kinds: tuple[int, ...], price: int, monkeypatch) -> None:
    """Whatever a pass over the vocabulary costs, and with less than all tokens."""
    monkeypatch.setitem(pool.PASS_ROWS, "cpu", price)
    generator = torch.Generator().manual_seed(price % 97)
    slots = [torch.rand(200, 200, generator=generator) ** 3 * kind for kind in kinds]
    tokens, rows = torch.stack(slots, -1).long(), torch.arange(200)
    draws = planted_pools(tokens, 7, rows)
    taken = take_tuples(draws, 2, 200)
    got = vote(draws, tokens, 2, tuples=taken)
    found, chosen = taken.find(tokens)
    assert torch.equal(got.sure, found)
    assert torch.equal(got.patches[found], tokens[found, chosen[found]])
    plain = vote(planted_pools(tokens, 7, rows), tokens, 2)
    assert torch.equal(got.patches[~found], plain.patches[~found])
    assert draws.decoded == got.slots.sum() <= tokens.numel()
    if found.all() and price < 0:
        assert (got.slots < plain.slots).all()


def test_known_tokens_of_one_context_change_no_other() -> None:
    prefix = torch.full((500, 2), -1)
    prefix[::7, 0] = 3
    for first in (False, True):
        free = sample(draws_of(2, 500), 2, 200, first)
        mixed = sample(draws_of(2, 500), 2, 200, first, prefix=prefix)
        others = prefix[:, 0] < 0
        for field in ("patches", "draws", "sure", "exact"):
            assert torch.equal(getattr(mixed, field)[others], getattr(free, field)[others])
        assert (mixed.patches[~others, 0] == 3).all() and (mixed.draws[~others] == 400).all()
        assert not mixed.sure[~others].any()


def test_at_temperature_one_known_tokens_leave_the_others_exact() -> None:
    prefix = torch.full((50, 2), -1)
    prefix[::7, 0] = 3
    assert sample(draws_of(2, 50), 1, 200, first=True, prefix=prefix).exact.all()
