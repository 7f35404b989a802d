"""Algorithm 1: the distribution p^(1/T) / Z, at the cost of theorem 2."""

from fractions import Fraction

import pytest
import torch
from planted import PlantedDraws
from scipy import stats
from test_reference import FALSE_ALARM
from torch import Tensor

from calm_rt import rejection
from calm_rt.rejection import BudgetError, Rejection, reject
from calm_rt.sampling import sample_by_rejection
from calm_rt.threads import restored_threads

PATCHES = torch.tensor([[3, 1, 2], [3, 1, 4], [3, 2, 2], [4, 1, 2], [4, 5, 6]])
WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
TEMPERATURES = [Fraction(t) for t in ("1", "1/2", "1/4", "9/10", "2/3", "0.4", "3/10")]


def planted(seed: int, rows: int | Tensor, weights: Tensor = WEIGHTS) -> PlantedDraws:
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    return PlantedDraws(PATCHES, weights, seed, rows)


def counts(result: Rejection, patches: Tensor = PATCHES) -> Tensor:
    """How often each patch was found.  returns: [X]."""
    assert result.found.all()
    seen = (result.patches[:, None] == patches).all(-1)  # [B, X]
    assert seen.any(1).all()
    return seen.sum(0)


def is_mean(values: Tensor, expected: float) -> bool:
    """Whether the mean of independent values is as expected, up to chance."""
    error = values.double().std() / len(values) ** 0.5
    if error == 0:
        return bool((values == expected).all())
    return 2 * stats.norm.sf(float(abs(values.double().mean() - expected) / error)) > FALSE_ALARM


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
def test_frequencies_are_those_of_the_power(temperature: Fraction) -> None:
    """Chi-square of each seed against p^(1/T) / Z; p-values uniform over seeds."""
    power = WEIGHTS ** float(1 / temperature)
    expected = 400 * power / power.sum()
    p_values = [
        stats.chisquare(counts(reject(planted(seed, 400), temperature, 10_000)), expected).pvalue
        for seed in range(20)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", ["1/2", "2/3"])
def test_frequencies_among_many_patches(temperature: str) -> None:
    """Pairs that differ in their first token alone and come twice a round: they are told apart."""
    patches = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5))
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64).repeat_interleave(20)
    power = weights ** float(1 / Fraction(temperature))
    draws = PlantedDraws(patches, weights, 6, torch.arange(3000))
    seen = counts(reject(draws, Fraction(temperature), 10_000), patches)
    expected = 3000 * power / power.sum()
    by_first_token = seen.view(2, -1).sum(1), expected.view(2, -1).sum(1)
    assert stats.chisquare(*by_first_token).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
def test_cost_is_that_of_theorem_2(temperature: Fraction) -> None:
    """E[calls] = (n + [alpha > 0] sum p^(1/T - 1)) / Z, and a trial succeeds with chance Z."""
    power = float(1 / temperature)
    n, z = int(power), float((WEIGHTS**power).sum())
    second = float((WEIGHTS ** (power - 1)).sum()) if temperature.numerator > 1 else 0
    result = reject(planted(1, 2000), temperature, 10_000)
    assert is_mean(result.calls, (n + second) / z)
    assert is_mean(result.trials, 1 / z)
    assert (result.calls - result.spared <= result.draws).all()
    assert (result.spared == 0).all() == (n <= 2)  # after a first difference n - 2 may be left
    assert (result.slots <= 3 * result.draws).all()


@pytest.mark.parametrize("temperature", ["2/3", "0.3"])
def test_rounds_leave_no_trace(monkeypatch, temperature: str) -> None:
    """The same distribution if nearly every stage goes over the end of a round."""
    monkeypatch.setattr(rejection, "FIRST_ROUND", 1)
    monkeypatch.setattr(rejection, "LARGEST_ROUND", 2)
    power = WEIGHTS ** float(1 / Fraction(temperature))
    expected = 1500 * power / power.sum()
    seen = counts(reject(planted(2, 1500), Fraction(temperature), 10_000))
    assert stats.chisquare(seen, expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
def test_known_tokens_condition_the_power(temperature: Fraction) -> None:
    """Contexts that know no, one, two and all tokens, in one batch."""
    power = (WEIGHTS ** float(1 / temperature)).expand(4, -1)
    prefix = torch.tensor([[-1, -1, -1], [3, -1, -1], [3, 1, -1], [4, 5, 6]])
    fits = ((prefix[:, None] < 0) | (prefix[:, None] == PATCHES)).all(-1)  # [4, X]
    power = power * fits
    result = reject(planted(4, 2000), temperature, 1 << 20, prefix.repeat(500, 1))
    assert result.found.all()
    seen = (result.patches[:, None] == PATCHES).all(-1).view(500, 4, -1).sum(0)
    assert (seen[~fits] == 0).all()
    expected = 500 * power / power.sum(1, keepdim=True)
    for row in range(4):
        kinds = fits[row]
        if kinds.sum() > 1:
            got = stats.chisquare(seen[row, kinds], expected[row, kinds])
            assert got.pvalue > FALSE_ALARM


def test_a_context_does_not_depend_on_its_batch_or_on_threads() -> None:
    rows = torch.arange(32) * 0x1_0000_0003 - 2**40
    together = reject(planted(5, rows), Fraction(3, 10), 10_000)
    with restored_threads():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in range(32):
                alone = reject(planted(5, rows[row, None]), Fraction(3, 10), 10_000)
                for field in ("patches", "draws", "calls", "spared", "trials"):
                    assert torch.equal(getattr(alone, field)[0], getattr(together, field)[row])
    assert len(together.draws.unique()) > 1 and len(together.patches.unique(dim=0)) > 1


HOPELESS = torch.tensor([1.0, 1, 1, 1, 1])  # at 1 / 40 a trial succeeds once in 5^39


@pytest.mark.parametrize(("temperature", "max_draws"), [("1/40", 45), ("0.3", 33)])
def test_calls_are_counted_to_the_end_of_the_budget(temperature: str, max_draws: int) -> None:
    """A trial that the end cuts off counts whole, and what it has not drawn is spared."""
    result = reject(planted(0, 200, HOPELESS), Fraction(temperature), max_draws)
    missing = ~result.found
    assert missing.sum() > 50
    made = (result.calls - result.spared)[missing]
    assert (made == result.draws[missing]).all() and (made == max_draws).all()


def test_contexts_without_a_patch_are_named() -> None:
    rows = torch.tensor([2**40, 7, 8])
    weights = torch.stack([torch.tensor([1.0, 0, 0, 0, 0]), HOPELESS, HOPELESS])
    message = "1/40.*max_draws = 300 in 2 of 3 contexts, the first with row id 7"
    with pytest.raises(BudgetError, match=message) as raised:
        sample_by_rejection(planted(0, rows, weights), Fraction(1, 40), 50, 300, "raise", None)
    result = raised.value.result
    assert result.found.tolist() == [True, False, False]
    assert torch.equal(result.patches[0], PATCHES[0]) and result.draws[1:].tolist() == [300, 300]


@pytest.mark.parametrize("temperature", ["1/40", "2/79"])
def test_a_pool_may_take_over(temperature: str) -> None:
    rows = torch.arange(200)
    weights = torch.tensor([[1.0, 0, 0, 0, 0]]).repeat(200, 1)
    weights[::2] = HOPELESS
    draws = planted(0, rows, weights)
    sample = sample_by_rejection(draws, Fraction(temperature), 50, 300, "pool", None)
    assert torch.equal(sample.exact, rows % 2 == 1)
    assert (sample.draws[::2] == 350).all() and (sample.draws[1::2] < 300).all()
    assert (sample.patches[1::2] == PATCHES[0]).all()
    assert len(sample.patches[::2].unique(dim=0)) > 1
    assert (sample.trials >= 1).all() and (sample.calls >= 40).all()
    alone = sample_by_rejection(draws.of(rows[6:7]), Fraction(temperature), 50, 300, "pool", None)
    assert torch.equal(alone.patches[0], sample.patches[6])


def test_what_algorithm_1_took_is_reported() -> None:
    for temperature in (Fraction(1, 4), Fraction(3, 10)):
        result = reject(planted(6, 300), temperature, 10_000)
        sample = sample_by_rejection(planted(6, 300), temperature, 50, 10_000, "raise", None)
        for name in ("draws", "slots", "trials", "calls", "spared"):
            assert torch.equal(getattr(sample, name), getattr(result, name))
    assert (sample.spared > 0).any()


def test_the_pool_that_takes_over_is_new() -> None:
    """It chooses by algorithm 2 from draws that algorithm 1 has not seen."""
    draws = planted(3, 100, HOPELESS)
    sample = sample_by_rejection(draws, Fraction(1, 40), 50, 288, "pool", None)
    rounds = [32, 64, 128, 64]  # of 288 draws
    from_new = draws.draw(len(rounds), 50)  # [B, 50, K]
    most = (from_new[:, :, None] == from_new[:, None]).all(-1).sum(-1)  # [B, 50]
    chosen = (from_new == sample.patches[:, None]).all(-1)
    assert chosen.any(1).all()
    assert (most[chosen] == most.amax(1).repeat_interleave(chosen.sum(1))).all()
