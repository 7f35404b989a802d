"""BrierLM and the other measures against models whose scores are known exactly."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from official_standin import build
from safetensors.torch import load_file
from test_data import Characters
from torch import nn

from calm_rt import ops
from calm_rt.data import write_shards
from calm_rt.evaluation import (
    bigram_brier,
    brier_from_predictions,
    brier_lm,
    conditioning_gap,
    reconstruction_accuracy,
    unigram_brier,
)
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.reference import Stream

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "official_k4"
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
ORDERS = np.arange(1, 5)
TRANSITIONS = torch.from_numpy(np.array([[0.1, 0.8, 0.1], [0.05, 0.05, 0.9], [0.6, 0.3, 0.1]]))


class Chain(nn.Module):
    """A Calm whose tokens follow a Markov chain; a latent vector is the patch itself."""

    def __init__(self, patch_size: int, transitions=TRANSITIONS):
        super().__init__()
        size = len(transitions)
        self.config = CalmConfig(
            patch_size=patch_size, vocab_size=size, num_hidden_layers=1, **SIZES
        )
        self.ae_model = self
        self.bounds = nn.Parameter(transitions.cumsum(-1), requires_grad=False)

    def hidden_states(self, ids, cache=None):
        return ids.unflatten(1, (-1, self.config.patch_size))[..., -1:]

    def sample(self, hidden, num_samples, seed, rows):
        size = self.config.patch_size
        noise = ops.noise(
            rows, num_samples, size, seed=seed, stream=Stream.HEAD, distribution="uniform"
        )
        token, patch = hidden[:, 0].expand(num_samples, -1), []
        for k in range(size):
            token = (noise[..., k, None] >= self.bounds[token, :-1]).sum(-1)
            patch.append(token)
        return torch.stack(patch, -1)

    def decode(self, latents):
        return latents


def chain_documents(patch_size, number=4, patches=60):
    """Documents of unequal length from the chain itself."""
    generator = np.random.default_rng(0)
    documents = []
    for d in range(number):
        ids = [0]
        while len(ids) < (patches + 7 * d) * patch_size:
            ids.append(generator.choice(3, p=TRANSITIONS[ids[-1]]))
        documents.append(torch.tensor(ids))
    return documents


def starts(ids, patch_size):
    """(token before, n-gram) at every start in one window."""
    steps = -(-4 // patch_size)
    for patch in range(1, len(ids) // patch_size - steps + 1):
        at = patch * patch_size
        yield ids[at - 1], ids[at : at + 4]


def chain_brier(documents, patch_size, probability):
    """Brier-1..4 by enumeration of every n-gram; probability(before, ids) is the model's."""
    terms = []
    collisions = {}
    for before, gram in ((b, g) for ids in documents for b, g in starts(ids.tolist(), patch_size)):
        for n in ORDERS:
            if (before, n) not in collisions:
                grams = itertools.product(range(3), repeat=int(n))
                collisions[before, n] = sum(probability(before, x) ** 2 for x in grams)
        terms.append([2 * probability(before, gram[:n]) - collisions[before, n] for n in ORDERS])
    return np.mean(terms, 0)


def transition_probability(table):
    def probability(before, ids):
        return math.prod(float(table[a, b]) for a, b in itertools.pairwise([before, *ids]))

    return probability


@pytest.mark.parametrize("num_draws", [2, 5])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5])
def test_the_estimate_is_unbiased(patch_size, num_draws):
    """The mean over seeds lies within 4 standard errors of the exact score, and these are small."""
    model, documents = Chain(patch_size), chain_documents(patch_size)
    exact = chain_brier(documents, patch_size, transition_probability(TRANSITIONS))
    runs = [
        brier_lm(model, documents, num_draws=num_draws, seed=seed, num_bootstrap=1).brier
        for seed in range(40)
    ]
    error = np.std(runs, axis=0, ddof=1) / math.sqrt(len(runs))
    assert (np.abs(np.mean(runs, axis=0) - exact) < 4 * error).all()
    assert (error < 0.02).all() and (exact > 5 * error).all()


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_short_patches_follow_the_path_through_the_cache(patch_size):
    """The same draws with every context read anew from the start, position by position."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 3, "latent_size": 4, "patch_size": patch_size}
    config = CalmConfig(**SIZES, **sizes, num_hidden_layers=2, noise_size=8, num_mlp_layers=1)
    model = Calm(config, AutoencoderConfig(hidden_size=8, intermediate_size=8, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    documents = [torch.randint(0, 3, (length * patch_size,)) for length in (9, 12)]
    num_draws, seed, steps = 3, 11, -(-4 // patch_size)

    def draw(context, row):
        hidden = model.hidden_states(context[None])[:, -1]
        rows = torch.tensor([row])
        return model.ae_model.decode(model.sample(hidden, num_draws, seed, rows))[:, 0]  # [S, K]

    terms, continued = [], 0
    for d, ids in enumerate(documents):
        for start in range(1, len(ids) // patch_size - steps + 1):
            context, first = ids[: start * patch_size], d << 32 | start
            accuracy, collision, path, weight, whole = [], [], context, 1.0, 1.0
            for row in range(first, first + steps):
                at = (row & 0xFFFFFFFF) * patch_size
                agreeing = draw(ids[:at], row) == ids[at : at + patch_size]
                right = agreeing.cumprod(-1).double().mean(0)
                accuracy += (whole * right).tolist()
                whole *= right[-1]
                draws = draw(path, row)
                pairs = itertools.combinations(draws, 2)
                agreeing = torch.stack([(a == b).cumprod(-1) for a, b in pairs])
                collision += (weight * agreeing.double().mean(0)).tolist()
                weight *= float((draws[1:] == draws[0]).all(-1).double().mean())
                path = torch.cat([path, draws[0]])
                continued += weight > 0
            terms.append([2 * a - c for a, c in zip(accuracy[:4], collision[:4], strict=True)])
    for batch_size in (1, 2):
        result = brier_lm(model, documents, num_draws=num_draws, seed=seed, batch_size=batch_size)
        assert result.num_patches == len(terms)
        np.testing.assert_allclose(result.brier, np.mean(terms, 0), rtol=1e-12)
    assert continued > len(terms) / 4


@pytest.mark.parametrize("patch_size", [2, 4])
def test_draws_depend_on_seed_and_patch_only(patch_size):
    model, documents = Chain(patch_size), chain_documents(patch_size)
    results = [brier_lm(model, documents, batch_size=size) for size in (1, 3, 50)]
    assert results[0] == results[1] == results[2]
    assert brier_lm(model, documents, seed=1).brier != results[0].brier
    arrays = [ids.numpy().astype(np.uint16) for ids in documents]
    assert brier_lm(model, arrays) == results[0]


def test_windows_and_limits():
    model, documents = Chain(4), chain_documents(4)  # of 60, 67, 74, 81 patches
    result = brier_lm(model, documents, num_bootstrap=10)
    assert result.num_patches == 60 + 67 + 74 + 81 - 4
    assert (result.num_documents, result.num_draws) == (4, 8)
    cut = brier_lm(model, documents, block_size=40, num_bootstrap=10)
    assert cut.num_patches == sum(n - -(-n // 10) for n in (60, 67, 74, 81))
    part = brier_lm(model, documents, max_patches=70, num_bootstrap=10)
    assert (part.num_patches, part.num_documents) == (70, 2)
    first = brier_lm(model, [documents[0], documents[1][: 12 * 4]], num_bootstrap=10)
    assert part.brier == first.brier


def test_a_perfect_and_a_hopeless_model():
    documents = [torch.tensor([0, 1, 2] * 20 * (d + 1)) for d in range(3)]
    perfect = Chain(4, torch.eye(3).roll(1, 1))
    result = brier_lm(perfect, documents)
    assert result.score == 100 and result.interval == (100, 100) and result.brier == (1,) * 4
    hopeless = brier_lm(Chain(4, torch.eye(3)), documents)
    assert hopeless.brier == (-1,) * 4
    assert hopeless.score == 0 and hopeless.interval == (0, 0)  # four negatives do not make a score


def test_the_interval_is_that_of_the_documents():
    """1.96 standard errors of the mean over equally long documents to each side, within a tenth."""
    good, bad = torch.tensor([0, 1, 2] * 20), torch.tensor([0, 2, 1] * 20)
    documents = [good] * 60 + [bad] * 40
    result = brier_lm(Chain(4, torch.eye(3).roll(1, 1)), documents, num_bootstrap=4000)
    assert result.brier[0] == pytest.approx(0.6 * 1 + 0.4 * -1)
    low, high = result.brier_intervals[0]
    width = 2 * 1.96 * math.sqrt(4 * 0.6 * 0.4 / 100)
    assert low < result.brier[0] < high
    assert high - low == pytest.approx(width, rel=0.1)
    assert result.interval[0] <= result.score <= result.interval[1]
    single = brier_lm(Chain(4), chain_documents(4, number=1))
    assert all(map(math.isnan, single.interval))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden vectors at {GOLDEN}")
def test_official_estimates():
    vectors = load_file(GOLDEN / "vectors.safetensors")
    predictions = torch.stack([vectors["brier_pred_1"], vectors["brier_pred_2"]]).view(2, -1, 4)
    target = vectors["input_ids"][:, 4:].reshape(-1, 4)
    brier = brier_from_predictions(predictions, target).mean(0)
    torch.testing.assert_close(brier.float(), vectors["brier"])


# ---- samplers to compare with ----


@pytest.mark.parametrize("patch_size", [1, 3, 4, 6])
def test_unigram_and_bigram_samplers(patch_size):
    documents = chain_documents(patch_size, number=2, patches=12)
    train = np.array([0, 1, 0, 0, 1, 0, 2], dtype=np.uint16)  # 2 is never continued
    unigram = np.bincount(train) / len(train)
    bigram = np.array([[1 / 4, 2 / 4, 1 / 4], [1, 0, 0], unigram])
    result = unigram_brier(train, documents, patch_size)
    exact = chain_brier(documents, patch_size, transition_probability(np.stack([unigram] * 3)))
    np.testing.assert_allclose(result.brier, exact, rtol=1e-12)
    assert result.num_draws is None and result.num_documents == 2
    result = bigram_brier(train, documents, patch_size)
    exact = chain_brier(documents, patch_size, transition_probability(bigram))
    np.testing.assert_allclose(result.brier, exact, rtol=1e-12)


def test_samplers_score_what_the_model_scores():
    model, documents = Chain(4), chain_documents(4)
    train = torch.cat(documents).numpy()
    options = {"block_size": 64, "max_patches": 100, "num_bootstrap": 10}
    results = [brier_lm(model, documents, **options)]
    results += [f(train, documents, 4, **options) for f in (unigram_brier, bigram_brier)]
    assert {result.num_patches for result in results} == {100}
    assert results[2].score > results[1].score


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5])
def test_the_bos_of_documents_is_never_scored(tmp_path, patch_size):
    """Who always draws BOS is always wrong and always repeats itself, on documents of shards."""
    texts = [chr(40 + number) * 20 for number in range(30)]
    shards = write_shards(texts, Characters(), tmp_path, patch_size, held_out=0.7)
    documents = shards.held_out_documents()
    heads = {int((ids == Characters.bos_id).sum()) for ids in documents}
    assert heads == set(range(patch_size + 1))
    only_bos = np.array([Characters.bos_id])
    assert unigram_brier(only_bos, shards, patch_size).brier == (-1,) * 4
    assert bigram_brier(only_bos, shards, patch_size).brier == (-1,) * 4
    starts = sum(len(ids) // patch_size - -(-4 // patch_size) for ids in documents)
    assert unigram_brier(shards.train_tokens, shards, patch_size).num_patches == starts


# ---- reconstruction and conditioning ----


class Rounding(nn.Module):
    """An autoencoder that writes tokens down as numbers and rounds them back."""

    def __init__(self, patch_size=4):
        super().__init__()
        self.config = AutoencoderConfig(patch_size=patch_size, latent_size=patch_size)
        self.nothing = nn.Parameter(torch.zeros(()))

    def encode(self, ids):
        mean = ids.unflatten(1, (-1, self.config.patch_size)).float()
        return mean, torch.full_like(mean, -2)

    def decode(self, latents):
        return latents.round().long()


def test_reconstruction_accuracy():
    """With noise a token survives with probability P(|normal| < 0.5 / noise_std)."""
    ids = torch.arange(40_000).view(50, -1) % 97
    assert reconstruction_accuracy(Rounding(), ids) == 1
    accuracy = reconstruction_accuracy(Rounding(), ids, noise_std=0.3, seed=3)
    expected = math.erf(0.5 / 0.3 / math.sqrt(2))
    error = math.sqrt(expected * (1 - expected) / ids.numel())
    assert abs(accuracy - expected) < 4 * error
    assert reconstruction_accuracy(Rounding(), ids.split(7), noise_std=0.3, seed=3) == accuracy
    assert reconstruction_accuracy(Rounding(), ids, noise_std=0.3, seed=4) != accuracy


class Counting(nn.Module):
    """A Calm for documents that count: it knows the next patch, up to noise, or does not look."""

    def __init__(self, looks: bool):
        super().__init__()
        self.config = CalmConfig(patch_size=4, latent_size=4, num_samples=4)
        self.ae_model = Rounding()
        self.looks = looks

    def hidden_states(self, ids, cache=None):
        return (ids.unflatten(1, (-1, 4)).float() + 4) * self.looks

    def sample(self, hidden, num_samples, seed, rows):
        noise = ops.noise(rows, num_samples, 4, seed=seed, stream=Stream.HEAD)
        return hidden + 0.1 * noise


def test_conditioning_gap():
    ids = torch.arange(64)[None] + 10 * torch.arange(6)[:, None]
    gap, (low, high) = conditioning_gap(Counting(looks=True), ids)
    assert 0 < low <= gap <= high
    assert conditioning_gap(Counting(looks=True), ids.split(4)) == (gap, (low, high))
    assert conditioning_gap(Counting(looks=False), ids) == (0, (0, 0))
    assert all(map(math.isnan, conditioning_gap(Counting(looks=True), ids[:1])[1]))


# ---- bad input ----


@pytest.mark.parametrize("kind", ["EnergyTransformer", "Autoencoder"])
def test_what_is_no_language_model_of_ours_is_named(kind):
    model, ids = build(kind), [[5] * 16]
    if kind == "Autoencoder":
        model = Autoencoder(AutoencoderConfig(vocab_size=9, hidden_size=8, intermediate_size=8))
    with pytest.raises(ValueError, match=f"model: expected a Calm .*got another {kind}"):
        brier_lm(model, ids)


def test_bad_input():
    model, documents = Chain(4), chain_documents(4)
    cases = [
        ({"num_draws": 1}, "num_draws: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"block_size": 10}, "block_size: expected a positive multiple of patch_size 4, got 10"),
        ({"num_bootstrap": 0}, "num_bootstrap: expected at least 1, got 0"),
        ({"max_patches": 0}, "max_patches: expected at least 1, got 0"),
        ({"documents": []}, "documents: expected one with 2 patches or more"),
        ({"documents": ["text"]}, r"documents\[0\]: expected token ids, got 'text'"),
        ({"documents": [[0.5] * 8]}, r"documents\[0\]: expected token ids, got \[0.5"),
        ({"documents": [[0] * 7 + [-1]]}, r"documents\[0\]: expected token ids in .*, got -1"),
        (
            {"documents": [torch.zeros(6, dtype=torch.int64)]},
            r"documents\[0\]: expected \[tokens\] with whole patches",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            brier_lm(model, **{"documents": documents} | changes)
        assert "\n" not in str(error.value)
    for function, argument in [
        (lambda: brier_from_predictions(torch.zeros(1, 3, 4), torch.zeros(3, 4)), "predictions"),
        (lambda: unigram_brier(np.array([], np.uint16), documents, 4), "train_tokens"),
        (lambda: reconstruction_accuracy(Rounding(), []), "batches"),
        (lambda: conditioning_gap(Counting(True), []), "batches"),
        (lambda: conditioning_gap(Counting(True), torch.zeros(1, 8).long()), "batches"),
    ]:
        with pytest.raises(ValueError, match=f"{argument}: expected at least"):
            function()


def test_settings_are_checked_before_the_work():
    model, ids = Chain(4), torch.zeros(1, 16, dtype=torch.int64)
    same = [brier_lm(model, ids, seed=s) for s in (3, np.int64(3), torch.tensor(3))]
    assert {result.score for result in same} == {same[0].score}
    assert brier_lm(model, ids.int(), seed=3).score == same[0].score
    model.sample = None
    for name, value in (("num_bootstrap", 0), ("batch_size", 2.5), ("seed", 2**64)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            brier_lm(model, ids, **{name: value})
    longest = model.config.max_position_embeddings * 4
    with pytest.raises(
        ValueError, match=f"block_size: expected .* at most the model's .*{longest}"
    ):
        brier_lm(model, ids, block_size=longest + 4)
    with pytest.raises(ValueError, match=r"documents\[0\]: expected token ids, got torch.bool"):
        brier_lm(model, ids.bool())
