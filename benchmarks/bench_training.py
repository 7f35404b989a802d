"""One training step of a small CALM and of its autoencoder: official, compiled and native.

    pytest benchmarks -k training        python benchmarks/bench_training.py --profile

What a step is, and what the three run, stands in calm_rt/steps.py; they take turns round by round.
`calm-rt bench` measures the same steps beside the ops, with their memory.
"""

import argparse

import pytest
import torch

from calm_rt.report import duel_text
from calm_rt.steps import IDS, RIVALS, ROUNDS, measure_step, training_step


def measure(kind: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each rival."""
    rows = measure_step(f"{kind}-training", RIVALS, "cpu", rounds, memory=False)
    return {row["rival"]: row["median_ms"] for row in rows}


def comparison(kind: str, times: dict[str, float]) -> str:
    return duel_text(f"one {kind} step, ids {list(IDS[kind])}", times, "native")


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
    times = measure(kind, ROUNDS)
    with capsys.disabled():
        print(f"\n{comparison(kind, times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    options = parser.parse_args()
    for kind in IDS:
        print(comparison(kind, measure(kind, options.rounds)), flush=True)
        if options.profile:
            print(profile(kind, "official"), profile(kind, "native"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
