"""What `calm-rt bench` measured, as a folder: results.json, report.md and pictures; and two such
folders compared."""

import json
import os
from pathlib import Path
from typing import Any

from calm_rt.atomic import scratch_folder
from calm_rt.figures import COLOURS, draw_bars, draw_roofline, draw_scaling
from calm_rt.ops.check import check

RESULTS, REPORT = "results.json", "report.md"
BARS, ROOFLINE, SCALING = "rivals.png", "roofline.png", "scaling.png"
SLOWER = 1.05  # of the time before: what counts as slower in a comparison
METHOD = """\
Median of the rounds; the rivals of a row ran in one process and took turns round by round.
`official` is the official code's formula in eager PyTorch, `compiled` torch.compile of it,
`library` torch's own function, `liger` Liger's, `native` the kernel. `x` says how many times faster
native is. On a GPU its own clock counts, and L2 holds nothing of a call before. Memory is what one
call takes beyond its arguments."""
STEPS = """\
Rows with the passes `step` are whole steps: of training at the sizes in calm_rt/steps.py (loss,
backward, clipping and AdamW in fp32), of the quickstart's training in that way with kernels and
under `backend("reference")` without, and the choice of a patch at temperature 1/2 from 200 draws at
the size of CALM-M (head, decoder and vote, calm_rt/planted.py)."""
UNSTEADY = 1.5  # median over fastest round: more says that something else used the machine
BUSY = 0.5  # load average, processes that run or wait: more is not an idle machine

Row = dict[str, Any]


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes the report anew from all that is measured so far.

    results: machine, limits, rows (see benchmark.measure), sweep (see scaling), finished.
    raises: ValueError for a folder that cannot be written.
    """
    pictures = {BARS: draw_bars} if results["rows"] else {}
    if _op_rows(results["rows"]):
        pictures[ROOFLINE] = draw_roofline
    if results["sweep"]:
        pictures[SCALING] = draw_scaling
    with scratch_folder(folder, "report") as scratch:
        (scratch / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        (scratch / REPORT).write_text(report_text(results))
        for name, draw in pictures.items():
            draw(results).savefig(scratch / name, dpi=110)
        for name in (RESULTS, REPORT, BARS, ROOFLINE, SCALING):
            if (scratch / name).exists():
                os.replace(scratch / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier run


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json alone, after each row."""
    with scratch_folder(folder, "report") as scratch:
        (scratch / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        os.replace(scratch / RESULTS, folder / RESULTS)


def read_results(folder: str | Path) -> dict[str, Any]:
    """What write_report wrote.  raises: ValueError for a folder without it."""
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text())
        whole = {"machine", "limits", "rows", "sweep"} <= set(results)
        _ = [_key(row) for row in results["rows"]]
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    check(whole, "compare", "a folder that calm-rt bench wrote", str(folder))
    return results


# ---- text ----


def report_text(results: dict[str, Any]) -> str:
    """report.md."""
    machine, rows, sweep = results["machine"], results["rows"], results["sweep"]
    about = {
        "device": f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads",
        "instruction set": machine["instruction_set"] or "none",
        "torch": machine["torch"],
        "calm_rt": f"{machine['calm_rt']}, commit {machine['commit'] or 'unknown'}",
        "date": machine["date"],
        "load at the start": f"{machine['load'][0]:.2f}",
    }
    parts = ["# Benchmark of calm_rt", *(f"* {name}: {value}" for name, value in about.items())]
    parts += [f"\n**{line}**" for line in warnings_of(results)]
    if not results["finished"]:
        parts.append("\n**Interrupted: these are the rows that were finished.**")
    if rows:
        parts += ["", METHOD, "", times_table(rows), "", f"![times]({BARS})"]
    if any(row.get("kind") == "step" for row in rows):
        parts += ["", STEPS]
    if _op_rows(rows):
        parts += ["", "## Limits", "", _limits_table(results), "", f"![roofline]({ROOFLINE})"]
    if any(row["peak_extra_bytes"] is not None for row in rows):
        parts += ["", "## Memory", "", _memory_table(rows)]
    if sweep:
        parts += ["", "## Scaling", "", scaling_text(sweep), "", f"![scaling]({SCALING})"]
    return "\n".join(parts) + "\n"


def times_table(rows: list[Row]) -> str:
    """Milliseconds of each rival, and how many times faster native is."""
    present = [rival for rival in COLOURS if any(row["rival"] == rival for row in rows)]
    others = [rival for rival in present if rival != "native"]
    lines = []
    for (case, passes), group in _groups(rows).items():
        times = {row["rival"]: row["median_ms"] for row in group}
        ratios = [_times(times.get(rival), times["native"]) for rival in others]
        lines.append([case, passes, *(_number(times.get(rival)) for rival in present), *ratios])
    return _table(
        ["case", "passes", *(f"{r} ms" for r in present), *(f"x {r}" for r in others)], lines
    )


def warnings_of(results: dict[str, Any]) -> list[str]:
    """Why the ratios may mean little, a line each."""
    load = results["machine"]["load"][0]
    lines = []
    if load > BUSY:
        lines.append(f"Other processes used this machine when the run began (load {load:.1f}).")
    unsteady = [row for row in results["rows"] if row["median_ms"] > UNSTEADY * row["min_ms"]]
    names = dict.fromkeys(f"{row['case']} {row['passes']} {row['rival']}" for row in unsteady)
    if names:
        lines.append(f"Unsteady, so something else used the machine: {', '.join(names)}.")
    return lines


def _memory_table(rows: list[Row]) -> str:
    present = [rival for rival in COLOURS if any(row["rival"] == rival for row in rows)]
    lines = []
    for (case, passes), group in _groups(rows).items():
        peaks = {row["rival"]: row["peak_extra_bytes"] for row in group}
        shown = [_number(_scaled(peaks.get(rival), 1e-6)) for rival in present]
        lines.append([case, passes, *shown, _number(group[0]["gradient_bytes"] / 1e6)])
    return _table(["case", "passes", *(f"{r} MB" for r in present), "gradient MB"], lines)


def _limits_table(results: dict[str, Any]) -> str:
    """Native rows against the time that arithmetic or traffic alone would take."""
    copy, product = results["limits"]["copy"], results["limits"]["product"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in product.items())
    lines = []
    for row in _op_rows(results["rows"]):
        if row["rival"] != "native":
            continue
        seconds = row["median_ms"] / 1e3
        lines.append(
            [
                row["case"],
                row["passes"],
                _number(row["flop"] / 1e9),
                _number(row["bytes"] / 1e6),
                _number(row["flop"] / seconds / 1e9),
                _number(row["bytes"] / seconds / 1e9),
                _share_of_limit(results, row),
            ]
        )
    header = ["case", "passes", "GFLOP", "MB", "GFLOP/s", "GB/s", "of the limit"]
    return (
        f"Measured in this run: copies {copy / 1e9:.1f} GB/s, library products {rates}. The limit "
        "is the longer of the times that the op's arithmetic and its traffic would take at these "
        "rates: what a CPU screens in 8 bits at that of int8, 16-bit products at the faster of "
        f"theirs and float32's.\n\n{_table(header, lines)}"
    )


def _share_of_limit(results: dict[str, Any], row: Row) -> str:
    """Of the time that the row took, what its arithmetic or its traffic alone would take; empty
    for a step, of which nobody counts these."""
    if row["flop"] is None:
        return ""
    screened = row.get("flop_int8", 0)
    arithmetic = (row["flop"] - screened) / _product_rate(results, row["dtype"], row["device"])
    if screened:
        arithmetic += screened / _product_rate(results, "int8", row["device"])
    least = max(arithmetic, row["bytes"] / results["limits"]["copy"])
    return f"{1e3 * least / row['median_ms']:.0%}"


def scaling_text(sweep: list[Row]) -> str:
    """How many points, and those where native is slower than the official formula."""
    slower = [point for point in sweep if point["slower"]]
    text = f"{len(sweep)} points; native is more than 5 % slower than the official formula at "
    if not slower:
        return text + "none of them."
    lines = [
        [
            point["op"],
            f"{point['axis']} {point['value']}",
            point["fixed"],
            point["passes"],
            point["threads"],
            _number(point["official_ms"]),
            _number(point["native_ms"]),
            f"{point['official_ms'] / point['native_ms']:.2f}",
        ]
        for point in slower
    ]
    header = ["op", "at", "with", "passes", "threads", "official ms", "native ms", "x official"]
    return f"{text}{len(slower)}:\n\n{_table(header, lines)}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, list[str]]:
    """Two results side by side: the text, and the native rows that got slower.

    A row is slower if its time grew by more than 5 % against that of the official formula in the
    same run, which the state of the machine moves in the same way.
    raises: ValueError where no row stands in both.
    """
    both = (before, after)
    tables = [{_key(row): row for row in results["rows"]} for results in both]
    common = [key for key in tables[0] if key in tables[1] and key[-1] == "native"]
    check(bool(common), "compare", "two folders with rows in common", "none")
    lines, slower = [], []
    for key in common:
        old, new = (table[key]["median_ms"] for table in tables)
        rival = (*key[:-1], "official")
        theirs = [table[rival]["median_ms"] for table in tables if rival in table]
        ratio = new / old / (theirs[1] / theirs[0] if len(theirs) == 2 else 1)
        if ratio > SLOWER:
            slower.append(" ".join(key[:2]))
        marked = "slower" if ratio > SLOWER else "faster" if ratio < 1 / SLOWER else ""
        times = [_number(old), _number(new), f"{new / old:.2f}", f"{ratio:.2f}", marked]
        rows = [table[key] for table in tables]
        memory = [_number(_scaled(row["peak_extra_bytes"], 1e-6)) for row in rows]
        shares = [_share_of_limit(*pair) for pair in zip(both, rows, strict=True)]
        lines.append([*key[:2], *times, *memory, *shares])
    header = ["case", "passes", "A ms", "B ms", "B / A", "against official", ""]
    header += ["A MB", "B MB", "A of its limit", "B of its limit"]
    notes = [
        f"{name}: A {before['machine'].get(name)}, B {after['machine'].get(name)}"
        for name in ("device", "threads", "torch", "instruction_set", "commit")
        if before["machine"].get(name) != after["machine"].get(name)
    ]
    return "\n".join([*notes, *([""] if notes else []), _table(header, lines)]), slower


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["case"], row["passes"], row["device"], row["rival"]


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["passes"]), []).append(row)
    return groups


def _op_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["flop"] is not None]


def _product_rate(results: dict[str, Any], dtype: str, device: str) -> float:
    """FLOP a second of the products that the kernels take for this type."""
    product = results["limits"]["product"]
    rate = product.get(dtype, product["float32"])
    return max(rate, product["float32"]) if device == "cpu" else rate


def _table(header: list[str], lines: list[list[object]]) -> str:
    """A Markdown table whose source is aligned as well."""
    cells = [header, *([str(cell) for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join(
        [rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]]
    )


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else max(0.0, value * factor)


def _times(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else _number(theirs / ours)
