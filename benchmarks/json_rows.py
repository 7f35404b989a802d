"""What the scripts here share: one line for a bad request, the model and text to measure with, and
rows of whole steps and texts (calm_rt.steps.step_rows), as text and as JSON."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calm_rt.arguments import load_model
from calm_rt.atomic import replace
from calm_rt.benchmark import machine
from calm_rt.data import TokenShards
from calm_rt.nn import Calm
from calm_rt.ops.check import check


def run(main: Callable[[], None]) -> None:
    """Runs a script; what its user can mend is one line and exit code 2, as with `calm-rt`."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def check_writable(name: str, path: str | None) -> None:
    """Raises ValueError where no such file can be written: a script measures for minutes before it
    writes."""
    if path is not None:
        folder = Path(path).parent
        fits = folder.is_dir() and os.access(folder, os.W_OK) and not Path(path).is_dir()
        check(fits, name, "a file in a folder that is there and can be written", path)


def model_and_shards(model: str, data: str) -> tuple[Calm, TokenShards]:
    """A CALM in a folder and token shards in another, of which it can read the tokens."""
    calm, shards = load_model(model, Calm, "cpu"), TokenShards(data)
    most = calm.config.vocab_size
    expected = f"token ids below the model's vocab_size {most}"
    check(shards.vocab_size <= most, "data", expected, f"a vocabulary of {shards.vocab_size}")
    return calm, shards


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by rival, of the rows of one case."""
    return {row["rival"]: row["median_ms"] for row in rows}


def duel_text(title: str, times: dict[str, float], ours: str) -> str:
    """Milliseconds of rivals by name and how many times those of `ours` they are, and where."""
    where = machine("cpu")
    lines = [
        f"{title}, {where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"{where['instruction_set']}, load {where['load'][0]:.1f}, commit {where['commit']}"
    ]
    lines += [f"  {name:10} {ms:8.1f} ms  {ms / times[ours]:5.2f} x" for name, ms in times.items()]
    return "\n".join(lines)


def write_rows(path: str | None, where: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes all rows so far, if anywhere: an interrupted run leaves what it has measured.

    where: of `conditions`.
    """
    if path is not None:
        text = json.dumps({**where, "rows": rows}, indent=1) + "\n"
        replace(Path(path), lambda temporary: temporary.write_text(text))


def conditions() -> dict[str, Any]:
    """Where, when, with what and by which command rows are measured."""
    script, *arguments = sys.argv
    command = " ".join(["python", f"benchmarks/{Path(script).name}", *arguments])
    return {"machine": machine("cpu"), "command": command}
