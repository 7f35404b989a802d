"""The benchmark's engine, its report and its command, with cases that take no time."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_rt import benchmark, cli, costs, library, official, ops, reference, report, scaling
from calm_rt.testing import CASES

TINY = [case for case in CASES if str(case) in ("noise-normal", "energy_score-S2-R3-L5-M1")]
PRODUCTS = ("linear_argmax", "linear_cross_entropy", "encode", "decode")
LIMITS = {"copy": 1e10, "product": {"float32": 1e11, "bfloat16": 2e11}}


@pytest.fixture
def tiny(monkeypatch):
    """The command sees two tiny cases; limits take no time and no memory is probed."""
    cases = [dataclasses.replace(case, benchmark=True, rounds=5) for case in TINY]
    monkeypatch.setattr(benchmark, "CASES", cases)
    monkeypatch.setattr(benchmark, "limits", lambda device: LIMITS)
    return cases


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def results_of(folder):
    return json.loads((folder / report.RESULTS).read_text())


# ---- the engine ----


def test_rivals_take_turns():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    # one call each to warm up, one to see how long it takes
    times = benchmark.compete(
        {name: lambda call=call: (call(), _spin(0.002)) for name, call in calls.items()}, "cpu", 4
    )
    assert "".join(seen) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(rounds) == 4 and min(rounds) >= 0.002 for rounds in times.values())


def test_time_ends_the_rounds_after_three():
    times = benchmark.compete({"a": lambda: _spin(0.002)}, "cpu", rounds=100, seconds=0)
    assert len(times["a"]) == 3


@pytest.mark.parametrize("fails_at", [1, 5])  # while it warms up, in a round
def test_a_rival_that_fails_is_left_out_with_its_error(fails_at):
    fail = mock.Mock(side_effect=[None] * (fails_at - 1) + [MemoryError("too little")])
    calls, failed = {"compiled": fail, "native": lambda: None}, {}
    times = benchmark.compete(calls, "cpu", rounds=4, failed=failed)
    assert len(times.pop("native")) == 4 and not times and fail.call_count == fails_at
    assert failed == {"compiled": "MemoryError: too little"}


def _spin(seconds):
    end = benchmark.time.perf_counter() + seconds
    while benchmark.time.perf_counter() < end:
        pass


def test_short_calls_are_repeated():
    count = 0

    def call():
        nonlocal count
        count += 1

    benchmark.compete({"a": call}, "cpu", rounds=1)
    assert count > 100


def test_a_gpu_is_timed_by_its_own_clock_and_without_l2(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.place = None

        def record(self):
            log.append("event")
            self.place = len(log)

        def elapsed_time(self, end):
            assert log[-1] == "wait"
            return 1.0 * (end.place - self.place)  # milliseconds: 2 where a call lies between

    class Eraser:
        def zero_(self):
            log.append("erase")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(benchmark, "_eraser", Eraser)
    assert benchmark._timed(lambda: log.append("call"), 3, "cuda") == pytest.approx(2e-3)
    assert log == ["wait", *["erase", "event", "call", "event"] * 3, "wait"]


@pytest.fixture
def liger(monkeypatch):
    """Something that is called as Liger is."""

    class LigerFusedLinearCrossEntropyLoss:
        def __call__(self, lin_weight, _input, target):
            return torch.nn.functional.cross_entropy(_input @ lin_weight.T, target)

    transformers = types.ModuleType("liger_kernel.transformers")
    transformers.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    library.liger.cache_clear()
    yield
    library.liger.cache_clear()


def test_liger_is_a_rival_on_a_gpu(liger):
    for case in benchmark.benchmark_cases():
        assert "liger" not in benchmark.rivals_of(case)
        there = "liger" in benchmark.rivals_of(case, device="cuda")
        assert there == (case.op == "linear_cross_entropy")
    case = next(case for case in CASES if case.op == "linear_cross_entropy")
    for backward in (False, True):
        arguments = benchmark.make_arguments(case, "liger", "cpu")
        theirs = benchmark.contender(case, "liger", arguments, backward)()
        arguments = benchmark.make_arguments(case, "native", "cpu")
        ours = benchmark.contender(case, "native", arguments, backward)()
        pairs = zip(theirs, ours, strict=True) if backward else [(theirs, ours)]
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)


def test_without_liger_nobody_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    library.liger.cache_clear()
    for case in benchmark.benchmark_cases():
        assert "liger" not in benchmark.rivals_of(case, device="cuda")
    library.liger.cache_clear()


def test_native_does_not_fall_back_while_it_is_timed(monkeypatch):
    monkeypatch.setattr("calm_rt._native._registered", set())
    with pytest.raises(benchmark._native.NativeUnavailable):
        benchmark.measure(TINY[0], "forward", ["official", "native"], "cpu", 1, memory=False)


def test_every_benchmark_case_has_a_cost_and_a_sweep():
    for case in benchmark.benchmark_cases():
        assert callable(getattr(costs, case.op))
        assert any(sweep.op == case.op for sweep in scaling.SWEEPS), case.op


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.op in PRODUCTS and not case.benchmark], ids=str
)
def test_costs_count_the_products(case):
    """torch's own counter sees the products of the eager formula, which are all of them."""
    arguments = case.make()
    formula = getattr(official, case.op)
    for backward in (False, True) if case.op == "linear_cross_entropy" else (False,):
        with FlopCounterMode(display=False) as counter:
            result = formula(**arguments)
            if backward:
                result.sum().backward()
        assert getattr(costs, case.op)(backward, **arguments).flop == counter.get_total_flops()


def test_costs_of_the_head_leave_out_the_repeated_context():
    case = next(case for case in CASES if case.op == "sample_latents")
    arguments = case.make()
    rows, size = arguments["hidden"].shape
    samples, blocks = arguments["num_samples"], len(arguments["weights"].blocks)
    with FlopCounterMode(display=False) as counter:
        hidden, weights = arguments["hidden"], arguments["weights"]
        reference.sample_latents(hidden, weights, 1, torch.tensor(1), torch.arange(rows))
    once = costs.sample_latents(False, **{**arguments, "num_samples": 1}).flop
    assert once == counter.get_total_flops()
    context = 2 * rows * size * size * (1 + blocks)
    several = costs.sample_latents(False, **arguments).flop
    assert several - context == samples * (once - context)


def test_limits_are_those_of_the_fastest_round(monkeypatch):
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(benchmark, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(
        benchmark, "compete", lambda calls, *_: {name: [4.0, 2.0] for name in calls}
    )
    limits = benchmark.limits("cpu")
    assert limits["copy"] == 2 * (1 << 20) / 2.0
    assert limits["product"] == dict.fromkeys(("float32", "bfloat16", "int8"), 2 * 64**3 / 2.0)


def test_share_of_the_limit_is_that_of_the_products_taken():
    """Of 3 GFLOP 2 in 8 bits, and of a type whose products are slower than float32's."""
    results = {"limits": {"copy": 1e12, "product": {"float32": 1e9, "bfloat16": 5e8, "int8": 4e9}}}
    row = {"device": "cpu", "dtype": "bfloat16", "bytes": 1.0, "median_ms": 3000.0}
    row |= {"flop": 3e9, "flop_int8": 2e9}
    assert report._share(results, row) == pytest.approx(0.5)  # 1 s and 0.5 s of 3
    assert report._share(results, {**row, "flop_int8": 0}) == pytest.approx(1)


def test_memory_is_that_of_a_call():
    """Within what Linux counts late, 64 pages a thread."""
    [case] = [case for case in CASES if str(case) == "noise-D8-R2048-L64"]
    result, late = 4 * 8 * 2048 * 64, 64 * 4096 * torch.get_num_threads()
    peak = benchmark.peak_memory(case, "native", False, "cpu")
    assert result - late <= peak < 2 * result


# ---- the command ----


def test_quick_run(tiny, tmp_path, capsys):
    assert bench("--quick", "--report", tmp_path) == 0
    results = results_of(tmp_path)
    assert results["finished"]
    rows = {(row["case"], row["passes"], row["rival"]) for row in results["rows"]}
    assert rows == {
        (str(case), passes, rival)
        for case in tiny
        for passes in benchmark.passes_of(case)
        for rival in ("official", "native")
    }
    for row in results["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    text = (tmp_path / report.REPORT).read_text()
    for word in ("instruction set", torch.__version__, "commit", "energy_score-S2-R3-L5-M1"):
        assert word in text
    for name in (report.BARS, report.ROOFLINE):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "noise-normal" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        report.RESULTS,
        report.REPORT,
        report.BARS,
        report.ROOFLINE,
    }


def test_ops_and_json(tiny, tmp_path, capsys):
    assert bench("--quick", "--ops", "noise", "--report", tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == results_of(tmp_path)
    assert {row["op"] for row in printed["rows"]} == {"noise"}


def test_sweep(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS_SECONDS", 0)
    sweep = next(sweep for sweep in scaling.SWEEPS if sweep.op == "noise")
    monkeypatch.setattr(scaling, "SWEEPS", [dataclasses.replace(sweep, values=(1, 3))])
    assert bench("--quick", "--sweep", "--report", tmp_path) == 0
    points = results_of(tmp_path)["sweep"]
    threads = {1, min(2, torch.get_num_threads())}
    assert {(p["value"], p["threads"]) for p in points} == {(v, t) for v in (1, 3) for t in threads}
    assert (tmp_path / report.SCALING).is_file()
    assert f"{len(points)} points" in capsys.readouterr().out
    assert bench("--quick", "--report", tmp_path) == 0
    assert not (tmp_path / report.SCALING).exists()  # of the run before


def test_a_sweep_ends_before_it_takes_long(monkeypatch):
    seen = []

    def point(sweep, value, device):
        seen.append(value)
        return {"official_ms": 10.0 * value, "native_ms": 1.0}

    monkeypatch.setattr(scaling, "_measure_point", point)
    sweep = dataclasses.replace(scaling.SWEEPS[0], values=(1, 100, 200, 201, 300))
    list(scaling.measure_sweep(sweep, "cpu"))
    thread_counts = min(2, torch.get_num_threads())
    assert seen == [1, 100, 200] * thread_counts  # 201 would take 2.01 s


def test_slower_points_are_named(monkeypatch):
    times = {"official": [1.0], "native": [1.06]}
    counted = []

    def compete(calls, device, rounds, seconds):
        counted.append(rounds)
        return times

    monkeypatch.setattr(scaling, "compete", compete)
    sweep = next(sweep for sweep in scaling.SWEEPS if sweep.op == "noise")
    point = {**scaling._measure_point(sweep, 2, "cpu"), "threads": 1}
    assert point["slower"] and counted == [scaling.ROUNDS, scaling.AGAIN * scaling.ROUNDS]
    assert "at 1:" in report.scaling_text([point])
    times["native"] = [1.04]
    point = {**scaling._measure_point(sweep, 2, "cpu"), "threads": 1}
    assert not point["slower"] and "none of them" in report.scaling_text([point])


def test_pytest_benchmarks_k_op_finds_every_op():
    """`pytest benchmarks -k OP` is the profile of a kernel."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not folder.is_dir():
        pytest.skip("not in a checkout")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(folder / "bench_ops.py")]
    run = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    names = [line for line in run.stdout.splitlines() if "::test_op[" in line]
    for op in ops.__all__:
        chosen = [name for name in names if op in name.partition("[")[2]]  # what -k OP chooses
        for rival in ("official", "compiled", "native"):
            assert any(f"-{rival}-" in name for name in chosen), (op, rival)


def test_a_busy_machine_is_named():
    row = {"case": "a", "passes": "forward", "rival": "native", "median_ms": 1.4, "min_ms": 1.0}
    results = {"machine": {"load": [0.4, 9, 9]}, "rows": [row]}
    assert not report.warnings_of(results)
    results["machine"]["load"][0] = 0.6
    row["median_ms"] = 1.6
    load, unsteady = report.warnings_of(results)
    assert "load 0.6" in load and "a forward native" in unsteady


def test_ctrl_c_leaves_the_finished_rows(tiny, tmp_path, capsys, monkeypatch, ctrl_c):
    measure = benchmark.measure

    def press(case, passes, *arguments, **options):
        if "backward" in passes:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(case, passes, *arguments, **options)

    monkeypatch.setattr(benchmark, "measure", press)
    assert bench("--quick", "--report", tmp_path) == 130
    assert str(tmp_path) in capsys.readouterr().err
    results = results_of(tmp_path)
    assert not results["finished"] and {row["passes"] for row in results["rows"]} == {"forward"}
    assert "Interrupted" in (tmp_path / report.REPORT).read_text()


def test_bad_requests(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--ops", "fly"], ("ops", "noise, energy_score", "fly")),
        (["--report", tmp_path / "file" / "x"], ("report", "cannot write")),
        (["--compare", tmp_path, tmp_path], ("quick: expected none with --compare",)),
        (["--device", "abacus"], ("device", "abacus")),
    ):
        assert bench("--quick", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and all(word in error for word in words), error
