"""Brier scores of n-grams: estimates from draws, intervals, and exact unigram and bigram samplers.

Brier-n of a model P at tokens y_1..n is 2 P(y_1..n) - sum_x P(x_1..n)^2, and BrierLM is
100 (Brier-1 Brier-2 Brier-3 Brier-4)^(1/4) (paper equations 12 to 15). n-grams start at patch
boundaries: at the first token of every patch but the first of a window. So the BOS tokens at the
head of a document in token shards are context and never scored, easy as they are: they reach no
further than its first patch. Where they fill it, the next patch is scored as the text's beginning,
what generation draws for an empty prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_rt.data import TokenShards
from calm_rt.ops.check import check, check_int, check_seed

ORDERS = 4  # n-grams of 1 to 4 tokens
CONFIDENCE = (2.5, 97.5)  # percentiles of an interval

Interval = tuple[float, float]
Documents = TokenShards | Sequence[Tensor] | Sequence[np.ndarray] | Tensor


@dataclass(frozen=True)
class BrierLM:
    """Brier scores of a set of n-grams, with 95 % intervals (NaN for a single document)."""

    score: float  # BrierLM, 0 to 100; 0 where any of the four estimates is not positive
    interval: Interval
    brier: tuple[float, float, float, float]  # Brier-1 to Brier-4, at most 1
    brier_intervals: tuple[Interval, Interval, Interval, Interval]
    num_patches: int  # patches at which an n-gram started
    num_documents: int
    num_draws: int | None  # a patch; None where the expectation is exact
    block_size: int | None = field(default=None, compare=False)  # tokens read at once at most
    tokens_per_second: float | None = field(default=None, compare=False)  # K a patch, as read


def brier_from_predictions(predictions: Tensor, target: Tensor) -> Tensor:
    """Unbiased estimates of Brier-1 to Brier-n at each position, from all pairs of the draws.

    predictions: [S, R, n] int64, S >= 2 independent draws.  target: [R, n] int64.
    returns: [R, n] float64.
    """
    check(len(predictions) >= 2, "predictions", "at least 2 draws", len(predictions))
    return 2 * agreement(predictions, target) - pair_agreement(predictions)


def unigram_brier(
    train_tokens: np.ndarray,
    documents: Documents,
    patch_size: int,
    *,
    block_size: int | None = None,
    max_patches: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> BrierLM:
    """BrierLM of a sampler that draws every token by its frequency in the training tokens; exact.

    train_tokens: [N] ids, TokenShards.train_tokens for one: without the BOS that no n-gram holds.
    The other arguments: as in brier_lm, for the same n-grams; block_size None for whole documents.
    """
    windows = windows_of(documents, patch_size, block_size, max_patches)
    _, grams = _grams(windows, patch_size)
    unigram = _frequencies(train_tokens, grams)
    accuracy = unigram[grams].cumprod(-1)
    collision = (unigram**2).sum() ** np.arange(1, ORDERS + 1)
    return summarise(2 * accuracy - collision, windows, None, num_bootstrap, seed)


def bigram_brier(
    train_tokens: np.ndarray,
    documents: Documents,
    patch_size: int,
    *,
    block_size: int | None = None,
    max_patches: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> BrierLM:
    """BrierLM of a sampler that draws every token by its frequency after the one before; exact.

    After a token that the training tokens never continue it draws by plain frequency. Arguments: as
    in unigram_brier.
    """
    windows = windows_of(documents, patch_size, block_size, max_patches)
    previous, grams = _grams(windows, patch_size)
    unigram = _frequencies(train_tokens, grams, previous)
    size = len(unigram)
    tokens = np.asarray(train_tokens, dtype=np.int64)
    pairs, counts = np.unique(tokens[:-1] * size + tokens[1:], return_counts=True)
    first, second = np.divmod(pairs, size)
    contexts = np.bincount(first, counts, size)
    probability = counts / contexts[first]
    seen = contexts > 0

    chain = np.concatenate([previous[:, None], grams], 1)
    wanted = chain[:, :-1] * size + chain[:, 1:]
    index = np.searchsorted(pairs, wanted).clip(max=max(len(pairs) - 1, 0))
    found = np.where(pairs[index] == wanted, probability[index], 0) if len(pairs) else 0.0
    accuracy = np.where(seen[chain[:, :-1]], found, unigram[grams]).cumprod(-1)
    # collision_n(v) = sum_u P(u | v)^2 collision_(n-1)(u), from collision_0 = 1
    collision, collisions = np.ones(size), []
    for _ in range(ORDERS):
        after_seen = np.bincount(first, probability**2 * collision[second], size)
        collision = np.where(seen, after_seen, (unigram**2 * collision).sum())
        collisions.append(collision[previous])
    terms = 2 * accuracy - np.stack(collisions, -1)
    return summarise(terms, windows, None, num_bootstrap, seed)


class Window(NamedTuple):
    """A piece of a document that is read at once."""

    document: int  # its index
    first: int  # index in the document of the window's first patch
    ids: Tensor  # [tokens]
    num_starts: int  # patches where an n-gram starts: 1 .. num_starts


def windows_of(
    documents: Documents,
    patch_size: int,
    block_size: int | None,
    max_patches: int | None,
    whole_patches: bool = False,
    vocab_size: int | None = None,
) -> list[Window]:
    """The documents in windows of block_size tokens at most, those that hold an n-gram to score.

    whole_patches: of nothing else may a document consist.
    raises: ValueError for documents and sizes that do not fit, and without any n-gram.
    """
    check(patch_size >= 1, "patch_size", "at least 1", patch_size)
    if isinstance(documents, TokenShards):
        expected = f"shards for patch_size {patch_size}"
        check(documents.patch_size == patch_size, "documents", expected, documents.patch_size)
        documents = documents.held_out_documents()
    steps = -(-ORDERS // patch_size)  # patches that an n-gram reaches over
    block_size = block_size if block_size is None else check_int("block_size", block_size, 1)
    fits = block_size is None or block_size % patch_size == 0
    check(fits, "block_size", f"a positive multiple of patch_size {patch_size}", block_size)
    left = np.inf if max_patches is None else check_int("max_patches", max_patches, 1)
    windows = []
    for index, ids in enumerate(documents):
        ids = _whole_numbers(f"documents[{index}]", ids)
        fits = ids.ndim == 1 and not (whole_patches and len(ids) % patch_size)
        expected = "[tokens]"
        if whole_patches:
            expected += f" with whole patches of {patch_size} (close with EOS, fill with PAD)"
        check(fits, f"documents[{index}]", expected, list(ids.shape))
        for wrong in ids[(ids < 0) | (ids >= (vocab_size or np.inf))][:1].tolist():
            below = "0 or more" if vocab_size is None else f"[0, {vocab_size})"
            check(False, f"documents[{index}]", f"token ids in {below}", wrong)
        for start in range(0, len(ids), block_size or max(len(ids), 1)):
            piece = ids[start:][:block_size]
            num_starts = int(min((len(piece) - ORDERS) // patch_size, left))
            if num_starts > 0:
                piece = piece[: (num_starts + steps) * patch_size]
                windows.append(Window(index, start // patch_size, piece, num_starts))
                left -= num_starts
    expected = f"one with {steps + 1} patches or more (and max_patches and block_size to match)"
    check(len(windows) > 0, "documents", expected, "none")
    return windows


def _whole_numbers(name: str, ids: Tensor | Sequence[int] | np.ndarray) -> Tensor:
    if not isinstance(ids, Tensor):
        array = np.asarray(ids)
        whole = array.dtype.kind in "iu" or array.size == 0
        check(whole, name, "token ids", f"{ids!r:.80}")
        return torch.from_numpy(array.astype(np.int64))
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    check(whole, name, "token ids", ids.dtype)
    return ids.to(torch.int64)


def _grams(windows: list[Window], patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The token before each n-gram [N], and the n-grams [N, 4]."""
    chains = []
    for window in windows:
        starts = torch.arange(1, window.num_starts + 1) * patch_size
        chains.append(window.ids.cpu().unfold(0, ORDERS + 1, 1)[starts - 1])
    chain = torch.cat(chains).numpy()
    return chain[:, 0], chain[:, 1:]


def _frequencies(train_tokens: np.ndarray, *ids: np.ndarray) -> np.ndarray:
    """Relative frequency of every token, over the ids that occur anywhere: [V] float64."""
    check(len(train_tokens) > 0, "train_tokens", "at least one token", len(train_tokens))
    size = 1 + max(int(part.max()) for part in ids)
    counts = np.bincount(train_tokens, minlength=size)
    return counts / counts.sum()


def agreement(draws: Tensor, target: Tensor) -> Tensor:
    """The share of draws that begin with the target's first n tokens: [R, n] float64."""
    return (draws == target).cumprod(-1).double().mean(0)


def pair_agreement(draws: Tensor) -> Tensor:
    """The share of pairs of draws that agree in their first n tokens: [R, n] float64."""
    agreeing = sum((draws[i + 1 :] == draws[i]).cumprod(-1).sum(0) for i in range(len(draws) - 1))
    return agreeing.double() / (len(draws) * (len(draws) - 1) // 2)


def summarise(
    terms: np.ndarray,
    windows: list[Window],
    num_draws: int | None,
    num_bootstrap: int,
    seed: int,
) -> BrierLM:
    """The scores and intervals of terms [N, 4], those of each window's starts in order."""
    owners = np.repeat([w.document for w in windows], [w.num_starts for w in windows])
    sums, counts = sums_by_owner(terms, owners)
    brier = sums.sum(0) / counts.sum()
    resampled = bootstrap(sums, counts, num_bootstrap, seed)
    return BrierLM(
        score=float(score(brier)),
        interval=interval(score(resampled)),
        brier=tuple(brier.tolist()),
        brier_intervals=tuple(interval(column) for column in resampled.T),
        num_patches=len(terms),
        num_documents=len(counts),
        num_draws=num_draws,
    )


def score(brier: np.ndarray) -> np.ndarray:
    """100 x the geometric mean; 0 unless all are positive, or two negatives would make a score."""
    undefined = (brier <= 0).any(-1)
    return np.where(undefined, 0.0, 100 * np.abs(brier.prod(-1)) ** 0.25)


def sums_by_owner(terms: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the terms over each owner [D, C], and how many there were [D]."""
    _, index, counts = np.unique(owners, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(index, column) for column in terms.T], -1)
    return sums, counts


def bootstrap(sums: np.ndarray, counts: np.ndarray, num_bootstrap: int, seed: int) -> np.ndarray:
    """Means over resampled owners: [num_bootstrap, C]."""
    seed, num_bootstrap = check_seed(seed), check_int("num_bootstrap", num_bootstrap, 1)
    generator = np.random.default_rng(seed & 0xFFFFFFFFFFFFFFFF)
    share = np.full(len(counts), 1 / len(counts))
    if len(counts) == 1:  # says nothing about other owners
        return np.full((num_bootstrap, sums.shape[1]), np.nan)
    weights = (generator.multinomial(len(counts), share) for _ in range(num_bootstrap))
    return np.stack([w @ sums / (w @ counts) for w in weights])


def interval(values: np.ndarray) -> Interval:
    """The middle 95 % of resampled values."""
    low, high = np.percentile(values, CONFIDENCE)
    return float(low), float(high)
