"""How well a model goes on after prompts of any length: three ways to treat a left-over token.

    python benchmarks/bench_prompts.py runs/quickstart runs/quickstart/data

A prompt seldom ends where a patch does. `constrain` keeps the r left-over tokens as known ones of
the next patch, `align` fills the first patch with BOS, `padded` fills the last one with the padding
id, as the official code does. Measured is Brier-1 of the token behind the prompt on held-out text,
from all pairs of draws at temperature 1, by r, with its standard error over documents.
"""

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import calm_rt
from calm_rt.brier import brier_from_predictions
from calm_rt.data import TokenShards
from calm_rt.nn import Calm
from calm_rt.sampling import sample_patches
from calm_rt.sequence import start_id

WAYS = ("constrain", "align", "padded")
NUM_DRAWS, NUM_CANDIDATES, MAX_DRAWS = 16, 200, 2000
CONTEXT, APART, LONGEST = 64, 160, 1600  # tokens: of a prompt; between prompts; of a document used


@torch.no_grad()
def prompt_scores(
    model: Calm, documents: Sequence[Tensor], lengths: Sequence[int], num_draws: int = NUM_DRAWS
) -> dict[tuple[str, int], Tensor]:
    """Brier-1 of the token behind each prompt: {(way, r): [N] float64}, a document each.

    documents: [tokens] each, from the start of a patch on; those longer than the prompt count.
    lengths: tokens of a prompt.
    """
    scores: dict[tuple[str, int], list[Tensor]] = {}
    for name, document in enumerate(documents):
        for length in lengths:
            left = length % model.config.patch_size
            if len(document) <= length or length - left == 0:
                continue
            prompt, target = document[:length], document[length : length + 1]
            for way in WAYS if left else WAYS[:1]:  # without left-over tokens all are the same
                tokens = _next_tokens(model, prompt, way, num_draws, name)  # [S, 1, 1]
                score = brier_from_predictions(tokens, target[None])[0]
                scores.setdefault((way, left), []).append(score)
    return {key: torch.cat(values) for key, values in scores.items()}


def _next_tokens(model: Calm, prompt: Tensor, way: str, num_draws: int, name: int) -> Tensor:
    """Draws of the token behind a prompt: [S, 1, 1]."""
    size, config = model.config.patch_size, model.config
    left = len(prompt) % size
    rows = name << 32 | torch.arange(num_draws)
    prefix = None
    if left and way == "constrain":
        known = torch.cat([prompt[-left:], prompt.new_full((size - left,), -1)])
        prompt, prefix = prompt[:-left], known.expand(num_draws, -1)
    elif left and way == "align":
        prompt = torch.cat([prompt.new_full((size - left,), start_id(config)), prompt])
    elif left:
        prompt = torch.cat([prompt, prompt.new_full((size - left,), config.pad_token_id or 0)])
    hidden = model.hidden_states(prompt[None])[:, -1].expand(num_draws, -1)
    options = {"num_candidates": NUM_CANDIDATES, "max_draws": MAX_DRAWS, "rows": rows}
    with warnings.catch_warnings():  # where no draw begins with the known tokens
        warnings.simplefilter("ignore")
        patches = sample_patches(model, hidden, prefix=prefix, **options).patches
    place = left if prefix is not None else 0
    return patches[:, None, place : place + 1]


def table(scores: dict[tuple[str, int], Tensor]) -> str:
    lines = ["r   way         Brier-1         prompts"]
    for (way, left), values in sorted(scores.items(), key=lambda item: (item[0][1], item[0][0])):
        error = values.std() / len(values) ** 0.5
        lines.append(f"{left}   {way:10} {values.mean():6.3f} ± {error:5.3f} {len(values):8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a CALM")
    parser.add_argument("data", help="folder of token shards")
    parser.add_argument("--prompts", type=int, default=250, help="of each length (default: 250)")
    options = parser.parse_args()
    model, shards = calm_rt.load(options.model), TokenShards(options.data)
    size = model.config.patch_size
    starts = range(APART - APART % size, LONGEST, APART - APART % size)  # not a document's head
    pieces = [d[at:] for d in shards.held_out_documents() for at in starts if len(d) >= at + APART]
    length = CONTEXT - CONTEXT % size
    print(table(prompt_scores(model, pieces[: options.prompts], range(length, length + size))))


if __name__ == "__main__":
    main()
