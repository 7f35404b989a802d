"""How the scripts here write rows of whole steps and texts (calm_rt.steps.step_rows)."""

import json
import sys
from pathlib import Path
from typing import Any

from calm_rt.atomic import replace
from calm_rt.benchmark import machine


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
