"""The next patch at a temperature."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from test_reference import FALSE_ALARM

from calm_rt import ops, reference, sampling
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig
from calm_rt.ops.decode import decode_patch, decode_slots
from calm_rt.reference import Stream
from calm_rt.rejection import BudgetError
from calm_rt.sampling import parse_temperature, sample_patches
from calm_rt.threads import restored_threads

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
    for method in ("pool", "exact"):
        with pytest.raises(ValueError, match="temperature"):
            parse_temperature(wrong, method)


@pytest.mark.parametrize(
    ("given", "neighbours"), [(0.7, "1/2 and 1"), (0.3, "1/4 and 1/3"), ("2/5", "1/3 and 1/2")]
)
def test_temperature_between_names_its_neighbours(given, neighbours):
    with pytest.raises(ValueError, match=f'nearest are {neighbours}, and method="exact"'):
        parse_temperature(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.int64(1), Fraction(1)),
        (0.75, Fraction(3, 4)),
        ("0.7", Fraction(7, 10)),
        (1 / 3, Fraction(1, 3)),
        (1, Fraction(1)),
    ],
)
def test_algorithm_1_has_every_temperature_up_to_one(given, expected):
    found = parse_temperature(given, "exact")
    assert found == expected and type(found.numerator) is int


@pytest.mark.parametrize("zero", [0, "0", -0.0])
def test_algorithm_1_has_no_temperature_zero(zero):
    assert parse_temperature(zero) == 0
    with pytest.raises(ValueError, match=r"temperature: expected a number in \(0, 1\]"):
        parse_temperature(zero, "exact")


@pytest.mark.parametrize("temperature", [0, 1, "1/2"])
@pytest.mark.parametrize("wrong", [0, -3])
def test_empty_pool(model, hidden, temperature, wrong):
    with pytest.raises(ValueError, match="num_candidates"):
        sample_patches(model, hidden, temperature=temperature, num_candidates=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "greedy"}, "method"),
        ({"on_budget": "ignore"}, "on_budget"),
        ({"max_draws": 0}, "max_draws"),
        ({"prefix": torch.full((5, 3), -1)}, "prefix: expected shape"),
        ({"prefix": torch.full((5, 2), -1.0)}, "prefix: expected an int64"),
        ({"prefix": torch.tensor([[-1, 3]]).repeat(5, 1)}, "prefix: expected known tokens first"),
        ({"prefix": torch.tensor([[8, -1]]).repeat(5, 1)}, "prefix: expected token ids below 8"),
        ({"prefix": torch.tensor([[3, -2]]).repeat(5, 1)}, "prefix: expected token ids below 8"),
        ({"rows": ROWS[:2]}, "rows"),
    ],
)
def test_arguments_out_of_range(model, hidden, wrong, message):
    with pytest.raises(ValueError, match=message):
        sample_patches(model, hidden, temperature="1/2", **wrong)


def test_hidden_states_of_another_size(model):
    with pytest.raises(ValueError, match="hidden"):
        sample_patches(model, torch.zeros(2, 17), temperature="1/2")


def test_slots_decoded_alone_are_those_of_the_patch(model, hidden):
    weights = model.ae_model.decoder.weights()
    latents = model.sample(hidden, 20, 3).flatten(0, 1)  # [100, L]
    whole, states = ops.decode(latents, weights), decode_patch(latents, weights)
    rows = [torch.tensor([4, 99, 4]), torch.arange(7)]
    expected = torch.cat([whole[of_slot, slot] for slot, of_slot in enumerate(rows)])
    assert torch.equal(decode_slots(states, rows, weights), expected)
    assert len(decode_slots(states, [rows[0][:0]] * 2, weights)) == 0
    with pytest.raises(ValueError, match="rows: expected those of 2 slots, got 1"):
        decode_slots(states, rows[:1], weights)


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


@pytest.mark.parametrize(
    ("temperature", "method"), [(1, "pool"), ("1/3", "pool"), ("1/3", "exact"), ("0.7", "exact")]
)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(model, hidden, temperature, method):
    options = {"temperature": temperature, "num_candidates": 30, "seed": 2, "method": method}
    together = sample_patches(model, hidden, rows=ROWS, **options)
    order = torch.tensor([3, 0, 4])
    with restored_threads():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            alone = sample_patches(model, hidden[order], rows=ROWS[order], **options)
            assert torch.equal(alone.patches, together.patches[order])
            assert torch.equal(alone.draws, together.draws[order])


@pytest.mark.parametrize("temperature", [0, "1/2", "1/3"])
@pytest.mark.parametrize("first", [False, True], ids=["pool", "tuples first"])
def test_lazy_pools_choose_what_whole_ones_choose(model, hidden, monkeypatch, temperature, first):
    """On a model, and in float64, where no rounding depends on who is decoded together."""
    many, options = hidden.repeat(40, 1), {"temperature": temperature, "tuples_first": first}
    samples = []
    for smallest in (0, 1 << 62):
        monkeypatch.setattr(sampling, "WHOLE_SEARCH", smallest)
        samples.append(sample_patches(model, many, seed=3, **options))
    lazy, whole = samples
    for field in ("patches", "draws", "sure", "exact"):
        assert torch.equal(getattr(lazy, field), getattr(whole, field))
    assert (lazy.slots <= whole.slots).all() and (lazy.slots < whole.slots).any()
    assert len(lazy.patches.unique(dim=0)) > 1 and lazy.sure.any() == (temperature != 0)


@pytest.mark.parametrize("method", ["pool", "exact"])
def test_contexts_that_do_not_fit_wait(model, hidden, monkeypatch, method):
    options = {"temperature": "1/2", "num_candidates": 30, "seed": 2, "method": method}
    together = sample_patches(model, hidden, rows=ROWS, **options)
    monkeypatch.setattr(sampling, "POOL_BYTES", 1)
    for field, expected in sample_patches(model, hidden, rows=ROWS, **options)._asdict().items():
        if field != "slots":  # more contexts in a pass over the vocabulary need not agree
            assert torch.equal(expected, getattr(together, field))


def test_what_a_patch_took(model, hidden):
    options = {"num_candidates": 400, "seed": 4}
    at_one = sample_patches(model, hidden, **options)
    assert at_one.draws.tolist() == [1] * 5 and at_one.slots.tolist() == [2] * 5
    pool = sample_patches(model, hidden, temperature="1/4", **options)
    assert pool.draws.tolist() == [400] * 5
    assert (pool.slots >= 400).all() and (pool.slots <= 800).all()
    exact = sample_patches(model, hidden, temperature="1/4", method="exact", **options)
    assert at_one.exact.all() and exact.exact.all() and not pool.exact.any()


@pytest.mark.parametrize("temperature", ["2/3", "1/2"])
def test_algorithm_1_samples_the_power(model, hidden, temperature):
    """Against the model's own frequencies, from so many draws that their error does not count."""
    latents = model.sample(hidden[:1], 200_000, 11)[:, 0]
    kinds = model.ae_model.decode(latents) @ torch.tensor([8, 1])
    power = (torch.bincount(kinds, minlength=64) / len(kinds)).double() ** (
        1 / float(Fraction(temperature))
    )
    expected = power / power.sum()
    options = {"temperature": temperature, "method": "exact"}
    sample = sample_patches(model, hidden[:1].expand(3000, -1), seed=12, **options)
    seen = torch.bincount(sample.patches @ torch.tensor([8, 1]), minlength=64)
    frequent = 3000 * expected >= 10
    seen = [*seen[frequent].tolist(), int(seen[~frequent].sum())]
    expected = [*expected[frequent].tolist(), float(expected[~frequent].sum())]
    p_value = stats.chisquare(seen, [3000 * share for share in expected]).pvalue
    assert len(seen) > 5 and p_value > FALSE_ALARM


def test_algorithm_1_out_of_draws(model, hidden):
    options = {"temperature": "1/30", "method": "exact", "max_draws": 40, "num_candidates": 20}
    with pytest.raises(BudgetError, match=r"1/30.*max_draws = 40"):
        sample_patches(model, hidden, **options)
    sample = sample_patches(model, hidden, on_budget="pool", **options)
    assert torch.equal(sample.draws, torch.where(sample.exact, 40, 60))
    assert not sample.exact.all()


@pytest.mark.parametrize("method", ["pool", "exact"])
@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_known_tokens_are_kept(model, hidden, temperature, method):
    """The first token of the first context's likeliest patch; the others know nothing."""
    mode = sample_patches(model, hidden, temperature=0, seed=1).patches[0]
    prefix = torch.full((5, 2), -1)
    prefix[0, 0] = mode[0]
    options = {"temperature": temperature, "method": method, "seed": 5, "rows": ROWS}
    sample = sample_patches(model, hidden, prefix=prefix, **options)
    assert sample.patches[0, 0] == mode[0]
    assert (sample.exact == (temperature == 1 or method == "exact")).all() and sample.matched.all()
    if temperature != 1:
        free = sample_patches(model, hidden, **options)
        assert torch.equal(sample.patches[1:], free.patches[1:])


def test_known_tokens_that_no_draw_has(model, hidden):
    """Further pools are drawn, then the tokens are put over another patch, with a warning."""
    drawn = model.ae_model.decode(model.sample(hidden[:1], 20_000, 11)[:, 0])
    token = torch.bincount(drawn[:, 0], minlength=8).argmin()
    prefix = torch.tensor([[int(token), -1], [-1, -1]])
    options = {"temperature": "1/2", "num_candidates": 10, "max_draws": 35, "prefix": prefix}
    message = f"no draw of 35 begins with them in 1 of 1 contexts .*, with row ids {2**33};"
    rows = torch.tensor([2**33, 5])
    with pytest.warns(UserWarning, match=message):
        sample = sample_patches(model, hidden[[0, 1]], rows=rows, **options)
    assert sample.matched.tolist() == [False, True]
    assert sample.draws.tolist() == [35, 10]
    assert sample.patches[0, 0] == token
    with pytest.raises(BudgetError):
        sample_patches(model, hidden[[0, 1]], method="exact", **options)


def test_seeds_and_rows_change_the_draw(model, hidden):
    many = hidden[:1].expand(64, -1)
    first = sample_patches(model, many, seed=0).patches
    assert len(first.unique(dim=0)) > 1
    assert not torch.equal(first, sample_patches(model, many, seed=1).patches)


def test_no_rows(model):
    for method in ("pool", "exact"):
        none = torch.zeros(0, 16).double()
        sample = sample_patches(model, none, temperature="1/2", method=method)
        assert sample.patches.shape == (0, 2) and len(sample.draws) == 0
