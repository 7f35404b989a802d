"""The choice of the next patch at T = 1/2 from a pool of 200, at the size of CALM-M.

    pytest benchmarks -k selection
    python benchmarks/bench_generation.py [--plot FILE] [--model MODEL] [--record MODEL SHARDS]

`official` is the official code's formulas in eager PyTorch: the head on 200 copies of the context,
the decoder on all latent vectors, all logits, argmax, a Counter on the host. `native` is
sample_patches. Both run head and decoder of the official sizes on random weights, and then decode
planted latent vectors, so that the pools are those that a small trained model drew ("real",
benchmarks/pools.npz, one after the other) or have no patch twice ("without repeats"). What a lazy
pool saves depends on its entropy: --plot times and draws that, pool by pool. --model times whole
steps of a trained model instead, the quickstart's for example: against the official formulas on the
same backbone, and a batch against its sequences one by one.
"""

import argparse
import io
import itertools
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import calm_rt
from calm_rt import official, ops, pool
from calm_rt.atomic import replace
from calm_rt.benchmark import compete
from calm_rt.data import TokenShards
from calm_rt.generation import Generator
from calm_rt.nn import Calm, KVCache
from calm_rt.planted import CANDIDATES, PATCH, VOCABULARY, PlantedCalm
from calm_rt.report import duel_text
from calm_rt.sequence import start_id

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


def measure(model: PlantedCalm, rounds: int) -> dict[str, float]:
    """Median milliseconds of a choice, the rivals on the same pools in turns."""
    with torch.no_grad():
        decoded = ops.decode(model.latents[0], model.ae_model.decoder.weights())
    assert torch.equal(decoded, model.pools[0])  # else these are not the pools that are named
    times = compete({"official": model.select_officially, "native": model.select}, "cpu", rounds)
    return {rival: 1e3 * statistics.median(values) for rival, values in times.items()}


def entropy(tokens: Tensor) -> float:
    """Of the patches of a pool, in bits.  tokens: [S, K]."""
    shares = tokens.unique(dim=0, return_counts=True)[1].double() / len(tokens)
    return float(-(shares * shares.log2()).sum())


def by_entropy(model: PlantedCalm, rounds: int) -> list[dict[str, float]]:
    """For every pool: entropy, share of the tokens that were decoded, here and if passes over the
    vocabulary cost nothing, and milliseconds."""
    rows = []
    for tokens, latents in zip(model.pools, model.latents, strict=True):
        model.turns["native"] = itertools.cycle([latents])
        times = compete({"native": model.select}, "cpu", rounds)["native"]
        price = pool.PASS_ROWS["cpu"]
        shares = {}
        for name, pass_rows in (("decoded", price), ("slot by slot", -1)):
            pool.PASS_ROWS["cpu"] = pass_rows
            shares[name] = int(model.select().slots) / (CANDIDATES * PATCH)
        pool.PASS_ROWS["cpu"] = price
        rows.append({"bits": entropy(tokens), **shares, "ms": 1e3 * statistics.median(times)})
    return sorted(rows, key=lambda row: row["bits"])


def table(rows: list[dict[str, float]], official_ms: float) -> str:
    lines = ["  entropy   decoded   slot by slot   time        official / native"]
    lines += [
        f"{row['bits']:6.2f} bit {row['decoded']:8.0%} {row['slot by slot']:12.0%} "
        f"{row['ms']:9.1f} ms {official_ms / row['ms']:12.1f} x"
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
    right.plot(bits, [official_ms / row["ms"] for row in rows], "o")
    right.set(ylim=(0, None), ylabel="official / native time")
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


def measure_steps(folder: str, rounds: int) -> None:
    """Prints what NEW_TOKENS tokens of a trained model take, alone and in a batch."""
    model = calm_rt.load(folder)
    generator = Generator(model)
    options = {"max_new_tokens": NEW_TOKENS, "temperature": "1/2", "num_candidates": CANDIDATES}

    def write(*names: int) -> None:
        generator.generate([[]] * len(names), sequence_ids=names, **options)

    def write_one_by_one() -> None:
        for name in range(BATCH_SIZE):
            write(name)

    num_patches = -(-NEW_TOKENS // model.config.patch_size)
    duels = {
        f"{NEW_TOKENS} tokens": {
            "official": lambda: write_officially(model, num_patches),
            "native": lambda: write(0),
        },
        f"{BATCH_SIZE} sequences of {NEW_TOKENS} tokens": {
            "one by one": write_one_by_one,
            "native": lambda: write(*range(BATCH_SIZE)),
        },
    }
    for title, calls in duels.items():
        times = compete(calls, "cpu", rounds)
        medians = {rival: 1e3 * statistics.median(values) for rival, values in times.items()}
        print(duel_text(f"{title} of {folder}", medians, "native"), flush=True)


@torch.no_grad()
def record(folder: str, shards: str) -> None:
    """Writes the pools of a trained model after held-out text."""
    model, data = calm_rt.load(folder), TokenShards(shards)
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
    times = measure(PlantedCalm(KINDS[kind](), DTYPES[dtype]), ROUNDS)
    with capsys.disabled():
        print(f"\n{duel_text(f'selection, {kind}, {dtype}', times, 'native')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--plot", metavar="FILE", help="also time every real pool, and draw that")
    parser.add_argument("--model", help="a trained model's folder: time whole steps of it instead")
    parser.add_argument("--record", nargs=2, metavar=("MODEL", "SHARDS"), help="and do no more")
    options = parser.parse_args()
    if options.record:
        record(*options.record)
        return
    if options.model:
        measure_steps(options.model, options.rounds)
        return
    for name, dtype in DTYPES.items():
        for kind, pools in KINDS.items():
            model = PlantedCalm(pools(), dtype)
            times = measure(model, options.rounds)
            title = f"selection, {kind}, {name}"
            text = duel_text(title, times, "native")
            print(text, flush=True)
            if options.plot and kind == "real":
                rows = by_entropy(model, 3)
                print(table(rows, times["official"]), flush=True)
                path = Path(options.plot)
                path = path.with_stem(f"{path.stem}-{name}")
                draw(rows, times["official"], text).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
