"""Sampling from a trained model: the distributions are those that the algorithms promise, and a
prompt that ends inside a patch is no worse for it."""

import importlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from calm_rt import official, sampling, tuples
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.sampling import sample_patches

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_prompts.py"
PATCH, VOCABULARY, BOS, PAD = 3, 6, 4, 5  # four letters
NEXT = np.array(
    [[0.7, 0.2, 0.05, 0.05], [0.1, 0.1, 0.7, 0.1], [0.05, 0.6, 0.05, 0.3], [0.8, 0.1, 0, 0.1]]
)
SEEDS, TRIALS, TRUTH = 20, 1000, 200_000
LEAST = 5  # expected in a cell of a chi^2 test


def text(generator: np.random.Generator, count: int, length: int) -> torch.Tensor:
    """[count, length] ids of a Markov chain, BOS filling the first patch."""
    ids = np.full((count, length), BOS)
    state = generator.integers(4, size=count)
    for place in range(PATCH, length):
        state = (generator.random(count)[:, None] > NEXT[state].cumsum(1)[:, :3]).sum(1)
        ids[:, place] = state
    return torch.from_numpy(ids)


@pytest.fixture(scope="module")
def trained() -> Calm:
    """Some seconds of training."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    sizes = {"patch_size": PATCH, "vocab_size": VOCABULARY, "latent_size": 8}
    special = {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD}
    hidden = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.15}
    autoencoder = Autoencoder(AutoencoderConfig(**hidden, **sizes, **special))
    config = CalmConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_mlp_layers=2,
        noise_size=16,
        num_samples=8,
        max_position_embeddings=64,
        **hidden,
        **sizes,
        **special,
    )
    model = Calm(config, autoencoder.config)
    for part, steps in ((autoencoder, 300), (model, 300)):
        optimizer = torch.optim.AdamW((p for p in part.parameters() if p.requires_grad), lr=5e-3)
        for step in range(steps):
            ids = text(generator, 16, 12 * PATCH)
            if part is autoencoder:
                ids[::2] = torch.randint(VOCABULARY, ids[::2].shape)  # every patch comes back
                loss, _ = autoencoder_loss(autoencoder, ids, seed=step)
            else:
                loss, _ = energy_loss(model, ids, seed=step, num_targets=16)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.ae_model.load_state_dict(autoencoder.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def hidden(trained) -> torch.Tensor:
    """The state behind one context: [1, H]."""
    with torch.no_grad():
        return trained.hidden_states(text(np.random.default_rng(5), 1, 6 * PATCH))[:, -1]


@pytest.fixture(scope="module")
def draws(trained, hidden) -> np.ndarray:
    """TRUTH draws of the next patch, as numbers of patches."""
    with torch.no_grad():
        latents = trained.sample(hidden, TRUTH, 12345)[:, 0]
        return numbers(trained.ae_model.decode(latents))


def numbers(patches: torch.Tensor) -> np.ndarray:
    return (patches @ VOCABULARY ** torch.arange(PATCH)).numpy()


def p_values(trained, hidden, expected: np.ndarray, **options) -> list[float]:
    """Of a chi^2 test a seed, of TRIALS contexts that share a state."""
    common = expected * TRIALS >= LEAST
    assert common.sum() >= 4  # else there is little to tell
    found = []
    for seed in range(SEEDS):
        rows = torch.arange(TRIALS) + (seed << 40)
        sample = sample_patches(trained, hidden.expand(TRIALS, -1), seed=seed, rows=rows, **options)
        counts = np.bincount(numbers(sample.patches), minlength=len(expected))
        cells = [*counts[common], counts[~common].sum()]
        sizes = np.array([*expected[common], expected[~common].sum()])
        cells, sizes = (np.array(c)[sizes > 0] for c in (cells, sizes))
        found.append(scipy.stats.chisquare(cells, sizes / sizes.sum() * TRIALS).pvalue)
    return found


@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
@pytest.mark.parametrize(("share", "first"), [(0, False), (10.0, False), (10.0, True)])
@pytest.mark.parametrize(("temperature", "size"), [("1/2", 5), ("1/3", 8)])
def test_pools_are_those_of_algorithm_2(
    trained, hidden, draws, temperature, size, share, lazy, first, monkeypatch
):
    """Against the official loop over pools of draws that the test does not share; by every path."""
    monkeypatch.setattr(tuples, "LARGEST_SHARE", share)
    monkeypatch.setattr(sampling, "WHOLE_SEARCH", 0 if lazy else 1 << 62)
    pools = draws[: TRUTH // size * size].reshape(-1, size)
    n = round(1 / Fraction(temperature))
    tokens = torch.from_numpy(pools)[:, :, None]
    chosen = official.select_patch(tokens, n=n).numpy()[:, 0]
    expected = np.bincount(chosen, minlength=VOCABULARY**PATCH) / len(chosen)
    options = {"temperature": temperature, "num_candidates": size, "tuples_first": first}
    sample = sample_patches(trained, hidden.expand(TRIALS, -1), **options)
    assert sample.sure.any() == (share > 0)
    assert (sample.slots.unique().numel() == 1) == (not lazy and not first)
    values = p_values(trained, hidden, expected, **options)
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-4, values


@pytest.mark.parametrize("temperature", ["1/2", "2/3"])
def test_algorithm_1_is_the_power(trained, hidden, draws, temperature):
    shares = np.bincount(draws, minlength=VOCABULARY**PATCH) / TRUTH
    power = shares ** float(1 / Fraction(temperature))
    options = {"temperature": temperature, "method": "exact", "num_candidates": 16}
    values = p_values(trained, hidden, power / power.sum(), **options)
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-4, values


def test_other_temperatures_are_told_apart(trained, hidden, draws):
    """The test can fail: the draws themselves are not those of temperature 1/2."""
    shares = np.bincount(draws, minlength=VOCABULARY**PATCH) / TRUTH
    values = p_values(trained, hidden, shares, temperature="1/2", num_candidates=5)
    assert scipy.stats.kstest(values, "uniform").pvalue < 1e-6


@pytest.fixture
def prompts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    return importlib.import_module(BENCHMARK.stem)


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="not in a checkout")
def test_known_tokens_and_alignment_predict_better_than_padding(trained, prompts):
    documents = list(text(np.random.default_rng(9), 150, 8 * PATCH))
    scores = prompts.prompt_scores(trained, documents, range(5 * PATCH, 6 * PATCH))
    assert Counter(left for _, left in scores) == {0: 1, 1: 3, 2: 3}
    for left in (1, 2):
        for way in ("constrain", "align"):
            better = scores[way, left].terms - scores["padded", left].terms
            better = better[:, :2]  # so small a model is hardly right about more tokens in a row
            assert (better.mean(0) > 3 * better.std(0) / len(better) ** 0.5).all()
    rows = prompts.summary(scores)
    assert [(row["r"], row["way"]) for row in rows] == [
        (0, "whole"),
        *((left, way) for left in (1, 2) for way in ("align", "constrain", "padded")),
    ]
    for row in rows:
        low, high = row["brierlm_interval"]
        assert low <= row["brierlm"] <= high and row["documents"] == row["prompts"] == 150
        positive = np.clip(row["brier"], 0, None)  # a score of 0 where one is not
        assert row["brierlm"] == pytest.approx(100 * np.prod(positive) ** 0.25)
        if row["way"] == "constrain":
            assert row["better"][0] > 0 and row["better_brier"][0][0] > 0
    assert len(prompts.table(rows).splitlines()) == 1 + 7 + 4


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="not in a checkout")
def test_draws_behind_a_prompt_go_on_from_themselves(trained, prompts):
    """A second patch follows its own first one, as without a cache."""
    prompt = text(np.random.default_rng(3), 1, 4 * PATCH)[0][: 3 * PATCH + 1]
    tokens = prompts._next_tokens(trained, prompt, "constrain", 12, 5)  # [S, 4]: 2, then 2 of 3
    assert tokens.shape == (12, 4)
    rows = 5 << 32 | torch.arange(12) + 12
    whole = torch.cat([prompt.expand(12, -1), tokens[:, : PATCH - 1]], 1)  # [S, 4 K]
    hidden = trained.hidden_states(whole)[:, -1]
    following = sample_patches(trained, hidden, rows=rows).patches
    assert torch.equal(tokens[:, PATCH - 1 :], following[:, : 4 - (PATCH - 1)])


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="not in a checkout")
def test_prompts_of_a_folder_as_json(prompts, folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompts.json"
    monkeypatch.setattr(prompts, "CONTEXT", 8)
    monkeypatch.setattr(prompts, "APART", 16)
    model, data = str(folder / "calm"), str(folder / "data")
    command = ["bench_prompts.py", model, data, "--prompts", "6", "--json", str(file)]
    monkeypatch.setattr("sys.argv", command)
    prompts.main()
    results = json.loads(file.read_text())
    assert {"date", "device", "commit"} <= set(results["machine"])
    assert (results["model"], results["prompt_tokens"]) == ("calm", [8, 9])
    assert [(row["r"], row["way"]) for row in results["rows"]] == [
        (0, "whole"),
        (1, "align"),
        (1, "constrain"),
        (1, "padded"),
    ]
    assert all(row["prompts"] == 6 and row["documents"] > 1 for row in results["rows"])
    assert capsys.readouterr().out.startswith("r  way")
