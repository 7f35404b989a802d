"""The training log (JSON lines) and the picture of its curves."""

import json
import math
from pathlib import Path
from typing import Any

from calm_rt.atomic import replace

LOG = "log.jsonl"
CURVES = "curves.png"
STEP_VALUES = ("learning_rate", "tokens_per_second", "gradient_norm", "seconds")  # not plotted


class TrainingLog:
    """Appends one JSON object a line to log.jsonl.

    A resumed run drops the lines of steps that were lost with the interruption, so every step
    stands there once.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.path = folder / LOG
        kept = (
            [line for line in read_log(folder) if line["step"] <= first_step] if first_step else []
        )
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace(self.path, lambda temporary: temporary.write_text(text))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line: how things stand after `step` steps."""
        with self.path.open("a") as file:
            file.write(json.dumps(finite({"step": step, **values})) + "\n")


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity in it, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's log, up to one that is damaged, say cut off by a crash."""
    path = folder / LOG
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            break
        lines.append(line)
    return lines


def plot_curves(folders: dict[str, Path], path: Path) -> None:
    """Draws every logged value against the step, one small axis each.

    folders: the runs' folders by title; each becomes one row of the picture.
    path: a PNG file, written whole or not at all.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = {title: _series(read_log(folder)) for title, folder in folders.items()}
    columns = max(1, *(len(series) for series in rows.values()))
    figure = Figure(figsize=(3.4 * columns, 2.8 * len(rows)), layout="constrained")
    for row, (title, series) in enumerate(rows.items()):
        for column, (name, points) in enumerate(series.items()):
            axis = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            steps, values = zip(*points, strict=True)
            if isinstance(values[0], tuple):
                axis.fill_between(steps, *zip(*values, strict=True), alpha=0.4)
            else:
                axis.plot(steps, values, marker="." if len(steps) < 20 else None)
            axis.set(title=f"{title}: {name}", xlabel="step")
            axis.grid(alpha=0.3)
    replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _series(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) points by name; a value is a number or an interval, with NaN where there is
    none."""
    series: dict[str, list[tuple[int, Any]]] = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or name in STEP_VALUES:
                continue
            if isinstance(value, list):
                value = tuple(math.nan if end is None else end for end in value)
            series.setdefault(name, []).append((line["step"], math.nan if value is None else value))
    return series
