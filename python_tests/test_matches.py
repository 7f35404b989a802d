"""Draws behind known tokens: Algorithm 2 on a pool of as many as were asked for."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from planted import PlantedDraws
from scipy import stats
from test_reference import FALSE_ALARM, distribution
from torch import Tensor

from calm_rt.matches import gather_matches
from calm_rt.sampling import PatchSample, sample_from_pool

PATCHES = torch.tensor([[3, 1], [3, 2], [3, 5], [4, 1], [9, 9]])
BEHIND = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # of 3, what follows it
CONTEXTS = 2000


def draws_of(seed: int, chance: float, behind: Tensor = BEHIND, count: int = CONTEXTS):
    """Patches that begin with 3 with a chance."""
    weights = torch.cat([chance * behind, (1 - chance) * torch.tensor([0.7, 0.3])])
    rows = torch.arange(count) + (seed << 33)
    return PlantedDraws(PATCHES[-len(weights) :], weights, seed, rows)


def sample(draws: PlantedDraws, n: int, size: int, max_draws: int) -> PatchSample:
    prefix = torch.tensor([[3, -1]]).repeat(len(draws.rows), 1)
    return sample_from_pool(draws, Fraction(1, n), size, max_draws, prefix)


def algorithm_2(size: int, n: int, behind: Tensor = BEHIND) -> Tensor:
    """Its distribution over all pools of `size` draws of what follows."""
    expected = torch.zeros(len(behind), dtype=torch.float64)
    for counts in itertools.product(range(size + 1), repeat=len(behind)):
        if sum(counts) == size:
            chances = zip(behind.tolist(), counts, strict=True)
            ways = math.factorial(size) // math.prod(map(math.factorial, counts))
            chance = ways * math.prod(share**count for share, count in chances)
            pool = [(kind,) for kind, count in enumerate(counts) for _ in range(count)]
            for index, share in distribution(pool, n).items():
                expected[pool[index][0]] += chance * float(share)
    return expected


def p_value(got: PatchSample, expected: Tensor) -> float:
    """Of a chi^2 test."""
    assert (got.patches[:, 0] == 3).all()
    kinds = PATCHES[: len(expected), 1] if len(expected) == 3 else PATCHES[1:3, 1]
    seen = (got.patches[:, 1:] == kinds).sum(0)
    return stats.chisquare(seen, len(got.patches) * expected).pvalue


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("size", "n"), [(6, 2), (8, 3), (5, 5), (4, 1)])
def test_a_pool_of_matches_is_one_of_the_conditional(size: int, n: int, chance: float) -> None:
    """However rare the known tokens are."""
    expected = BEHIND if n == 1 else algorithm_2(size, n)
    values = [p_value(sample(draws_of(s, chance), n, size, 10_000), expected) for s in range(20)]
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM, values


@pytest.mark.filterwarnings("ignore:prefix")  # where there is none at all
@pytest.mark.parametrize(("size", "max_draws"), [(6, 20), (50, 20), (20, 30)])
def test_max_draws_leave_a_smaller_pool(size: int, max_draws: int) -> None:
    """Also where they are fewer than one pool; the rest of a search is no whole round."""
    chance, values = 0.3, []
    found = stats.binom(max_draws, chance)
    shares = [found.pmf(m) for m in range(size)]
    shares.append(1 - sum(shares))
    shares = torch.tensor(shares[1 : max_draws + 1]) / (1 - shares[0])  # given one at least
    small = [BEHIND, *(algorithm_2(m, 2) for m in range(2, len(shares) + 1))]
    expected = (shares[:, None] * torch.stack(small)).sum(0)
    for seed in range(20):
        got = sample(draws_of(seed, chance), 2, size, max_draws)
        rounds = torch.tensor([*range(size, max_draws, size), max_draws])
        assert (got.draws[:, None] == rounds).any(1).all()
        prefix = torch.tensor([[3, -1]]).repeat(CONTEXTS, 1)
        found = gather_matches(draws_of(seed, chance), prefix, 1, size, max_draws).found > 0
        values.append(p_value(PatchSample(*(column[found] for column in got)), expected))
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM, values


def test_a_rare_prefix_has_the_temperature_of_a_common_one() -> None:
    """Pools of 200 behind tokens of probability 4 %: p^2 / Z and not p."""
    behind = torch.tensor([0.8, 0.2], dtype=torch.float64)
    exact = behind**2 / (behind**2).sum()
    expected = algorithm_2(200, 2, behind)
    torch.testing.assert_close(expected, exact, atol=0.003, rtol=0)
    got = sample(draws_of(1, 0.04, behind, 1000), 2, 200, 10_000)
    assert p_value(got, expected) > FALSE_ALARM
    assert 4500 < got.draws.double().mean() < 5500


def test_only_what_begins_with_them_is_decoded_further() -> None:
    draws = draws_of(3, 0.1, count=50)
    got = sample(draws, 2, 20, 10_000)
    assert (got.slots >= got.draws).all() and (got.slots <= got.draws + 20).all()
    one = sample(draws, 1, 20, 10_000)
    assert (one.slots == one.draws + 1).all() and one.exact.all()
    first = gather_matches(draws, torch.tensor([[3, -1]]).repeat(50, 1), 1, 20, 10_000)
    assert torch.equal(first.draws, one.draws) and (first.found == 1).all()


def test_a_context_does_not_depend_on_its_batch() -> None:
    draws = draws_of(4, 0.2, count=40)
    together = sample(draws, 2, 30, 200)
    for row in range(40):
        alone = sample(draws.of(torch.tensor([row])), 2, 30, 200)
        for field in ("patches", "draws"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[row])
    assert len(together.draws.unique()) > 2
