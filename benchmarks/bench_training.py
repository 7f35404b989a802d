"""One training step of a small CALM and of its autoencoder: official, compiled and native; those
of the quickstart with kernels and without, and how long its autoencoder takes to its target.

    pytest benchmarks -k test_training_step
    pytest benchmarks -k quickstart
    python benchmarks/bench_training.py [--profile] [--json FILE]

What a step is, and what the rivals run, stands in calm_rt/steps.py; they take turns round by round.
`calm-rt bench` measures the same steps beside the ops, with their memory.
"""

import argparse
import time
from typing import Any

import pytest
import torch
from json_rows import check_writable, conditions, duel_text, medians, run, write_rows

from calm_rt import benchmark, evaluation, quickstart
from calm_rt.data import default_corpus
from calm_rt.ops.check import check_int
from calm_rt.steps import (
    IDS,
    QUICKSTART_RIVALS,
    RIVALS,
    ROUNDS,
    measure_step,
    rivals_of,
    training_step,
)

ACCURACY = 0.999  # of held-out tokens, the quickstart's promise
BUDGET = 5 * quickstart.AUTOENCODER_SHARE  # minutes: of the quickstart's five


def measure(kind: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of step, one a rival."""
    return measure_step(f"{kind}-training", RIVALS, "cpu", rounds, memory=False)


def comparison(kind: str, rows: list[dict[str, Any]]) -> str:
    blocks, tokens = IDS[kind]
    times = medians(rows)
    rates = ", ".join(f"{name} {1e3 * blocks * tokens / ms:,.0f}" for name, ms in times.items())
    text = duel_text(f"one {kind} step, ids {[blocks, tokens]}", times, "native")
    return f"{text}\n  tokens a second: {rates}"


def profile(kind: str, rival: str) -> str:
    """Where a step's time goes, by operator."""
    step = training_step(kind, rival)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with benchmark.route(rival):
        step()
        with torch.profiler.profile(activities=activities) as profiler:
            step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [
        f"    {event.self_cpu_time_total / total:6.1%}  {event.count:4} x  {event.key}"
        for event in events[:10]
    ]
    return "\n".join([f"  {rival}, {total / 1e3:.1f} ms under the profiler", *lines])


@pytest.mark.parametrize("kind", IDS)
def test_training_step(kind: str, capsys) -> None:
    rows = measure(kind, ROUNDS)
    with capsys.disabled():
        print(f"\n{comparison(kind, rows)}")


def test_quickstart_autoencoder(capsys, tmp_path) -> None:
    """The quickstart's autoencoder from its first step to quickstart.TARGET_ACCURACY, or to the end
    of its minutes, as the reference may be."""
    tokenizer, shards = quickstart.prepare_data(default_corpus(), tmp_path)
    ids = next(shards.held_out_batches(quickstart.EVALUATION_BLOCKS, quickstart.BLOCK_SIZE))
    times, accuracies = {}, {}
    for rival in QUICKSTART_RIVALS:
        start = time.perf_counter()
        with benchmark.route(rival):
            model = quickstart.prepare_autoencoder(tokenizer, shards, tmp_path / rival, BUDGET, 0)
        times[rival] = 1e3 * (time.perf_counter() - start)
        accuracies[rival] = evaluation.reconstruction_accuracy(model, ids)
    reached = ", ".join(f"{rival} {share:.2%}" for rival, share in accuracies.items())
    with capsys.disabled():
        text = duel_text("autoencoder of the quickstart, trained", times, "native")
        print(f"\n{text}\n  held-out tokens right: {reached}")
    assert accuracies["native"] >= ACCURACY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and their conditions")
    options = parser.parse_args()
    check_int("rounds", options.rounds, 1)
    check_writable("json", options.json)
    where, rows = conditions(), []
    for kind in IDS:
        measured = measure(kind, options.rounds)
        rows += measured
        write_rows(options.json, where, rows)
        print(comparison(kind, measured), flush=True)
        if options.profile:
            first, *_ = rivals_of(kind, RIVALS)
            print(profile(kind, first), profile(kind, "native"), sep="\n", flush=True)


if __name__ == "__main__":
    run(main)
