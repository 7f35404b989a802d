"""The pictures of a benchmark report."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

COLOURS = {"official": "tab:gray", "compiled": "tab:blue", "library": "tab:green"}
COLOURS |= {"liger": "tab:purple", "reference": "tab:red", "native": "tab:orange"}

Row = dict[str, Any]


def draw_bars(results: dict[str, Any]) -> Figure:
    """How many times as long as native each rival takes."""
    rows = results["rows"]
    groups = list(dict.fromkeys((row["case"], row["passes"]) for row in rows))
    rivals = [r for r in COLOURS if r != "native" and any(row["rival"] == r for row in rows)]
    times = {(row["case"], row["passes"], row["rival"]): row["median_ms"] for row in rows}
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(groups)), layout="constrained")
    axis = figure.add_subplot()
    for number, rival in enumerate(rivals):
        places = np.arange(len(groups)) + (number - (len(rivals) - 1) / 2) * 0.8 / len(rivals)
        values = [times.get((*g, rival), np.nan) / times[(*g, "native")] for g in groups]
        bars = axis.barh(places, values, 0.8 / len(rivals), label=rival, color=COLOURS[rival])
        labels = ["" if np.isnan(value) else f"{value:.3g}" for value in values]
        axis.bar_label(bars, labels, padding=2, fontsize=7)
    axis.axvline(1, color=COLOURS["native"], label="native")
    axis.set(xscale="log", xlabel="time, native = 1")
    axis.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=7)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    return figure


def draw_roofline(results: dict[str, Any]) -> Figure:
    """FLOP a second over FLOP a byte of native and official, under what the machine can do."""
    copy, product = results["limits"]["copy"], results["limits"]["product"]
    rows = [row for row in results["rows"] if row["rival"] in ("native", "official")]
    rows = [row for row in rows if row["flop"] is not None]  # of a step nobody counts them
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.add_subplot()
    intensities = [row["flop"] / row["bytes"] for row in rows]
    ends = np.geomspace(min(0.1, *intensities) / 2, max(1000, *intensities) * 2, 200)
    for (name, rate), style in zip(product.items(), ("-", "--", ":"), strict=False):
        roof = np.minimum(ends * copy, rate) / 1e9
        axis.plot(ends, roof, style, color="black", label=f"{name}: {rate / 1e9:.0f} GFLOP/s")
    for rival in ("official", "native"):
        own = [row for row in rows if row["rival"] == rival]
        speed = [row["flop"] / row["median_ms"] / 1e6 for row in own]
        points = [row["flop"] / row["bytes"] for row in own]
        axis.scatter(points, speed, color=COLOURS[rival], label=rival)
        if rival == "native":
            for row, x, y in zip(own, points, speed, strict=True):
                axis.annotate(_short(row), (x, y), (4, 3), textcoords="offset points", fontsize=6)
    title = f"copies {copy / 1e9:.1f} GB/s; arithmetic and traffic of the formula alone"
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_scaling(results: dict[str, Any]) -> Figure:
    """Official time over native time along each sweep, a line a number of threads."""
    sweeps: dict[tuple[str, str, str], dict[int, list[Row]]] = {}
    for point in results["sweep"]:
        lines = sweeps.setdefault((point["op"], point["axis"], point["fixed"]), {})
        lines.setdefault(point["threads"], []).append(point)
    columns = min(3, len(sweeps))
    height = -(-len(sweeps) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * height), layout="constrained")
    for number, ((op, letter, fixed), lines) in enumerate(sweeps.items()):
        axis = figure.add_subplot(height, columns, number + 1)
        for threads, points in lines.items():
            ratios = [point["official_ms"] / point["native_ms"] for point in points]
            label = f"{threads} thread{'s' * (threads > 1)}"
            axis.plot([point["value"] for point in points], ratios, marker=".", label=label)
            _mark(axis, (point for point in points if point["slower"]))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set(yscale="log", xlabel=letter, ylabel="official / native")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_title(f"{op}, {fixed}", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _mark(axis: Any, points: Iterable[Row]) -> None:
    """Crosses where native is slower."""
    for point in points:
        ratio = point["official_ms"] / point["native_ms"]
        axis.plot(point["value"], ratio, "x", color="red", markersize=8)


def _short(row: Row) -> str:
    return row["case"] + (" +backward" if "backward" in row["passes"] else "")
