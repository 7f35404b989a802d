"""How well a model goes on after prompts of any length: three ways to treat left-over tokens.

    python benchmarks/bench_prompts.py MODEL SHARDS [--prompts N] [--json FILE]

A prompt seldom ends where a patch does. `constrain` keeps the r left-over tokens as known ones of
the next patch, `align` fills the first patch with BOS, `padded` fills the last one with the padding
id, as the official code does. Measured are Brier-1 to Brier-4 and BrierLM of the four tokens behind
the prompt (the next patch of K = 4) on held-out text, from all pairs of draws at temperature 1, for
every r = length mod K, with 95 % intervals over documents, and how much better than `padded` each
way is on the same prompts. The longer the model was trained, the more there is to see: that of
benchmarks/results is the quickstart's of five minutes.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from json_rows import check_writable, conditions, model_and_shards, run, write_rows
from torch import Tensor

from calm_rt.brier import ORDERS, bootstrap, brier_from_predictions, interval, score, sums_by_owner
from calm_rt.nn import Calm, KVCache, screen_decoder
from calm_rt.ops.check import check, check_int
from calm_rt.sampling import sample_patches
from calm_rt.sequence import start_id

WAYS = ("constrain", "align", "padded")
WHOLE = "whole"  # without left-over tokens all ways are the same
NUM_DRAWS, NUM_CANDIDATES, MAX_DRAWS = 16, 200, 2000
CONTEXT, APART, LONGEST = 64, 160, 1600  # tokens: of a prompt; between prompts; of a document used
NUM_BOOTSTRAP = 1000


class Scores(NamedTuple):
    """Of the prompts of one way and one r, in the order of the pieces."""

    owners: np.ndarray  # [N], the document of each
    terms: np.ndarray  # [N, 4] float64, unbiased estimates of Brier-1 to Brier-4


@torch.no_grad()
def prompt_scores(
    model: Calm,
    pieces: Sequence[Tensor],
    lengths: Sequence[int],
    num_draws: int = NUM_DRAWS,
    owners: Sequence[int] | None = None,
) -> dict[tuple[str, int], Scores]:
    """Brier scores of the tokens behind each prompt, by (way, r).

    pieces: [tokens] each, from the start of a patch on; those with four tokens behind the prompt
        count.
    lengths: tokens of a prompt.
    owners: the document of each piece; None for one of its own.
    """
    found: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
    for name, piece in enumerate(pieces):
        for length in lengths:
            left = length % model.config.patch_size
            if len(piece) < length + ORDERS or length - left == 0:
                continue
            prompt, target = piece[:length], piece[length : length + ORDERS]
            owner = name if owners is None else owners[name]
            for way in WAYS if left else (WHOLE,):
                tokens = _next_tokens(model, prompt, way, num_draws, name)  # [S, 4]
                terms = brier_from_predictions(tokens[:, None], target[None])[0]
                found.setdefault((way, left), []).append((owner, terms))
    return {
        key: Scores(
            np.array([owner for owner, _ in pairs]), torch.stack([t for _, t in pairs]).numpy()
        )
        for key, pairs in found.items()
    }


def _next_tokens(model: Calm, prompt: Tensor, way: str, num_draws: int, name: int) -> Tensor:
    """Draws of the tokens behind a prompt, each going on from its own: [S, 4]."""
    size, config = model.config.patch_size, model.config
    left = len(prompt) % size
    prefix, known = None, 0
    if way == "constrain":
        free = prompt.new_full((size - left,), -1)
        prefix, known = torch.cat([prompt[-left:], free]).expand(num_draws, -1), left
        prompt = prompt[:-left]
    elif way == "align":
        prompt = torch.cat([prompt.new_full((size - left,), start_id(config)), prompt])
    elif way == "padded":
        prompt = torch.cat([prompt, prompt.new_full((size - left,), config.pad_token_id or 0)])
    steps = -(-(known + ORDERS) // size)
    cache = KVCache(config, 1, len(prompt) // size + steps, model.transformer.norm.weight.dtype)
    hidden = model.hidden_states(prompt[None], cache)[:, -1].expand(num_draws, -1)
    cache.advance(torch.tensor([len(prompt) // size]))
    cache.select(torch.zeros(num_draws, dtype=torch.int64))
    options, patches = {"num_candidates": NUM_CANDIDATES, "max_draws": MAX_DRAWS}, []
    for step in range(steps):
        if step:
            hidden = model.hidden_states(patches[-1], cache)[:, -1]
            cache.advance(torch.ones(num_draws, dtype=torch.int64))
        rows = name << 32 | torch.arange(num_draws) + step * num_draws
        with warnings.catch_warnings():  # where no draw begins with the known tokens
            warnings.simplefilter("ignore")
            drawn = sample_patches(model, hidden, prefix=prefix, rows=rows, **options)
        patches.append(drawn.patches)
        prefix = None
    return torch.cat(patches, 1)[:, known : known + ORDERS]


def summary(scores: dict[tuple[str, int], Scores]) -> list[dict[str, Any]]:
    """A row for each r and way; `better` is the interval of what its BrierLM is above `padded`'s,
    and better_brier the same of Brier-1 to Brier-4, both documents drawn together."""
    rows = []
    resampled = {
        key: bootstrap(*sums_by_owner(part.terms, part.owners), NUM_BOOTSTRAP, seed=0)
        for key, part in scores.items()
    }
    for (way, left), part in sorted(scores.items(), key=lambda item: (item[0][1], item[0][0])):
        brier, draws = part.terms.mean(0), resampled[way, left]
        row = {"r": left, "way": way, "brierlm": float(score(brier))}
        row["brierlm_interval"] = interval(score(draws))
        row |= {"brier": brier.tolist(), "brier_intervals": [interval(one) for one in draws.T]}
        if left and way != "padded":
            padded = resampled["padded", left]
            row["better"] = interval(score(draws) - score(padded))
            row["better_brier"] = [interval(one) for one in (draws - padded).T]
        rows.append(row | {"prompts": len(part.terms), "documents": len(set(part.owners.tolist()))})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    titles = ["BrierLM", *(f"Brier-{n}" for n in range(1, ORDERS + 1))]
    lines = ["r  way        " + "".join(f"{title:26}" for title in titles) + "prompts"]
    for row in rows:
        values = [row["brierlm"], *row["brier"]]
        bounds = [row["brierlm_interval"], *row["brier_intervals"]]
        cells = "".join(f"{_cell(*pair):26}" for pair in zip(values, bounds, strict=True))
        lines.append(f"{row['r']}  {row['way']:10} {cells}{row['prompts']}")
    for row in rows:
        if "better" in row:
            above, first = _range(row["better"]), _range(row["better_brier"][0])
            lines.append(
                f"r {row['r']}, {row['way']} above padded: BrierLM {above}, Brier-1 {first}"
            )
    return "\n".join(lines)


def _cell(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:.3f} ({_range(bounds)})"


def _range(bounds: tuple[float, float]) -> str:
    return " to ".join(f"{bound:.3f}" for bound in bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a CALM")
    parser.add_argument("data", help="folder of token shards")
    parser.add_argument("--prompts", type=int, default=250, help="of each length (default: 250)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and their conditions")
    options = parser.parse_args()
    check_int("prompts", options.prompts, 1)
    check_writable("json", options.json)
    where = conditions()
    model, shards = model_and_shards(options.model, options.data)
    screen_decoder(model.ae_model)
    size = model.config.patch_size
    starts = range(APART - APART % size, LONGEST, APART - APART % size)  # not a document's head
    pieces = [
        (owner, document[at:])
        for owner, document in enumerate(shards.held_out_documents())
        for at in starts
        if len(document) >= at + APART
    ]
    expected = f"a held-out document of {starts[0] + APART} tokens or more"
    check(bool(pieces), "data", expected, "none")
    # spread over the documents, whatever their number
    places = np.linspace(0, len(pieces) - 1, min(options.prompts, len(pieces))).astype(int)
    owners, texts = zip(*(pieces[place] for place in places), strict=True)
    length = CONTEXT - CONTEXT % size
    lengths = range(length, length + size)
    rows = summary(prompt_scores(model, texts, lengths, owners=owners))
    where |= {"model": Path(options.model).name, "patch_size": size, "prompt_tokens": [*lengths]}
    where |= {"draws": NUM_DRAWS, "candidates": NUM_CANDIDATES, "max_draws": MAX_DRAWS}
    write_rows(options.json, where, rows)
    print(table(rows))


if __name__ == "__main__":
    run(main)
