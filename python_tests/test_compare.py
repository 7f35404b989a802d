"""`calm-rt bench --compare A B`: marks, warnings, what does not go with it, and damaged files."""

import copy
import json

import pytest
from test_benchmark import LIMITS, bench, results_of, tiny  # noqa: F401

from calm_rt import report


def made(official_ms: float, native_ms: float) -> dict:
    """What a run of two rows on an idle machine leaves."""
    row = {"case": "a", "passes": "forward", "device": "cpu", "dtype": "float32"}
    row |= {"peak_extra_bytes": None, "flop": 1e6, "bytes": 1e6}
    times = {"official": official_ms, "native": native_ms}
    rows = [{**row, "rival": name, "median_ms": ms, "min_ms": ms} for name, ms in times.items()]
    return {"machine": {"load": [0.0, 0.0, 0.0]}, "limits": LIMITS, "rows": rows, "sweep": []}


def test_compare(tiny, tmp_path, capsys):  # noqa: F811
    first, second = tmp_path / "a", tmp_path / "b"
    assert bench("--quick", "--report", first) == 0
    results = results_of(first)
    # of a machine so slow that shares of its limits have many digits
    results["limits"] = {"copy": 1e4, "product": {"float32": 1e4, "bfloat16": 1e4}}
    for row in results["rows"]:
        row["min_ms"] = row["median_ms"]  # steady, whatever else runs here
    results["machine"]["load"][0] = 0.0
    report.write_report(results, first)
    for row in results["rows"]:
        row["peak_extra_bytes"] = 5_000_000
        row["median_ms"] *= 3  # the whole machine is slower ...
        if row["op"] == "noise" and row["rival"] == "native":
            row["median_ms"] *= 2  # ... and one row is, too
        row["min_ms"] = row["median_ms"]
    results["machine"]["threads"] = 77
    report.write_report({**results, "sweep": []}, second)
    capsys.readouterr()
    assert bench("--compare", first, second) == 0
    printed = capsys.readouterr().out
    assert "threads: " in printed and "77" in printed
    marked = [line for line in printed.splitlines() if "slower" in line]
    assert len(marked) == 1 and "noise-normal" in marked[0] and "2" in marked[0]
    header, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("|")
    ]
    for line in (dict(zip(header, line, strict=True)) for line in lines):
        assert (line["A MB"], line["B MB"]) == ("", "5")
        # the same work in three or six times the time, within the rounding of a percentage
        shares = [int(line[f"{name} of its limit"].removesuffix("%")) for name in "AB"]
        times = 6 if "slower" in line.values() else 3
        assert shares[1] > 10
        assert abs(shares[0] - times * shares[1]) <= 0.5 + times * 0.5
    assert bench("--compare", first, second, "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["slower"] == ["noise-normal forward"]
    assert {row["mark"] for row in compared["rows"]} == {"", "slower"}
    for row in compared["rows"]:
        assert row["b_ms"] == pytest.approx(row["ratio"] * row["a_ms"])
        assert row["ratio"] == pytest.approx(3 * row["ratio_against_official"])
        assert (row["a_peak_extra_bytes"], row["b_peak_extra_bytes"]) == (None, 5_000_000)
        assert row["a_share"] > row["b_share"] > 0
    assert bench("--compare", second, first, "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert not compared["slower"] and {row["mark"] for row in compared["rows"]} == {"", "faster"}


@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("rival", [0, 1])
def test_an_unsteady_row_is_neither_slower_nor_faster(run: int, rival: int) -> None:
    runs = [made(10, 1), made(10, 2)]
    assert report.compare(*runs)["slower"] == ["a forward"]
    runs[run]["rows"][rival]["min_ms"] /= 2
    compared = report.compare(*runs)
    [row] = compared["rows"]
    assert row["mark"] == "unsteady" and not compared["slower"]
    [note] = compared["notes"]
    name = f"a forward {('official', 'native')[rival]}"
    assert note.startswith(f"{'AB'[run]}: Unsteady") and name in note
    assert "unsteady" in report.comparison_text(compared)


def test_a_busy_machine_is_a_note_of_the_comparison() -> None:
    runs = [made(10, 1), made(10, 1)]
    assert not report.compare(*runs)["notes"]
    runs[1]["machine"]["load"][0] = 7.0
    [note] = report.compare(*runs)["notes"]
    assert note.startswith("B: Other processes used this machine") and "7.0" in note


def test_what_would_choose_a_measurement_does_not_go_with_a_comparison(fails, tmp_path) -> None:
    command = ["bench", "--compare", tmp_path, tmp_path]
    for option in (["--ops", "noise"], ["--quick"], ["--steps"], ["--sweep"], ["--device", "cpu"]):
        name = option[0].removeprefix("--")
        fails([*command, *option], f"{name}: expected none with --compare")
    fails(command, "compare: expected a folder that calm-rt bench wrote", str(tmp_path))


def test_a_damaged_file_is_one_line(fails, tmp_path) -> None:
    whole = made(10, 1)

    def damaged(change) -> str:
        results = copy.deepcopy(whole)
        results = change(results) or results
        return json.dumps(results)

    contents = [
        "",
        "{",
        "[]",
        damaged(lambda results: results.pop("rows") and None),
        damaged(lambda results: results.update(machine=["load"])),
        damaged(lambda results: results.update(machine={})),
        damaged(lambda results: results.update(limits={"copy": 1e9})),
        damaged(lambda results: results.update(limits={"copy": 0, "product": {"float32": 1e9}})),
        damaged(lambda results: results.update(rows=[5])),
    ]
    for name, value in (
        ("median_ms", 0),
        ("median_ms", float("nan")),
        ("min_ms", "1"),
        ("dtype", None),
        ("case", ["a"]),
        ("bytes", None),
        ("peak_extra_bytes", "much"),
    ):
        contents.append(damaged(lambda results: results["rows"][1].update({name: value})))  # noqa: B023
    for name in ("median_ms", "min_ms", "rival", "flop", "peak_extra_bytes"):
        contents.append(damaged(lambda results: results["rows"][1].pop(name) and None))  # noqa: B023
    (tmp_path / report.RESULTS).write_text(json.dumps(whole))
    assert report.read_results(tmp_path) == whole
    for text in contents:
        (tmp_path / report.RESULTS).write_text(text)
        line = fails(["bench", "--compare", tmp_path, tmp_path], "compare: expected a folder")
        assert "results.json with other contents" in line, text
