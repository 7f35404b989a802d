"""How good a model is on held-out text: BrierLM, reconstruction, dependence on the context.

Every random number depends on (seed, document, patch) only, so no result depends on the batch size
but through the rounding of matrix products.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from calm_rt import ops
from calm_rt.branches import text_config
from calm_rt.brier import (
    ORDERS,
    BrierLM,
    Documents,
    Interval,
    Window,
    agreement,
    bigram_brier,
    bootstrap,
    brier_from_predictions,
    interval,
    pair_agreement,
    summarise,
    sums_by_owner,
    unigram_brier,
    windows_of,
)
from calm_rt.causal_lm import Sampler, model_terms, sampler_terms
from calm_rt.nn import Autoencoder, Calm, KVCache
from calm_rt.nn.plain import uncompiled
from calm_rt.ops.check import check, check_int, check_seed
from calm_rt.reference import Stream

__all__ = [
    "BrierLM",
    "bigram_brier",
    "brier_from_predictions",
    "brier_lm",
    "conditioning_gap",
    "reconstruction_accuracy",
    "unigram_brier",
]

ROWS_PER_CALL = 1024  # contexts drawn from and decoded at once
LONGEST_WINDOW = 1024  # tokens of a window by default, where the model is no Calm
CACHE_BYTES = 1 << 28  # of key-value cache copied at once when draws are continued


@contextmanager
def _evaluation_mode(model: object) -> Iterator[None]:
    """Without dropout and the like, where it is a module; what was in training is then again."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@torch.inference_mode()
def brier_lm(
    model: Calm | Sampler | Callable[[Tensor], Any],
    documents: Documents,
    *,
    num_draws: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    patch_size: int | None = None,
    block_size: int | None = None,
    max_patches: int | None = None,
    num_bootstrap: int = 1000,
) -> BrierLM:
    """BrierLM of a CALM or of any causal language model, teacher-forced, with an interval.

    For K >= 4 the n-grams of a CALM are the first tokens of a patch. For K < 4 they go over
    ceil(4 / K) patches: the accuracy term is a product over teacher-forced patches, the collision
    term continues one draw's path through the key-value cache and compares fresh draws on it.
    model: a Calm; a causal language model that gives logits [B, T, V], or an object with them as
        `.logits`, for ids [B, T] int64, as those of `transformers` do; or what has a method
        `draw(contexts, num_draws)` (calm_rt.causal_lm.Sampler). Logits serve as exact
        probabilities, whose estimates vary far less than those from draws. A module in training
        mode is evaluated without it, and is in it again afterwards.
    documents: [tokens] ids each, or [D, tokens] in one tensor; of TokenShards the held-out ones.
        For a Calm whole patches with BOS, EOS and PAD as in token shards, else of any length.
    num_draws: S >= 2 of each patch, 2 gives the official estimator, None for 8; of a model with
        logits the paths at each start, at least 1, which is what None stands for.
    batch_size: windows in one forward pass; of a sampler, and of a model whose key-value cache
        cannot be used, contexts.
    patch_size: K, n-grams start every K tokens; None for a Calm's own, 4 for others.
    block_size: tokens of a window; longer documents are cut and each window starts anew, so longer
        ones score better. None for max_position_embeddings patches of a Calm's config; for other
        models for as many tokens, or 1,024 where that is less or the config has no such number.
        The result says what it was.
    max_patches: at how many patches an n-gram starts at most, from the first document on; None for
        all.
    num_bootstrap: resamples of the documents, over which the intervals are.
    Of a model with logits that takes past_key_values, use_cache, position_ids and attention_mask as
    those of `transformers` do, every token of a window is read once, and three more at each start
    and path; of others each of these three takes the whole context. No logits [B, T, V] of more
    than 256 MB exist, unless the model makes them.
    raises: ValueError for settings and documents that do not fit, or without any n-gram to score.
    source: paper section 4, official CALM.eval_brier (which uses one of the pairs).
    """
    seed, batch_size = check_seed(seed), check_int("batch_size", batch_size, 1)
    num_bootstrap = check_int("num_bootstrap", num_bootstrap, 1)
    is_calm = hasattr(model, "ae_model")
    draws = isinstance(model, Sampler)
    inner = uncompiled(model)
    official = is_calm and not hasattr(inner, "hidden_states")
    kinds = "a Calm (of calm_rt.load; an official model has eval_brier) or what gives logits"
    unfit = official or isinstance(inner, Autoencoder)
    check(not unfit, "model", kinds, f"another {type(inner).__name__}")
    least = 2 if is_calm or draws else 1
    usual = 8 if least == 2 else 1
    num_draws = check_int("num_draws", usual if num_draws is None else num_draws, least)
    config: Any = text_config(model)
    patch_size = patch_size if patch_size is None else check_int("patch_size", patch_size, 1)
    own_size = config.patch_size if is_calm else patch_size or ORDERS
    check(patch_size in (None, own_size), "patch_size", f"the model's {own_size}", patch_size)
    longest = getattr(config, "max_position_embeddings", None)
    most = longest * own_size if is_calm and longest else longest
    if block_size is not None or (is_calm and longest):
        block_size = check_int("block_size", most if block_size is None else block_size, 1)
        expected = f"a multiple of patch_size {own_size}, at most the model's longest"
        fits = not most or block_size <= most
        check(fits, "block_size", f"{expected} {most}", block_size)
    elif not is_calm:
        longest = min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
        block_size = max(longest // own_size, 1) * own_size
    sizes = own_size, block_size, max_patches, is_calm, getattr(config, "vocab_size", None)
    windows = windows_of(documents, *sizes)
    if not draws:  # little padding in a batch
        windows.sort(key=lambda window: len(window.ids), reverse=True)
    start = time.perf_counter()
    with _evaluation_mode(model):
        if draws:
            terms = sampler_terms(model, windows, own_size, num_draws, batch_size)
        elif is_calm:
            batches = (windows[i : i + batch_size] for i in range(0, len(windows), batch_size))
            terms = torch.cat([_window_terms(model, batch, num_draws, seed) for batch in batches])
        else:
            terms = model_terms(model, windows, own_size, num_draws, seed, batch_size)
    speed = sum(len(window.ids) for window in windows) / (time.perf_counter() - start)
    result = summarise(terms.numpy(), windows, num_draws, num_bootstrap, seed)
    return dataclasses.replace(result, block_size=block_size, tokens_per_second=speed)


@torch.inference_mode()
def reconstruction_accuracy(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor] | Tensor,
    *,
    noise_std: float = 0.0,
    seed: int = 0,
) -> float:
    """The share of tokens that come back from decode(mean + noise_std x normal noise).

    BOS, EOS and PAD count too: generation decodes them from latents as well.
    batches: [B, P K] ids each, or one such tensor.  noise_std: 0.3 is about the posterior's own
        after training.
    raises: ValueError without any token.
    """
    batches = [batches] if isinstance(batches, Tensor) else batches
    device, size = _device(autoencoder), autoencoder.config.patch_size
    right, total, patches = 0, 0, 0
    for ids in batches:
        ids = ids.to(device)
        mean, _ = autoencoder.encode(ids)  # [B, P, L]
        latents = mean.flatten(0, 1)
        if noise_std:
            rows = torch.arange(patches, patches + len(latents), device=device)
            noise = ops.noise(rows, 1, latents.shape[1], seed=seed, stream=Stream.PROBE)[0]
            latents = latents + noise_std * noise.to(latents.dtype)
        decoded = autoencoder.decode(latents)  # [B P, K]
        right += int((decoded == ids.reshape(-1, size)).sum())
        total, patches = total + ids.numel(), patches + len(latents)
    check(total > 0, "batches", "at least one token", total)
    return right / total


@torch.inference_mode()
def conditioning_gap(
    model: Calm,
    batches: Iterable[Tensor] | Tensor,
    *,
    seed: int = 0,
    num_targets: int = 100,
    num_bootstrap: int = 1000,
) -> tuple[float, Interval]:
    """Energy loss with shuffled hidden states minus matched: what the draws owe to their context.

    0 for a model that ignores its context. Every hidden state goes to another patch of the whole
    set; both losses use the same noise and targets.
    batches: [B, P K] ids each, P >= 2, or one such tensor; a row is one unit of the bootstrap.
    returns: the gap, and its 95 % interval (NaN for a single row).
    raises: ValueError for fewer than two predicted patches.
    """
    seed, num_bootstrap = check_seed(seed), check_int("num_bootstrap", num_bootstrap, 1)
    batches = [batches] if isinstance(batches, Tensor) else batches
    device, size = _device(model), model.config.patch_size
    parts, num_rows = [], 0
    for ids in batches:
        ids = ids.to(device)
        hidden = model.hidden_states(ids[:, :-size])  # [B, P - 1, H]
        mean, log_std = model.ae_model.encode(ids[:, size:])  # [B, P - 1, L]
        owner = torch.arange(num_rows, num_rows + len(ids), device=device)
        rows = owner[:, None] << 32 | torch.arange(mean.shape[1], device=device)
        parts.append([part.flatten(0, 1) for part in (hidden, mean, log_std, rows)])
        num_rows += len(ids)
    check(num_rows > 0, "batches", "at least one row", num_rows)
    hidden, *posteriors, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    check(len(rows) >= 2, "batches", "at least two patches to predict", len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle through all patches: nobody keeps its own

    def scores(contexts: Tensor) -> Tensor:
        columns = [column.split(ROWS_PER_CALL) for column in (contexts, *posteriors, rows)]
        return torch.cat([score(*part) for part in zip(*columns, strict=True)])

    def score(contexts: Tensor, mean: Tensor, log_std: Tensor, rows: Tensor) -> Tensor:
        draws = model.sample(contexts, model.config.num_samples, seed, rows)
        options = {"num_targets": num_targets, "beta": model.config.beta}
        return ops.energy_score(draws, mean, log_std, seed=seed, rows=rows, **options)

    gaps = (scores(hidden) - scores(hidden[other])).double().cpu().numpy()[:, None]
    sums, counts = sums_by_owner(gaps, (rows >> 32).cpu().numpy())
    resampled = bootstrap(sums, counts, num_bootstrap, seed)
    return float(sums.sum() / counts.sum()), interval(resampled[:, 0])


def _window_terms(model: Calm, windows: list[Window], num_draws: int, seed: int) -> Tensor:
    """Estimates of Brier-1..4 at every start of the windows: [N, 4] float64, on the CPU."""
    patch_size, device = model.config.patch_size, _device(model)
    ids = torch.nn.utils.rnn.pad_sequence([w.ids for w in windows], batch_first=True).to(device)
    patches = ids.unflatten(1, (-1, patch_size))  # [B, P, K]
    cache = None
    if patch_size < ORDERS:
        dtype = next(model.parameters()).dtype
        cache = KVCache(model.config, len(windows), patches.shape[1], dtype, device)
    hidden = model.hidden_states(ids, cache)  # [B, P, H]
    lengths = torch.tensor([len(w.ids) // patch_size for w in windows], device=device)
    document = torch.tensor([w.document << 32 | w.first for w in windows], device=device)
    batch, place = _places(lengths - 1)
    rows = document[batch] + place
    draws = _draw(model, hidden[batch, place - 1], num_draws, seed, rows)  # [S, R, K]
    if cache is None:
        target = patches[batch, place, :ORDERS]
        return brier_from_predictions(draws[..., :ORDERS], target).cpu()

    right = torch.zeros(patches.shape, dtype=torch.float64, device=device)
    right[batch, place] = agreement(draws, patches[batch, place])
    starts = torch.tensor([w.num_starts for w in windows], device=device)
    kept = place <= starts[batch]
    batch, place, rows, draws = batch[kept], place[kept], rows[kept], draws[:, kept]
    accuracy, whole = [], 1.0
    for n in range(ORDERS):
        step, k = divmod(n, patch_size)
        accuracy.append(whole * right[batch, place + step, k])
        if k == patch_size - 1:
            whole = accuracy[-1]
    per_row = cache.storage.numel() * cache.storage.element_size() // len(windows)
    chunk = max(1, CACHE_BYTES // per_row)
    parts = zip(
        *(part.split(chunk) for part in (batch, place, rows)), draws.split(chunk, 1), strict=True
    )
    collision = torch.cat([_path_collisions(model, cache, seed, *part) for part in parts])
    return (2 * torch.stack(accuracy, -1) - collision).cpu()


def _path_collisions(
    model: Calm,
    cache: KVCache,
    seed: int,
    batch: Tensor,
    place: Tensor,
    rows: Tensor,
    draws: Tensor,
) -> Tensor:
    """Estimates of sum_x P(x_1..n)^2 for n = 1..4 over several patches of K < 4 tokens.

    The first draw of each patch is the path that is continued, as long as another draw agrees with
    it: an estimate is the product of the shares of draws that agree with the path and of the
    agreement of all pairs in the last patch.
    cache: of the teacher-forced windows.  batch, place: [R], window and patch.
    draws: [S, R, K] of that patch.
    returns: [R, 4] float64.
    """
    collision = torch.zeros(len(batch), ORDERS, dtype=torch.float64, device=batch.device)
    weight, alive = collision.new_ones(len(batch)), torch.arange(len(batch), device=batch.device)
    branch = None
    for n in range(0, ORDERS, model.config.patch_size):
        width = min(model.config.patch_size, ORDERS - n)
        collision[alive, n : n + width] = weight[:, None] * pair_agreement(draws)[:, :width]
        weight = weight * (draws[1:] == draws[:1]).all(-1).double().mean(0)
        kept = weight.nonzero().squeeze(1)
        if n + width == ORDERS or not len(kept):
            break
        alive, weight, path = alive[kept], weight[kept], draws[0, kept]
        if branch is None:
            branch = copy.copy(cache)
            branch.select(batch[alive])
            branch.lengths = place[alive]
        else:
            branch.advance(torch.ones_like(branch.lengths))
            branch.select(kept)
        hidden = model.hidden_states(path, branch)[:, 0]
        rows = rows[kept] + 1
        draws = _draw(model, hidden, len(draws), seed, rows)
    return collision


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(b, p) for p = 1 .. counts[b] of every b, in order: two [N]."""
    batch = torch.repeat_interleave(counts)
    ends = counts.cumsum(0)
    return batch, torch.arange(len(batch), device=counts.device) - (ends - counts)[batch] + 1


def _draw(model: Calm, hidden: Tensor, num_draws: int, seed: int, rows: Tensor) -> Tensor:
    """Decoded draws of the next patch: [S, R, K]."""
    parts = zip(hidden.split(ROWS_PER_CALL), rows.split(ROWS_PER_CALL), strict=True)
    return torch.cat(
        [model.ae_model.decode(model.sample(h, num_draws, seed, r)) for h, r in parts], 1
    )


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
