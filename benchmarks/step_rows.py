"""Rows of whole steps, with the fields of `calm-rt bench`, as the scripts here write them."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from calm_rt.atomic import replace
from calm_rt.benchmark import machine


def step_rows(
    op: str, case: str, dtype: str, times: dict[str, list[float]], **conditions: Any
) -> list[dict[str, Any]]:
    """A row for each rival.  times: seconds of its rounds.  conditions: fields more."""
    return [
        {
            "kind": "step",
            "op": op,
            "case": case,
            "passes": "step",
            "device": "cpu",
            "dtype": dtype,
            "rival": rival,
            "median_ms": 1e3 * statistics.median(values),
            "min_ms": 1e3 * min(values),
            "max_ms": 1e3 * max(values),
            "rounds": len(values),
            "peak_extra_bytes": None,
            "gradient_bytes": 0,
            "flop": None,
            "bytes": None,
            **conditions,
        }
        for rival, values in times.items()
    ]


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by rival, of the rows of one case."""
    return {row["rival"]: row["median_ms"] for row in rows}


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
