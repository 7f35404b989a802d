"""What `calm-rt bench` measured, as a folder: results.json, report.md and pictures; and two such
folders compared."""

import json
import math
import os
from pathlib import Path
from typing import Any

from calm_rt.atomic import scratch_folder
from calm_rt.figures import COLOURS, draw_bars, draw_roofline, draw_scaling
from calm_rt.ops.check import check
from calm_rt.scaling import SLOWER

RESULTS, REPORT = "results.json", "report.md"
BARS, ROOFLINE, SCALING = "rivals.png", "roofline.png", "scaling.png"
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
    """What write_report wrote.  raises: ValueError for a folder without it, or with less in it."""
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text())
        whole = _is_whole(results)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    got = f"{path} with other contents" if path.is_file() else str(folder)
    check(whole, "compare", "a folder that calm-rt bench wrote", got)
    return results


def _is_whole(results: dict[str, Any]) -> bool:
    """Whether all that a comparison reads is there and a number where it must be; else it may raise
    too."""
    limits, rows = results["limits"], results["rows"]
    positive = [limits["copy"], limits["product"]["float32"], *limits["product"].values()]
    positive += [row[name] for row in rows for name in ("median_ms", "min_ms")]
    texts = [text for row in rows for text in (*_key(row), row["dtype"])]
    counts = [results["machine"]["load"][0], *(row.get("flop_int8", 0) for row in rows)]
    counts += [row["peak_extra_bytes"] for row in rows if row["peak_extra_bytes"] is not None]
    counts += [row[name] for row in _op_rows(rows) for name in ("flop", "bytes")]
    return (
        all(isinstance(text, str) for text in texts)
        and all(0 < number < math.inf for number in positive)
        and all(math.isfinite(number) for number in counts)
    )


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
    unsteady = filter(_is_unsteady, results["rows"])
    names = dict.fromkeys(f"{row['case']} {row['passes']} {row['rival']}" for row in unsteady)
    if names:
        lines.append(f"Unsteady, so something else used the machine: {', '.join(names)}.")
    return lines


def _is_unsteady(row: Row) -> bool:
    return row["median_ms"] > UNSTEADY * row["min_ms"]


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
                _percent(_share(results, row)),
            ]
        )
    header = ["case", "passes", "GFLOP", "MB", "GFLOP/s", "GB/s", "of the limit"]
    return (
        f"Measured in this run: copies {copy / 1e9:.1f} GB/s, library products {rates}. The limit "
        "is the longer of the times that the op's arithmetic and its traffic would take at these "
        "rates: what a CPU screens in 8 bits at that of int8, 16-bit products at the faster of "
        f"theirs and float32's.\n\n{_table(header, lines)}"
    )


def _share(results: dict[str, Any], row: Row) -> float | None:
    """Of the time that the row took, what its arithmetic or its traffic alone would take; None
    for a step, of which nobody counts these."""
    if row["flop"] is None:
        return None
    screened = row.get("flop_int8", 0)
    arithmetic = (row["flop"] - screened) / _product_rate(results, row["dtype"], row["device"])
    if screened:
        arithmetic += screened / _product_rate(results, "int8", row["device"])
    least = max(arithmetic, row["bytes"] / results["limits"]["copy"])
    return 1e3 * least / row["median_ms"]


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


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two results, A and B, side by side.

    A row is slower if its time grew by more than 5 % against that of the official formula in the
    same run, which the state of the machine moves in the same way; unsteady, and neither slower nor
    faster, if something else used the machine while one of these times was taken.
    returns: notes, a line each; slower, the names of such rows; rows, one for each native row that
        is in both.
    raises: ValueError where no row stands in both.
    """
    both = {"a": before, "b": after}
    tables = [{_key(row): row for row in results["rows"]} for results in both.values()]
    common = [key for key in tables[0] if key in tables[1] and key[-1] == "native"]
    check(bool(common), "compare", "two folders with rows in common", "none")
    compared = []
    for key in common:
        rows, rival = [table[key] for table in tables], (*key[:-1], "official")
        theirs = [table[rival] for table in tables] if all(rival in t for t in tables) else []
        ratio = rows[1]["median_ms"] / rows[0]["median_ms"]
        against = ratio * (theirs[0]["median_ms"] / theirs[1]["median_ms"] if theirs else 1)
        mark = "slower" if against > SLOWER else "faster" if against < 1 / SLOWER else ""
        mark = "unsteady" if any(map(_is_unsteady, rows + theirs)) else mark
        line = dict(zip(("case", "passes", "device"), key[:-1], strict=True))
        line |= {"ratio": ratio, "ratio_against_official": against, "mark": mark}
        for name, results, row in zip(both, both.values(), rows, strict=True):
            line[f"{name}_ms"], line[f"{name}_share"] = row["median_ms"], _share(results, row)
            line[f"{name}_peak_extra_bytes"] = row["peak_extra_bytes"]
        compared.append(line)
    notes = [
        f"{name}: A {before['machine'].get(name)}, B {after['machine'].get(name)}"
        for name in ("device", "threads", "torch", "instruction_set", "commit")
        if before["machine"].get(name) != after["machine"].get(name)
    ]
    for name, results in both.items():
        notes += [f"{name.upper()}: {line}" for line in warnings_of(results)]
    slower = [f"{row['case']} {row['passes']}" for row in compared if row["mark"] == "slower"]
    return {"notes": notes, "slower": slower, "rows": compared}


def comparison_text(comparison: dict[str, Any]) -> str:
    """The notes, and a table of the rows."""
    lines = []
    for row in comparison["rows"]:
        times = [_number(row["a_ms"]), _number(row["b_ms"]), f"{row['ratio']:.2f}"]
        times += [f"{row['ratio_against_official']:.2f}", row["mark"]]
        memory = [_number(_scaled(row[f"{name}_peak_extra_bytes"], 1e-6)) for name in "ab"]
        shares = [_percent(row[f"{name}_share"]) for name in "ab"]
        lines.append([row["case"], row["passes"], *times, *memory, *shares])
    header = ["case", "passes", "A ms", "B ms", "B / A", "against official", ""]
    header += ["A MB", "B MB", "A of its limit", "B of its limit"]
    notes = comparison["notes"]
    return "\n".join([*notes, *([""] if notes else []), _table(header, lines)])


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


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else max(0.0, value * factor)


def _times(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else _number(theirs / ours)
