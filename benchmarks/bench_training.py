"""One training step of a small CALM and of its autoencoder: official, compiled and native.

    pytest benchmarks -k training
    python benchmarks/bench_training.py [--profile] [--json FILE]

What a step is, and what the three run, stands in calm_rt/steps.py; they take turns round by round.
`calm-rt bench` measures the same steps beside the ops, with their memory.
"""

import argparse
from typing import Any

import pytest
import torch
from json_rows import conditions, medians, write_rows

from calm_rt.report import duel_text
from calm_rt.steps import IDS, RIVALS, ROUNDS, measure_step, training_step


def measure(kind: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of step, one a rival."""
    return measure_step(f"{kind}-training", RIVALS, "cpu", rounds, memory=False)


def comparison(kind: str, rows: list[dict[str, Any]]) -> str:
    return duel_text(f"one {kind} step, ids {list(IDS[kind])}", medians(rows), "native")


def profile(kind: str, rival: str) -> str:
    """Where a step's time goes, by operator."""
    step = training_step(kind, rival)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and their conditions")
    options = parser.parse_args()
    where, rows = conditions(), []
    for kind in IDS:
        measured = measure(kind, options.rounds)
        rows += measured
        write_rows(options.json, where, rows)
        print(comparison(kind, measured), flush=True)
        if options.profile:
            print(profile(kind, "official"), profile(kind, "native"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
