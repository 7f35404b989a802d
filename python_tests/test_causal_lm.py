"""BrierLM of causal language models whose scores are known exactly."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluation import TRANSITIONS, chain_brier, chain_documents, transition_probability

import calm_rt

SEEDS = 40
EXACT = transition_probability(TRANSITIONS)


def chain_logits(ids):
    return TRANSITIONS.log()[ids]


class ChainSampler:
    """Draws from the chain; every call differs."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, contexts, num_draws):
        token = torch.stack([context[-1] for context in contexts]).repeat(num_draws)
        grams = []
        for _ in range(4):
            token = torch.multinomial(TRANSITIONS[token], 1, generator=self.generator).squeeze(1)
            grams.append(token)
        return torch.stack(grams, -1).view(num_draws, len(contexts), 4)


def standard_errors(runs):
    return np.std(runs, axis=0, ddof=1) / math.sqrt(len(runs))


@pytest.mark.parametrize("patch_size", [1, 4, 6])
@pytest.mark.parametrize("num_paths", [1, 3])
def test_the_estimate_from_probabilities_is_unbiased(patch_size, num_paths):
    documents = chain_documents(patch_size)
    exact = chain_brier(documents, patch_size, EXACT)
    options = {"patch_size": patch_size, "num_draws": num_paths, "num_bootstrap": 1}
    runs = [
        calm_rt.brier_lm(chain_logits, documents, seed=seed, **options).brier
        for seed in range(SEEDS)
    ]
    error = standard_errors(runs)
    assert np.abs(np.mean(runs, axis=0)[0] - exact[0]) < 1e-12  # Brier-1 needs no draws
    assert (np.abs(np.mean(runs, axis=0) - exact)[1:] < 4 * error[1:]).all()
    assert (0 < error[1:]).all()


def test_the_estimate_from_draws_is_unbiased_and_varies_more():
    documents = chain_documents(4)
    exact = chain_brier(documents, 4, EXACT)
    options = {"patch_size": 4, "num_bootstrap": 1}
    drawn, given = (
        [calm_rt.brier_lm(model(seed), documents, seed=seed, **options).brier for seed in range(40)]
        for model in (ChainSampler, lambda _: chain_logits)
    )
    error = standard_errors(drawn)
    assert (np.abs(np.mean(drawn, axis=0) - exact) < 4 * error).all()
    # eight draws, as is the default, against one path
    assert (standard_errors(given) < error / 2).all()


def test_a_model_is_scored_the_same_in_any_batch_and_form():
    documents = chain_documents(4)

    class Model(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=1000)

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(TRANSITIONS.log())

        def forward(self, ids):
            return SimpleNamespace(logits=self.table[ids])

    results = [
        calm_rt.brier_lm(model, documents, batch_size=batch_size, seed=5)
        for model, batch_size in ((chain_logits, 1), (Model(), 7), (chain_logits, 1000))
    ]
    assert results[0] == results[1] == results[2]
    assert results[0].num_draws == 1 and results[0].tokens_per_second > 0
    low, high = results[0].interval
    assert low < results[0].score < high


def test_the_interval_covers_the_expectation():
    """95 % intervals over documents of the chain, of which 200 are enough to be normal."""
    sizes = {"number": 40, "patches": 3}
    generator, hits, runs = np.random.default_rng(1), 0, 100
    stationary = np.linalg.matrix_power(TRANSITIONS.numpy(), 50)[0]
    collision = [sum(stationary[a] * C for a, C in enumerate(row)) for row in collisions()]
    expected = np.array(collision)  # 2 E P(y) - C = C for a model that is right
    for _ in range(runs):
        documents = []
        for _ in range(sizes["number"]):
            ids = [generator.choice(3, p=stationary)]
            while len(ids) < 4 * sizes["patches"]:
                ids.append(generator.choice(3, p=TRANSITIONS[ids[-1]]))
            documents.append(torch.tensor(ids))
        result = calm_rt.brier_lm(chain_logits, documents, num_bootstrap=300, batch_size=100)
        low, high = result.brier_intervals[0]
        hits += low <= expected[0] <= high
    # a bootstrap of 40 documents covers a little less than it says; binomial, 4 sigma below 93 %
    assert hits >= 83


def collisions():
    """C_1 .. C_4 of the chain after each token."""
    square, rows = TRANSITIONS.numpy() ** 2, [np.ones(3)]
    for _ in range(4):
        rows.append(square @ rows[-1])
    return rows[1:]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (chain_logits, {"num_draws": 0}, "num_draws: expected at least 1"),
        (ChainSampler(0), {"num_draws": 1}, "num_draws: expected at least 2"),
        (chain_logits, {"patch_size": 0}, "patch_size"),
        (chain_logits, {"block_size": 6}, "block_size"),
        (lambda ids: ids, {}, r"model\(ids\): expected logits \[B, T, V\]"),
        (lambda ids: torch.zeros(*ids.shape, 2), {}, "documents: .*below the model's 2, got 2"),
        (lambda ids: TRANSITIONS, {}, r"model\(ids\): expected logits"),
        (SimpleNamespace(draw=lambda contexts, count: None), {}, "model.draw: expected"),
    ],
)
def test_bad_models_and_settings(model, options, message):
    with pytest.raises(ValueError, match=message):
        calm_rt.brier_lm(model, chain_documents(4), **options)
