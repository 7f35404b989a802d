"""BrierLM of any causal language model, over the same n-grams as a CALM's.

A sampler draws n-grams, and all pairs of draws are compared. Where a model gives probabilities p
token by token, little is left to chance. P(y_1..n) is the product of p along the text, exact. The
collisions C_n(c) = sum_x P(x_1..n | c)^2 obey

    C_0 = 1,   C_n(c) = sum_x p(x | c)^2 C_(n-1)(c x) = C_1(c) E[C_(n-1)(c x)],   x ~ p^2 / C_1(c),

so along a path x_1, x_2, ... of such draws the product of C_1(c x_<i) over i = 1..n estimates C_n
without bias: exactly for n = 1, and for the others without draws that have to agree by chance.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from calm_rt import ops
from calm_rt.branches import Branches, Reader, reader_of, rows_for
from calm_rt.brier import ORDERS, Window, brier_from_predictions
from calm_rt.ops.check import check
from calm_rt.reference import Stream


@runtime_checkable
class Sampler(Protocol):
    """A language model that draws."""

    def draw(self, contexts: list[Tensor], num_draws: int) -> Tensor:
        """Independent draws of the next four tokens after every context.

        contexts: R of them, [T_r] int64 each.
        returns: [num_draws, R, 4] int64.
        """
        ...


def sampler_terms(
    sampler: Sampler, windows: list[Window], patch_size: int, num_draws: int, batch_size: int
) -> Tensor:
    """Estimates of Brier-1..4 at every start of the windows, from draws: [N, 4] float64."""
    terms = []
    for _, contexts, grams in _batches(windows, patch_size, batch_size):
        draws = sampler.draw(contexts, num_draws)
        shape = [num_draws, len(contexts), ORDERS]
        drawn = isinstance(draws, Tensor) and draws.dtype == torch.int64
        got = f"{list(draws.shape)} {draws.dtype}" if isinstance(draws, Tensor) else type(draws)
        check(drawn and list(draws.shape) == shape, "model.draw", f"{shape} torch.int64", got)
        terms.append(brier_from_predictions(draws.cpu(), grams.cpu()))
    return torch.cat(terms)


def model_terms(
    model: Callable[[Tensor], Any],
    windows: list[Window],
    patch_size: int,
    num_paths: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Estimates of Brier-1..4 at every start of the windows, from probabilities: [N, 4] float64.

    windows: the longest first.
    A window is read once. The three more tokens of each path cost a token each where the model
    takes a key-value cache (branches.CachedReader), their whole context where it does not.
    """
    reader = reader_of(model, windows[0].ids, batch_size)
    parts = (windows[i : i + batch_size] for i in range(0, len(windows), batch_size))
    return torch.cat([_terms(reader, part, patch_size, num_paths, seed) for part in parts])


def _terms(
    reader: Reader, windows: list[Window], patch_size: int, num_paths: int, seed: int
) -> Tensor:
    """Those of windows that are read together."""
    padded = torch.nn.utils.rnn.pad_sequence([w.ids for w in windows], batch_first=True)
    ids = padded.to(reader.device)  # [B, T], filled on the right: nobody looks
    starts = [(b, p) for b, w in enumerate(windows) for p in range(1, w.num_starts + 1)]
    owner, patch = torch.tensor(starts).T  # [N]
    names = torch.tensor([w.document << 32 | w.first for w in windows])[owner] + patch
    options = {"seed": seed, "stream": Stream.PROBE, "distribution": "uniform"}
    uniform = ops.noise(names, num_paths, ORDERS - 1, dtype=torch.float64, **options)
    uniform = uniform.movedim(0, 1).to(ids.device)  # [N, S, 3]
    owner, place = owner.to(ids.device), (patch * patch_size).to(ids.device)

    right = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)  # of the text's tokens
    collision = right.new_zeros(len(starts))  # C_1 at every start
    token = owner.new_zeros(len(starts), num_paths)  # the first of each path
    largest = int(padded.max())
    at = 1  # the place after the first token of a piece
    for logits in reader.read(ids):
        fits = largest < logits.shape[2]
        check(fits, "documents", f"token ids below the model's {logits.shape[2]}", largest)
        chances = logits.to(ids.device).double().softmax(-1)  # [B, n, V]
        wanted = ids[:, at : at + chances.shape[1]]
        here = chances[:, : wanted.shape[1]].gather(2, wanted[..., None]).squeeze(2)
        right[:, at : at + wanted.shape[1]] = here
        among = ((place >= at) & (place < at + chances.shape[1])).nonzero().squeeze(1)
        first = chances[owner[among], place[among] - at]  # [R, V]
        collision[among] = first.square().sum(1)
        token[among] = _choose(first, uniform[among, :, 0])
        at += chances.shape[1]
    orders = torch.arange(ORDERS, device=ids.device)
    accuracy = right[owner[:, None], place[:, None] + orders].cumprod(1)

    # neighbours in length go together: little padding, and the same number of each window
    path = place.argsort(stable=True).repeat_interleave(num_paths)
    draw = torch.arange(num_paths, device=ids.device).repeat(len(starts))
    size = rows_for(chances.shape[2])
    total = torch.zeros_like(accuracy)
    for i, s in zip(path.split(size), draw.split(size), strict=True):
        branches = reader.branch(owner[i], place[i])
        collisions = _path(branches, collision[i], token[i, s], uniform[i, s, 1:])
        total.index_add_(0, i, collisions)
    return (2 * accuracy - total / num_paths).cpu()


def _path(branches: Branches, collision: Tensor, token: Tensor, uniform: Tensor) -> Tensor:
    """Estimates of C_1 to C_4 from one path at each of R starts.

    collision: [R], C_1.  token: [R], the path's first.  uniform: [R, 2], for the next two.
    returns: [R, 4].
    """
    collisions = [collision]
    for step in range(ORDERS - 1):
        chances = branches.step(token).to(collision.device).double().softmax(-1)  # [R, V]
        collisions.append(chances.square().sum(1))
        if step < uniform.shape[1]:
            token = _choose(chances, uniform[:, step, None]).squeeze(1)
    return torch.stack(collisions, 1).cumprod(1)


def _choose(chances: Tensor, uniform: Tensor) -> Tensor:
    """Tokens drawn by the squares of their chances.

    chances: [R, V].  uniform: [R, S] in [0, 1).
    returns: [R, S].
    """
    cumulative = chances.square().cumsum(1)
    aim = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, aim, right=True).clamp(max=chances.shape[1] - 1)


def _batches(
    windows: list[Window], patch_size: int, batch_size: int
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Row ids [B], contexts and next four tokens [B, 4] of all starts, in order."""
    starts = [
        (window, patch * patch_size)
        for window in windows
        for patch in range(1, window.num_starts + 1)
    ]
    for first in range(0, len(starts), batch_size):
        part = starts[first : first + batch_size]
        names = [w.document << 32 | (w.first + at // patch_size) for w, at in part]
        grams = torch.stack([w.ids[at : at + ORDERS] for w, at in part])
        yield torch.tensor(names), [w.ids[:at] for w, at in part], grams
