"""The normals that kernels make are standard normals, and independent wherever they differ in name.

Seeds are fixed. All p-values of a sample together give a false alarm with chance FALSE_ALARM: each
must be above FALSE_ALARM divided by their number (Bonferroni). Planted defects fall below.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import calm_rt
from calm_rt import ops
from calm_rt.reference import Stream

FALSE_ALARM = 1e-6
CELLS = 8  # a side of the table of joint counts
SAMPLE = (20, 2500, 200)  # [D, R, L], 10^7 numbers
SMALL = (10, 500, 200)


def noise(
    sizes: tuple[int, ...], seed: int = 1, stream: int = Stream.HEAD, rows: Tensor | None = None
) -> np.ndarray:
    """[D, R, L] normals of the kernel."""
    draws, num_rows, length = sizes
    rows = torch.arange(num_rows) if rows is None else rows
    with calm_rt.backend("native"):
        return ops.noise(rows, draws, length, seed=seed, stream=stream).numpy()


# ---- p-values ----


def two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def moment(power: int) -> float:
    """E x^power of a standard normal."""
    return 0.0 if power % 2 else float(special.factorial2(power - 1))


def moments(x: np.ndarray) -> Iterator[tuple[str, float]]:
    """The first six against the normal distribution of their means."""
    wide = x.astype(np.float64).ravel()
    powers = np.ones_like(wide)
    for power in range(1, 7):
        powers *= wide
        variance = moment(2 * power) - moment(power) ** 2
        yield (
            f"moment {power}",
            two_sided((powers.mean() - moment(power)) * math.sqrt(x.size / variance)),
        )


def shape(x: np.ndarray) -> Iterator[tuple[str, float]]:
    """Kolmogorov-Smirnov, and how many numbers lie far out on either side."""
    levels = np.sort(special.ndtr(x.astype(np.float64).ravel()))
    steps = np.arange(x.size + 1) / x.size
    distance = max((steps[1:] - levels).max(), (levels - steps[:-1]).max())
    yield "Kolmogorov-Smirnov", float(stats.kstwobign.sf(distance * math.sqrt(x.size)))
    for limit in (3, 4, 5):
        for side, count in (("above", (x > limit).sum()), ("below", (x < -limit).sum())):
            chance = stats.binom(x.size, special.ndtr(-limit))
            yield f"{side} {limit}", 2 * min(chance.cdf(count), chance.sf(count - 1))


def pair(name: str, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[str, float]]:
    """Correlation of the values, of their squares, and the counts in a table of equal cells."""
    x, y = x.ravel(), y.ravel()
    products = np.multiply(x, y, dtype=np.float64)
    yield f"{name}: correlation", two_sided(products.mean() * math.sqrt(x.size))
    squares = np.multiply(x * x - 1, y * y - 1, dtype=np.float64)  # variance 2 * 2
    yield f"{name}: squares", two_sided(squares.mean() * math.sqrt(x.size) / 2)
    edges = special.ndtri(np.arange(1, CELLS) / CELLS).astype(np.float32)
    cells = CELLS * np.searchsorted(edges, x) + np.searchsorted(edges, y)
    counts = np.bincount(cells, minlength=CELLS**2)
    yield f"{name}: joint counts", float(stats.chisquare(counts).pvalue)


def p_values(sample: Callable[..., np.ndarray], sizes: tuple[int, ...]) -> dict[str, float]:
    """sample: as `noise`."""
    x = sample(sizes)
    found = dict(moments(x)) | dict(shape(x))
    for lag in (1, 2, 3, 4, 64):  # within a counter's four, of the next one, of the next vector
        found |= dict(pair(f"positions {lag} apart", x[..., :-lag], x[..., lag:]))
    found |= dict(pair("next row", x[:, :-1], x[:, 1:]))
    found |= dict(pair("next draw", x[:-1], x[1:]))
    found |= dict(pair("other stream", x, sample(sizes, stream=Stream.LATENT)))
    found |= dict(pair("other seed", x, sample(sizes, seed=2)))
    far = torch.arange(sizes[1]) + 2**32  # the high half of the row id
    return found | dict(pair("far row", x, sample(sizes, rows=far)))


def suspicious(found: dict[str, float]) -> dict[str, float]:
    return {name: p for name, p in found.items() if not p > FALSE_ALARM / len(found)}


def test_noise() -> None:
    assert not suspicious(p_values(noise, SAMPLE))


# ---- the same numbers through energy_score ----


def target_normals(num_targets: int, seed: int) -> np.ndarray:
    """sqrt(M) times the mean of a row's target draws: a standard normal again.

    For x = 0, mean = 0 and log_std = 0 at beta = 2 the gradient in the mean is -4 mean_m eps_m.
    """
    shape = (2000, 250)
    mean = torch.zeros(shape, requires_grad=True)
    with calm_rt.backend("native"):
        score = ops.energy_score(
            torch.zeros(2, *shape),
            mean,
            torch.zeros(shape),
            num_targets=num_targets,
            beta=2.0,
            seed=seed,
        )
    (gradient,) = torch.autograd.grad(score.sum(), mean)
    return gradient.mul(-math.sqrt(num_targets) / 4).numpy()


@pytest.mark.parametrize("num_targets", [1, 4, 7])  # alone, a tile of them, and both
def test_targets_of_energy_score(num_targets: int) -> None:
    x = target_normals(num_targets, seed=3)
    found = dict(moments(x)) | dict(shape(x))
    found |= dict(pair("next position", x[:, :-1], x[:, 1:])) | dict(pair("row", x[:-1], x[1:]))
    found |= dict(pair("other seed", x, target_normals(num_targets, seed=4)))
    assert not suspicious(found)


def test_targets_of_energy_score_are_those_of_noise() -> None:
    expected = noise((1, 2000, 250), seed=3, stream=Stream.TARGET)[0]
    np.testing.assert_array_max_ulp(target_normals(1, seed=3), expected, maxulp=4)


# ---- planted defects ----


def box_muller(radius_from: np.ndarray, angle_from: np.ndarray) -> np.ndarray:
    """Pairs of normals from the radii of some and the angles of others."""
    radius = np.hypot(radius_from[..., ::2], radius_from[..., 1::2])
    angle = np.arctan2(angle_from[..., 1::2], angle_from[..., ::2])
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(radius_from.shape)


def stream_reused(sizes, seed=1, stream=Stream.HEAD, rows=None):
    return noise(sizes, seed, Stream.HEAD, rows)


def seed_reused(sizes, seed=1, stream=Stream.HEAD, rows=None):
    return noise(sizes, 1, stream, rows)


def high_half_ignored(sizes, seed=1, stream=Stream.HEAD, rows=None):
    return noise(sizes, seed, stream, None if rows is None else rows & 0xFFFFFFFF)


def row_reused(sizes, seed=1, stream=Stream.HEAD, rows=None):
    return noise(sizes, seed, stream, torch.arange(sizes[1]) // 2)


def draw_reused(sizes, **options):
    return np.repeat(noise(sizes, **options)[::2], 2, axis=0)


def cosine_twice(sizes, **options):
    return np.repeat(noise(sizes, **options)[..., ::2], 2, axis=-1)


def radius_reused(sizes, **options):
    """The second pair of a counter with the first one's radius, and an angle of its own."""
    x = noise(sizes, **options)
    radii = x.reshape(*sizes[:2], -1, 2, 2).copy()
    radii[..., 1, :] = radii[..., 0, :]
    return box_muller(radii.reshape(sizes), x)


def counter_stuck(sizes, **options):
    """Every vector of 16 counters makes the numbers of the one before it."""
    x = noise(sizes, **options)
    x[..., 64:128] = x[..., :64]
    return x


def wide(sizes, **options):
    return noise(sizes, **options) * np.float32(1.01)


def shifted(sizes, **options):
    return noise(sizes, **options) + np.float32(0.01)


def lopsided(sizes, **options):
    x = noise(sizes, **options)
    return x + np.float32(0.01) * (x * x - 1)


def short_tails(sizes, **options):
    """Uniforms of 11 bits: no number beyond sqrt(2 log 2^11)."""
    return noise(sizes, **options).clip(-3.9, 3.9)


def flat(sizes, **options):
    """Sums of uniforms in place of Box-Muller."""
    rows = torch.arange(sizes[1])
    u = ops.noise(rows, 12 * sizes[0], sizes[2], seed=9, stream=3, distribution="uniform")
    return (u.unflatten(0, (12, -1)).sum(0) - 6).numpy()


def coarse(sizes, **options):
    return np.round(noise(sizes, **options) * 50) / np.float32(50)


DEFECTS = {
    stream_reused: "other stream: correlation",
    seed_reused: "other seed: correlation",
    high_half_ignored: "far row: correlation",
    row_reused: "next row: correlation",
    draw_reused: "next draw: joint counts",
    cosine_twice: "positions 1 apart: correlation",
    radius_reused: "positions 2 apart: squares",
    counter_stuck: "positions 64 apart: joint counts",
    shifted: "moment 1",
    wide: "moment 2",
    lopsided: "moment 3",
    flat: "moment 4",
    short_tails: "above 4",
    coarse: "Kolmogorov-Smirnov",
}


@pytest.mark.parametrize(
    ("sample", "name"), DEFECTS.items(), ids=[sample.__name__ for sample in DEFECTS]
)
def test_planted_defect_is_found(sample: Callable[..., np.ndarray], name: str) -> None:
    assert name in suspicious(p_values(sample, SMALL))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_uniforms_are_the_same_in_float_and_double(backend: str) -> None:
    """So a GPU, which has no kernel for double, draws what a choice on the CPU reads."""
    rows, options = torch.arange(500), {"seed": 1, "stream": 3, "distribution": "uniform"}
    with calm_rt.backend(backend):
        u, exact = (
            ops.noise(rows, 2, 67, **options, dtype=t) for t in (torch.float32, torch.float64)
        )
    assert torch.equal(u.double(), exact)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniforms_of_16_bits_stay_below_1(backend: str, dtype: torch.dtype) -> None:
    with calm_rt.backend(backend):
        u = ops.noise(
            torch.arange(500), 2, 64, seed=1, stream=3, distribution="uniform", dtype=dtype
        )
    assert u.dtype == dtype and u.max() == 1 - torch.finfo(dtype).eps / 2 and u.min() >= 0
