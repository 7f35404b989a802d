"""What `generate` of official language models becomes: `calm_rt.Generator`, under its signature."""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from calm_rt.generation import Generator
from calm_rt.nn import CalmConfig
from calm_rt.official_models import current
from calm_rt.ops.check import check, check_int, check_tensor
from calm_rt.patched import active, choosing_seed, read_temperature
from calm_rt.sampling import MAX_DRAWS


@torch.compiler.disable
@torch.no_grad()
def generate(
    self: nn.Module,
    input_ids: Tensor,
    max_length: int | None = 2048,
    temperature: float | None = 0.5,
    *,
    max_new_tokens: int | None = None,
    num_samples: int | None = None,
    num_candidates: int | None = None,
    method: str = "pool",
    max_draws: int = MAX_DRAWS,
    on_budget: str = "raise",
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """`CALM.generate`, also with a number of new tokens, a pool size, exact sampling and a seed.

    input_ids: [B, T] int64; pad ids at the ends of a row are no part of its prompt.
    max_length: of prompt and continuation in tokens, unless max_new_tokens is given.
    num_samples, num_candidates: two names, the official and ours, of the pool's size, 200.
    method, max_draws, on_budget: see `sample_patches`.
    seed: None takes one from torch's generator.
    kwargs: accepted as by the official code, which reads none either; a warning names them.
    returns: [B, longest] int64: prompt, continuation up to EOS, and pad ids.
    raises: as Generator.generate, also beyond max_position_embeddings patches.
    """
    patch = active(self, "generate")
    if patch is None:
        options = kwargs | {"max_length": max_length, "temperature": temperature}
        return type(self).generate(self, input_ids, **options)
    if kwargs:
        names = ", ".join(sorted(kwargs))
        warnings.warn(f"generate: nothing reads {names}", stacklevel=_level_of_caller())
    both = num_samples is not None and num_candidates is not None
    check(not both, "num_candidates", "None beside num_samples, its other name", num_candidates)
    pool = next((n for n in (num_samples, num_candidates) if n is not None), 200)
    check_tensor("input_ids", input_ids)
    check(input_ids.ndim == 2, "input_ids", "shape [B, T]", list(input_ids.shape))
    whole = not (input_ids.is_floating_point() or input_ids.is_complex())
    check(whole, "input_ids", "token ids, int64", input_ids.dtype)
    self.eval()
    view, eos = current(patch.model), self.eos_token_id
    pad, size, length = self.padding_idx, self.patch_size, input_ids.shape[1]
    if eos is not None:
        eos = check_int("model.eos_token_id", eos, -(2**63))
        eos = eos if 0 <= eos < view.config.vocab_size else None  # which no token is
    view.config.eos_token_id = eos  # the official code does not look into its configuration either
    if max_new_tokens is None:
        limit, wanted = "max_length", "a number of tokens, or max_new_tokens instead"
        check(max_length is not None, "max_length", wanted, max_length)
        max_length = check_int("max_length", max_length, 0)
        max_new_tokens = max(0, max_length - length)
        if "overshot_length" in patch.keep_bugs:
            missing = max_length - length - -length % size  # behind the prompt's whole patches
            max_new_tokens = max(1, -(-missing // size)) * size
    else:
        limit, max_new_tokens = "max_new_tokens", check_int("max_new_tokens", max_new_tokens, 0)
    padded = "prompt_padding" in patch.keep_bugs
    given = prompts = [_without_ends(row, pad) for row in input_ids.tolist()]
    if padded:
        check(pad is not None, "prompt_padding", "a pad_token_id in the config", pad)
        prompts = [row + [pad] * (-length % size) for row in input_ids.tolist()]
    if prompts:
        _check_length(limit, max(map(len, prompts)), max_new_tokens, view.config)
    value = read_temperature(patch, temperature, method)
    if seed is None:
        seed = int(choosing_seed(patch, torch.device("cpu"), value))
    generations = Generator(view).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_candidates=pool,
        method=method,
        max_draws=max_draws,
        on_budget=on_budget,
        seed=seed,
    )
    if not given:
        return input_ids.clone()
    rows = [prompt + g.ids for prompt, g in zip(given, generations, strict=True)]
    if padded:
        rows = [[token for token in row if token != pad] for row in rows]
    rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
    fill = next((i for i in (pad, eos) if i is not None), 0)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return padded.to(input_ids.device)


def _without_ends(row: list[int], pad: int | None) -> list[int]:
    """Without pad ids at either end; inside they may be the EOS of documents."""
    real = [index for index, token in enumerate(row) if token != pad]
    return row[real[0] : real[-1] + 1] if real else []


def _check_length(name: str, longest: int, new: int, config: CalmConfig) -> None:
    """name: of the argument that asks for so many new tokens behind the longest prompt."""
    size, most = config.patch_size, config.max_position_embeddings
    patches = max(1, -(-longest // size)) - (-new // size)  # the prompt's own are filled up
    expected = f"at most max_position_embeddings = {most} patches of {size} tokens with the prompt"
    check(patches <= most, name, expected, patches)


def _level_of_caller() -> int:
    """What `stacklevel` is for whoever calls a function behind torch's decorators."""
    frame, level = sys._getframe(2), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("torch."):
        frame, level = frame.f_back, level + 1
    return level
