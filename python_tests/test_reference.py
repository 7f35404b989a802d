"""The specification: Philox against published vectors, noise, Algorithm 2 by enumeration."""

import itertools
from fractions import Fraction
from math import comb

import pytest
import torch

from calm_rt import reference
from calm_rt.reference import Stream

FALSE_ALARM = (
    1e-6  # chance that a true distribution fails a chi-square test here; the seeds are fixed
)

# Random123, kat_vectors: philox4x32-10, counter, key, result
PHILOX = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def int64(value: int) -> torch.Tensor:
    """A 64-bit word as the int64 tensor with the same bits."""
    return torch.tensor(value - (1 << 64) if value >= 1 << 63 else value)


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chance of counts at least this far from expectation, by Pearson's chi-square."""
    statistic = ((observed - expected).square() / expected).sum()
    degrees = torch.tensor(expected.numel() - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def distribution(pool: list[tuple[int, ...]], n: int) -> dict[int, Fraction]:
    """Algorithm 2 as the paper states it, exactly: probability by index of first occurrence."""
    counts = {patch: pool.count(patch) for patch in pool}
    for m in range(n, 0, -1):
        weights = {patch: comb(count, m) for patch, count in counts.items() if count >= m}
        if weights:
            total = sum(weights.values())
            return {pool.index(patch): Fraction(w, total) for patch, w in weights.items()}
    raise AssertionError("every patch occurs once")


def choices(pool: list[tuple[int, ...]], n: int, num_rows: int, seed: int) -> torch.Tensor:
    tokens = torch.tensor(pool).expand(num_rows, -1, -1)
    return reference.select_patch(tokens, n, torch.tensor(seed), torch.arange(num_rows))


@pytest.mark.parametrize(("counter", "key", "result"), PHILOX, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, result):
    low, high = words(key)
    got = reference.philox([torch.tensor(word) for word in words(counter)], int64(low | high << 32))
    assert [int(word) for word in got] == words(result)


@pytest.mark.parametrize("length", [1, 4, 7, 130])
def test_noise_layout(length):
    """Element l of draw d, row r: word l % 4 of (l // 4 | stream << 24, d, r low, r high)."""
    seed, rows = int64(0x9E3779B97F4A7C15), torch.tensor([0, 5, (7 << 32) + 3, -1])
    uniform = reference.noise(seed, rows, 3, length, Stream.HEAD, "uniform", torch.float64)
    for draw, row, place in itertools.product(range(3), range(4), {0, length // 2, length - 1}):
        bits = int(rows[row]) % (1 << 64)
        counter = [place // 4 | Stream.HEAD << 24, draw, bits & 0xFFFFFFFF, bits >> 32]
        word = reference.philox([torch.tensor(word) for word in counter], seed)[place % 4]
        assert uniform[draw, row, place] == (int(word) >> 8) / 2**24


def test_noise_depends_on_row_ids_only():
    rows, seed = torch.tensor([9, 2, 1 << 40, 4]), torch.tensor(3)
    whole = reference.noise(seed, rows, 5, 9)
    for order in ([2], [3, 0], [1, 1, 2]):
        assert torch.equal(reference.noise(seed, rows[order], 5, 9), whole[:, order])
    assert torch.equal(reference.noise(seed, rows, 2, 9), whole[:2])
    assert torch.equal(reference.noise(seed, rows, 5, 3), whole[..., :3])


def test_noise_differs_by_stream_seed_and_row():
    rows = torch.tensor([0, 1, 1 << 32])
    drawn = [
        reference.noise(torch.tensor(seed), rows, 2, 8, stream)[:, row]
        for seed, stream, row in itertools.product((0, 1, 1 << 32), (0, 1), range(3))
    ]
    values = torch.cat([draw.flatten() for draw in drawn])
    assert values.unique().numel() == values.numel()


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_distribution(kind):
    values = (
        reference.noise(torch.tensor(1), torch.arange(500), 10, 20, distribution=kind)
        .double()
        .flatten()
    )
    levels = values if kind == "uniform" else torch.special.ndtr(values)
    assert levels.min() >= 0 and levels.max() < 1
    observed = torch.histc(levels, 50, 0, 1)
    assert p_value(observed, torch.full_like(observed, values.numel() / 50)) > FALSE_ALARM


def test_select_patch_paper_example():
    """{A, C, A, D, B, E, A, F, B, G} at n = 2: A with 3/4, B with 1/4."""
    pool = [(ord(letter), 0) for letter in "ACADBEAFBG"]
    assert distribution(pool, 2) == {0: Fraction(3, 4), 4: Fraction(1, 4)}
    observed = torch.bincount(choices(pool, 2, 4000, seed=0), minlength=10).double()
    assert observed[[0, 4]].sum() == 4000
    assert p_value(observed[[0, 4]], torch.tensor([3000.0, 1000.0]).double()) > FALSE_ALARM


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("kinds", [2, 4, 30])
def test_select_patch_against_enumeration(n, kinds):
    generator = torch.Generator().manual_seed(100 * n + kinds)
    pool = [tuple(patch) for patch in torch.randint(kinds, (12, 1), generator=generator).tolist()]
    pool = [(7, *patch, 7) for patch in pool]
    exact = distribution(pool, n)
    chosen = choices(pool, n, 3000, seed=n)
    observed = torch.bincount(chosen, minlength=12).double()
    expected = torch.tensor([float(3000 * exact.get(index, 0)) for index in range(12)]).double()
    assert observed[expected == 0].sum() == 0
    if len(exact) > 1:
        assert p_value(observed[expected > 0], expected[expected > 0]) > FALSE_ALARM


@pytest.mark.parametrize("n", [2, 3])
def test_select_patch_inverts_the_distribution_exactly(n):
    """One uniform number, candidates in order of first occurrence: every single choice is known."""
    pool = [(value,) for value in [3, 1, 3, 2, 1, 3, 2, 2, 2, 9]]
    seed, rows = torch.tensor(5), torch.arange(200)
    uniform = reference.noise(seed, rows, 1, 1, Stream.CHOICE, "uniform", torch.float64)[0, :, 0]
    expected = []
    for u in uniform.tolist():
        total = Fraction(0)
        for index, probability in sorted(distribution(pool, n).items()):
            total += probability
            if Fraction(u) < total:
                expected.append(index)
                break
    assert choices(pool, n, 200, seed=5).tolist() == expected


def test_select_patch_large_counts():
    """C(520, 500) is beyond every float; the ratios are not."""
    pool = [(0,)] * 501 + [(1,)] * 500
    exact = distribution(pool, 500)
    observed = torch.bincount(choices(pool, 500, 4, seed=0), minlength=1001)
    assert exact[0] == Fraction(501, 502)
    assert set(observed.nonzero().flatten().tolist()) <= exact.keys()
    assert choices([(0,)] * 480 + [(1,)] * 520, 500, 4, seed=0).tolist() == [480] * 4


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.25, 2.0])
def test_energy_score_is_the_definition(beta):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(5, 2, 4, dtype=torch.float64, generator=generator)
    got = reference.energy_score_of_targets(x, y, beta)
    for row in range(2):
        pairs = [(a - b).norm() ** beta for a, b in itertools.permutations(x[:, row], 2)]
        cross = [(a - b).norm() ** beta for a, b in itertools.product(x[:, row], y[:, row])]
        diversity, fidelity = sum(pairs) / len(pairs), sum(cross) / len(cross)
        torch.testing.assert_close(got.diversity[row], diversity)
        torch.testing.assert_close(got.fidelity[row], fidelity)
        torch.testing.assert_close(got.score[row], diversity - 2 * fidelity)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 2.0])
def test_energy_score_of_equal_draws_has_gradient_zero(beta):
    x = torch.ones(3, 1, 4, requires_grad=True)
    reference.energy_score_of_targets(x, torch.ones(2, 1, 4), beta).score.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
