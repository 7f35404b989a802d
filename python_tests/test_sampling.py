"""The next patch at a temperature."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from calm_rt import reference
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig
from calm_rt.reference import Stream
from calm_rt.sampling import parse_temperature, sample_patches

SIZES = {"patch_size": 2, "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16}


@pytest.fixture(scope="module")
def model():
    """A small model in float64, where no rounding turns one token into another."""
    torch.manual_seed(0)
    sizes = {**SIZES, "latent_size": 6}
    config = CalmConfig(
        num_hidden_layers=1, num_attention_heads=2, num_mlp_layers=1, noise_size=4, **sizes
    )
    model = Calm(config, AutoencoderConfig(**sizes)).double().eval()
    torch.nn.init.normal_(model.generative_head.final_layer.linears[2].weight)  # it starts as 0
    return model


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


ROWS = torch.tensor([7, 2**33, 3, 0, 2**62])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, Fraction(1)),
        (0, Fraction(0)),
        (0.5, Fraction(1, 2)),
        ("1/3", Fraction(1, 3)),
        (" 0.25 ", Fraction(1, 4)),
        (Fraction(2, 6), Fraction(1, 3)),
        (1 / 49, Fraction(1, 49)),  # 1 / (1 / 49) is not 49 in floating point
        (float(np.float32(1 / 3)), Fraction(1, 3)),
        (np.float32(1 / 7), Fraction(1, 7)),
    ],
)
def test_temperature_is_snapped_to_one_over_n(given, expected):
    assert parse_temperature(given) == expected


@pytest.mark.parametrize("n", range(1, 300))
def test_every_float_of_one_over_n_is_that(n):
    assert parse_temperature(1 / n) == Fraction(1, n)


@pytest.mark.parametrize(
    "wrong", [1.5, 2, -0.5, math.nan, math.inf, "warm", "1/0", None, "", [1], -1e-9]
)
def test_impossible_temperature(wrong):
    with pytest.raises(ValueError, match="temperature"):
        parse_temperature(wrong)


@pytest.mark.parametrize(
    ("given", "neighbours"), [(0.7, "1/2 and 1"), (0.3, "1/4 and 1/3"), ("2/5", "1/3 and 1/2")]
)
def test_temperature_between_names_its_neighbours(given, neighbours):
    with pytest.raises(ValueError, match=f"nearest are {neighbours}"):
        parse_temperature(given)


@pytest.mark.parametrize("temperature", [0, 1, "1/2"])
@pytest.mark.parametrize("wrong", [0, -3])
def test_empty_pool(model, hidden, temperature, wrong):
    with pytest.raises(ValueError, match="num_candidates"):
        sample_patches(model, hidden, temperature=temperature, num_candidates=wrong)


def test_temperature_one_is_one_decoded_draw(model, hidden):
    latents = model.sample(hidden, 1, 5, ROWS)[0]
    expected = model.ae_model.logits(latents).argmax(-1)
    assert torch.equal(sample_patches(model, hidden, seed=5, rows=ROWS).patches, expected)


@pytest.mark.parametrize(("temperature", "n"), [("1/2", 2), (1 / 3, 3), (0, 40)])
def test_below_one_algorithm_2_votes_in_the_pool(model, hidden, temperature, n):
    pool = model.ae_model.logits(model.sample(hidden, 40, 5, ROWS)).argmax(-1)  # [S, B, K]
    u = reference.noise(torch.tensor(5), ROWS, 1, 1, Stream.CHOICE, "uniform", torch.float64)
    options = {"temperature": temperature, "num_candidates": 40, "seed": 5}
    got = sample_patches(model, hidden, rows=ROWS, **options).patches
    for row in range(len(ROWS)):
        patches = [tuple(patch) for patch in pool[:, row].tolist()]
        counts = {patch: patches.count(patch) for patch in patches}  # in order of occurrence
        level = min(n, max(counts.values()))
        weights = [math.comb(count, level) for count in counts.values()]
        index = np.searchsorted(np.cumsum(weights), u[0, row, 0].item() * sum(weights), "right")
        assert tuple(got[row].tolist()) == list(counts)[index]


def test_zero_takes_a_most_frequent_patch(model, hidden):
    pool = model.ae_model.decode(model.sample(hidden, 60, 9, ROWS))
    options = {"temperature": 0, "num_candidates": 60, "seed": 9}
    got = sample_patches(model, hidden, rows=ROWS, **options).patches
    for row in range(len(ROWS)):
        patches, counts = pool[:, row].unique(dim=0, return_counts=True)
        assert got[row].tolist() in patches[counts == counts.max()].tolist()


def test_lower_temperature_repeats_the_likely(model, hidden):
    """Over many rows, a vote agrees with the most frequent patch more often than a draw does."""
    many = hidden[:1].expand(400, -1)
    mode = sample_patches(model, hidden[:1], temperature=0, num_candidates=2000, seed=1).patches
    drawn = [
        sample_patches(model, many, temperature=t, num_candidates=20, seed=3).patches
        for t in (1, "1/2", "1/4")
    ]
    shares = [(patches == mode).all(-1).double().mean() for patches in drawn]
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("temperature", [1, "1/3"])
def test_a_row_does_not_depend_on_its_batch(model, hidden, temperature):
    options = {"temperature": temperature, "num_candidates": 30, "seed": 2}
    together = sample_patches(model, hidden, rows=ROWS, **options).patches
    order = torch.tensor([3, 0, 4])
    alone = sample_patches(model, hidden[order], rows=ROWS[order], **options).patches
    assert torch.equal(alone, together[order])


def test_seeds_and_rows_change_the_draw(model, hidden):
    many = hidden[:1].expand(64, -1)
    first = sample_patches(model, many, seed=0).patches
    assert len(first.unique(dim=0)) > 1
    assert not torch.equal(first, sample_patches(model, many, seed=1).patches)


def test_no_rows(model):
    sample = sample_patches(model, torch.zeros(0, 16).double(), temperature="1/2")
    assert sample.patches.shape == (0, 2) and len(sample.draws) == 0
