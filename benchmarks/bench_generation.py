"""The choice of the next patch at T = 1/2 from a pool of 200, at the size of CALM-M.

    pytest benchmarks -k selection
    python benchmarks/bench_generation.py [--plot FILE] [--model MODEL] [--json FILE]
    python benchmarks/bench_generation.py --record MODEL SHARDS

`official` is the official code's formulas in eager PyTorch: the head on 200 copies of the context,
the decoder on all latent vectors, all logits, argmax, a Counter on the host. `native` is
sample_patches, `tuples first` the same with tuples_first, as a Generator calls it once tuples have
decided enough of its steps. All run head and decoder of the official sizes on random weights, and
then decode planted latent vectors, so that the pools are those that a small trained model drew
("real", benchmarks/pools.npz, one after the other) or have no patch twice ("without repeats"). What
a lazy pool saves depends on its entropy: --plot times and draws that, pool by pool. --model times
whole steps of a trained model instead, the quickstart's for example: against the official formulas
on the same backbone, and a batch against its sequences one by one.
"""

import argparse
import io
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from json_rows import (
    check_writable,
    conditions,
    duel_text,
    medians,
    model_and_shards,
    run,
    write_rows,
)
from matplotlib.figure import Figure
from torch import Tensor

from calm_rt import official, ops, pool
from calm_rt.arguments import load_model
from calm_rt.atomic import replace
from calm_rt.benchmark import compete
from calm_rt.generation import Generator
from calm_rt.nn import Calm, KVCache
from calm_rt.ops.check import check, check_int
from calm_rt.planted import CANDIDATES, PATCH, VOCABULARY, PlantedCalm
from calm_rt.sampling import PatchSample, sample_patches
from calm_rt.sequence import start_id
from calm_rt.steps import step_rows

POOLS = Path(__file__).with_name("pools.npz")
RECORDED = 64  # pools in the file
NEW_TOKENS, BATCH_SIZE = 64, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 15


def real_pools() -> Tensor:
    """What a small trained model drew, its tokens spread over the vocabulary.  [P, S, K]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(VOCABULARY, generator=generator)
    with np.load(POOLS) as recorded:
        return ids[torch.from_numpy(recorded["tokens"].astype(np.int64))]


def pools_without_repeats() -> Tensor:
    """No token twice in a slot.  [P, S, K]."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * CANDIDATES * PATCH
    return torch.randperm(VOCABULARY, generator=generator)[:count].view(4, CANDIDATES, PATCH)


KINDS = {"real": real_pools, "without repeats": pools_without_repeats}


def select_tuples_first(model: PlantedCalm, pools: Iterator[Tensor]) -> PatchSample:
    """What is timed as `tuples first`.

    pools: latent vectors [S, L] each, of which a choice takes one, whole or its first draws alone.
    """
    latents, usual = next(pools), model.turns["native"]
    model.turns["native"] = itertools.repeat(latents)

    def sample(hidden: Tensor, count: int, *rest: Any) -> Tensor:
        return PlantedCalm.sample(model, hidden, count, *rest)[:count]

    model.sample = sample
    try:
        options = {"temperature": "1/2", "num_candidates": CANDIDATES, "tuples_first": True}
        return sample_patches(model, model.hidden(), **options)
    finally:
        del model.sample
        model.turns["native"] = usual


def measure(model: PlantedCalm, rounds: int) -> dict[str, list[float]]:
    """Seconds of a choice, the rivals on the same pools in turns."""
    with torch.no_grad():
        decoded = ops.decode(model.latents[0], model.ae_model.decoder.weights())
    assert torch.equal(decoded, model.pools[0])  # else these are not the pools that are named
    pools = itertools.cycle(model.latents)
    calls = {
        "official": model.select_officially,
        "native": model.select,
        "tuples first": lambda: select_tuples_first(model, pools),
    }
    return compete(calls, "cpu", rounds)


def selection_rows(kind: str, dtype: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return step_rows("selection", f"selection-{kind}-{dtype}", name, times)


def entropy(tokens: Tensor) -> float:
    """Of the patches of a pool, in bits.  tokens: [S, K]."""
    shares = tokens.unique(dim=0, return_counts=True)[1].double() / len(tokens)
    return float(-(shares * shares.log2()).sum())


def by_entropy(model: PlantedCalm, rounds: int) -> list[dict[str, float]]:
    """For every pool: entropy, share of the tokens that were decoded, here and if passes over the
    vocabulary cost nothing, milliseconds, those of `tuples first`, and whether a tuple decided."""
    rows = []
    for tokens, latents in zip(model.pools, model.latents, strict=True):
        model.turns["native"] = itertools.cycle([latents])
        one = itertools.repeat(latents)
        calls = {"native": model.select, "first": lambda one=one: select_tuples_first(model, one)}
        times = compete(calls, "cpu", rounds)
        price = pool.PASS_ROWS["cpu"]
        shares = {}
        for name, pass_rows in (("decoded", price), ("slot by slot", -1)):
            pool.PASS_ROWS["cpu"] = pass_rows
            shares[name] = int(model.select().slots) / (CANDIDATES * PATCH)
        pool.PASS_ROWS["cpu"] = price
        sure = bool(select_tuples_first(model, one).sure)
        row = {"bits": entropy(tokens), **shares, "sure": sure}
        for name, rival in (("ms", "native"), ("tuples first ms", "first")):
            row[name] = 1e3 * statistics.median(times[rival])
        rows.append(row)
    return sorted(rows, key=lambda row: row["bits"])


def table(rows: list[dict[str, float]], official_ms: float) -> str:
    lines = ["  entropy   decoded   slot by slot   time      official / native   tuples first"]
    lines += [
        f"{row['bits']:6.2f} bit {row['decoded']:8.0%} {row['slot by slot']:12.0%} "
        f"{row['ms']:9.1f} ms {official_ms / row['ms']:12.1f} x "
        f"{official_ms / row['tuples first ms']:13.1f} x{' sure' if row['sure'] else ''}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, float]], official_ms: float, title: str) -> Figure:
    """Share of the arithmetic and speed over a pool's entropy."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bits = [row["bits"] for row in rows]
    for name, mark in (("decoded", "o"), ("slot by slot", "x")):
        left.plot(bits, [row[name] for row in rows], mark, label=name)
    left.set(ylim=(0, 1.05), ylabel="share of the tokens that are decoded")
    left.legend()
    for name, key, mark in (("native", "ms", "o"), ("tuples first", "tuples first ms", "x")):
        right.plot(bits, [official_ms / row[key] for row in rows], mark, label=name)
    right.set(ylim=(0, None), ylabel="official / time")
    right.legend()
    for axis in (left, right):
        axis.set(xlabel="entropy of the pool, bits")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=8)
    return figure


@torch.no_grad()
def write_officially(model: Calm, num_patches: int) -> list[list[int]]:
    """The official loop at T = 1/2 after an empty prompt, on our backbone with its cache."""
    head, decoder = model.generative_head.weights(), model.ae_model.decoder.weights()
    cache = KVCache(model.config, 1, num_patches)
    patch, written = torch.full((1, model.config.patch_size), start_id(model.config)), []
    for _ in range(num_patches):
        hidden = model.hidden_states(patch, cache)[:, -1]
        cache.advance(torch.ones(1, dtype=torch.int64))
        latents = official.sample_latents(hidden, head, num_samples=CANDIDATES)
        tokens = official.decode(latents[:, 0], decoder)  # [S, K]
        patch = official.select_patch(tokens[None], n=2)  # [1, K]
        written.append(patch[0].tolist())
    return written


def measure_steps(folder: str, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of NEW_TOKENS tokens of a trained model, alone and in a batch."""
    model = load_model(folder, Calm, "cpu")
    generator = Generator(model)
    options = {"max_new_tokens": NEW_TOKENS, "num_candidates": CANDIDATES}

    def write(names: list[int], temperature: str) -> None:
        settings = {"sequence_ids": names, "temperature": temperature, **options}
        generator.generate([[]] * len(names), **settings)

    names = list(range(BATCH_SIZE))

    def batch(temperature: str) -> dict[str, Callable[[], Any]]:
        return {
            "one by one": lambda: [write([name], temperature) for name in names],
            "native": lambda: write(names, temperature),
        }

    num_patches = -(-NEW_TOKENS // model.config.patch_size)
    duels = {
        f"{NEW_TOKENS} tokens": {
            "official": lambda: write_officially(model, num_patches),
            "native": lambda: write([0], "1/2"),
        },
        f"{BATCH_SIZE} sequences of {NEW_TOKENS} tokens": batch("1/2"),
        f"{BATCH_SIZE} sequences of {NEW_TOKENS} tokens at temperature 1": batch("1"),
    }
    for title, calls in duels.items():
        times = compete(calls, "cpu", rounds)
        dtype = str(model.transformer.norm.weight.dtype).removeprefix("torch.")
        yield step_rows("generation", title, dtype, times, model=Path(folder).name)


@torch.no_grad()
def record(folder: str, shards: str) -> None:
    """Writes the pools of a trained model after held-out text."""
    model, data = model_and_shards(folder, shards)
    ids = next(iter(data.held_out_batches(16, 128, limit=1)))
    hidden = model.hidden_states(ids).flatten(0, 1)  # [R, H]
    places = torch.linspace(0, len(hidden) - 1, RECORDED).long()
    latents = model.sample(hidden[places], CANDIDATES, 0)  # [S, P, L]
    tokens = model.ae_model.decode(latents).transpose(0, 1)  # [P, S, K]
    array = tokens.numpy().astype(np.uint16)
    with io.BytesIO() as data:  # numpy gives a path another ending
        np.savez_compressed(data, tokens=array)
        replace(POOLS, lambda temporary: temporary.write_bytes(data.getvalue()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_selection(kind: str, dtype: str, capsys) -> None:
    rows = selection_rows(kind, dtype, measure(PlantedCalm(KINDS[kind](), DTYPES[dtype]), ROUNDS))
    with capsys.disabled():
        print(f"\n{duel_text(f'selection, {kind}, {dtype}', medians(rows), 'native')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--plot", metavar="FILE", help="also time every real pool, and draw that")
    parser.add_argument("--model", help="a trained model's folder: time whole steps of it instead")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and their conditions")
    parser.add_argument("--record", nargs=2, metavar=("MODEL", "SHARDS"), help="and do no more")
    options = parser.parse_args()
    if options.record:
        record(*options.record)
        return
    check_int("rounds", options.rounds, 1)
    pools_alone = options.plot is None or options.model is None
    check(pools_alone, "plot", "none with --model: it is of pools", options.plot)
    for name in ("json", "plot"):
        check_writable(name, getattr(options, name))
    kinds = Figure().canvas.get_supported_filetypes()
    drawn = options.plot is None or Path(options.plot).suffix[1:] in ("", *kinds)
    check(drawn, "plot", f"a file that ends in one of {', '.join(kinds)}", options.plot)
    where, rows = conditions(), []
    if options.model:
        for measured in measure_steps(options.model, options.rounds):
            rows += measured
            write_rows(options.json, where, rows)
            title = f"{measured[0]['case']} of {options.model}"
            print(duel_text(title, medians(measured), "native"), flush=True)
        return
    for name, dtype in DTYPES.items():
        for kind, pools in KINDS.items():
            model = PlantedCalm(pools(), dtype)
            measured = selection_rows(kind, name, measure(model, options.rounds))
            rows += measured
            write_rows(options.json, where, rows)
            times = medians(measured)
            title = f"selection, {kind}, {name}"
            text = duel_text(title, times, "native")
            print(text, flush=True)
            if options.plot and kind == "real":
                where[f"pools of {name}"] = by_entropy(model, 3)
                write_rows(options.json, where, rows)
                print(table(where[f"pools of {name}"], times["official"]), flush=True)
                path = Path(options.plot)
                path = path.with_stem(f"{path.stem}-{name}")
                draw(where[f"pools of {name}"], times["official"], text).savefig(path, dpi=150)


if __name__ == "__main__":
    run(main)
