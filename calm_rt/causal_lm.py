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

    A context is read once, and three times more for each path.
    """
    terms = []
    for names, contexts, grams in _batches(windows, patch_size, batch_size):
        text = [torch.cat(pair) for pair in zip(contexts, grams[:, :-1], strict=True)]
        chances = _probabilities(model, text, ORDERS)  # [B, 4, V]
        accuracy = chances.gather(2, grams.to(chances.device)[..., None]).squeeze(2).cumprod(1)
        options = {"seed": seed, "stream": Stream.PROBE, "distribution": "uniform"}
        uniform = ops.noise(names, num_paths, ORDERS - 1, dtype=torch.float64, **options)
        paths = [_path(model, contexts, chances[:, 0], u.to(chances.device)) for u in uniform]
        terms.append((2 * accuracy - torch.stack(paths).mean(0)).cpu())
    return torch.cat(terms)


def _path(
    model: Callable[[Tensor], Any], contexts: list[Tensor], chances: Tensor, uniform: Tensor
) -> Tensor:
    """Estimates of C_1 to C_4 from one path after every context.

    chances: [B, V], of the first token.  uniform: [B, 3] in [0, 1).
    returns: [B, 4].
    """
    collisions = [chances.square().sum(1)]
    for u in uniform.T:
        cumulative = chances.square().cumsum(1)
        aim = u[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, aim, right=True).clamp(max=chances.shape[1] - 1)
        token = token.to(contexts[0].device)
        contexts = [torch.cat(pair) for pair in zip(contexts, token, strict=True)]
        chances = _probabilities(model, contexts, 1)[:, 0]
        collisions.append(chances.square().sum(1))
    return torch.stack(collisions, 1).cumprod(1)


def _probabilities(model: Callable[[Tensor], Any], texts: list[Tensor], count: int) -> Tensor:
    """Those of the token after each of the last `count` tokens of every text: [B, count, V]."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # on the right: nobody looks
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    logits = model(ids if parameter is None else ids.to(parameter.device))
    logits = getattr(logits, "logits", logits)
    fits = isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == ids.shape
    expected = f"logits [B, T, V] after ids {list(ids.shape)}, or an object with them as .logits"
    got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
    check(fits and logits.is_floating_point(), "model(ids)", expected, got)
    last = torch.tensor([len(text) for text in texts], device=logits.device)
    places = last[:, None] + torch.arange(-count, 0, device=logits.device)
    rows = torch.arange(len(texts), device=logits.device)[:, None]
    return logits[rows, places].double().softmax(-1)


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
