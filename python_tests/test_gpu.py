"""`make gpu` without a GPU: it says so; its parts, limits and results behave."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="not in a checkout")


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module, on a machine that seems to have a GPU and nothing to do."""
    spec = importlib.util.spec_from_file_location("gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "device_name", lambda: "NVIDIA H200")
    return module


def part(gpu, program: str, *arguments: str):
    """A command that runs a program, with its arguments."""
    return gpu.Part("a test", 60, lambda: [[sys.executable, "-c", program, *arguments]])


def run(gpu, monkeypatch, folder: Path, **parts) -> tuple[int, dict]:
    """Exit status and what was written."""
    monkeypatch.setattr(gpu, "PARTS", parts)
    status = gpu.main(["--output", str(folder)])
    [path] = folder.glob("*.json")
    return status, json.loads(path.read_text())


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, PROGRAM, "build"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and "torch sees no NVIDIA GPU here" in result.stderr
    assert result.stdout == ""


def test_an_unknown_part_is_named(gpu, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["lows"])
    assert "got 'lows'" in capsys.readouterr().err


def test_a_failed_part_does_not_stop_the_next(gpu, monkeypatch, tmp_path, capsys) -> None:
    def missing():
        raise gpu.Missing("no such tool here")

    status, result = run(
        gpu,
        monkeypatch,
        tmp_path / "results",
        first=part(gpu, "print('why it failed'); raise SystemExit(3)"),
        second=gpu.Part("needs a tool", 60, missing),
        third=gpu.Part("starts no program", 60, lambda: [["calm-rt-of-nowhere", "--fast"]]),
        fourth=part(gpu, "print('of the fourth')"),
    )
    assert status == 1
    passed = [outcome["passed"] for outcome in result["parts"].values()]
    assert passed == [False, False, False, True]
    assert "exit status 3" in result["parts"]["first"]["reason"]
    assert result["parts"]["second"]["reason"] == "no such tool here"
    assert "calm-rt-of-nowhere" in result["parts"]["third"]["reason"]
    printed = capsys.readouterr().out
    assert "why it failed" in printed and "of the fourth\n" not in printed
    [log] = (tmp_path / "results").glob("*.log")
    assert "why it failed\n== third: calm-rt-of-nowhere --fast\n== fourth" in log.read_text()
    assert log.read_text().endswith("of the fourth\n")


def test_a_part_ends_at_its_limit_with_what_it_started(gpu, monkeypatch, tmp_path) -> None:
    """The command's own child would write a file after the limit."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 61.5)  # but for what is kept for the second
    status, result = run(
        gpu, monkeypatch, tmp_path / "results", slow=part(gpu, program), next=part(gpu, "pass")
    )
    assert status == 1 and "stopped after 1 s" in result["parts"]["slow"]["reason"]
    assert result["parts"]["next"]["passed"]
    time.sleep(max(0, start + 3 - time.monotonic()))
    assert not late.exists()


def test_a_part_has_its_own_environment(gpu, monkeypatch, tmp_path) -> None:
    environments = {name: one.environment for name, one in gpu.PARTS.items() if one.environment}
    assert environments == {
        "conformance": {"CALM_RT_CUDA": "ON"},
        "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    }
    monkeypatch.setenv("CALM_RT_CUDA", "AUTO")
    one = part(gpu, "import os; assert os.environ['CALM_RT_CUDA'] == 'ON'")
    needs_it = dataclasses.replace(one, environment=environments["conformance"])
    status, result = run(gpu, monkeypatch, tmp_path / "results", needs_it=needs_it, plain=one)
    assert status == 1
    assert [outcome["passed"] for outcome in result["parts"].values()] == [True, False]


def test_the_sanitizer_sees_the_warpgroups_kernel(gpu, monkeypatch) -> None:
    """In both types, and misaligned. -k takes the names of tests as they are on a GPU."""
    monkeypatch.setattr(gpu, "find_tool", lambda name: sys.executable)
    [command], [other] = gpu.memcheck_commands(), gpu.racecheck_commands()
    tools = [" ".join(one[2 : one.index(gpu.SANITIZED)]) for one in (command, other)]
    assert tools[0].startswith("memcheck --report-api-errors no --") and "report" not in tools[1]
    *_, selected, file = command
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-k"]
    selected = selected.replace("cuda", "cpu")  # where the same cases are collected
    result = subprocess.run([*collect, selected, file], cwd=ROOT, capture_output=True, text=True)
    for case in (
        "linear_argmax-R130-H72-V311",
        "linear_argmax-R130-H328-V311-bf16",
        "decode-R70-K4-H16",
    ):
        assert f"::test_two_runs_are_bitwise_equal[cpu-{case}]" in result.stdout
        if "argmax" in case:
            assert f"::test_views_equal_contiguous[cpu-{case}-_offset]" in result.stdout


def test_parts_share_less_than_ten_minutes(gpu, monkeypatch, tmp_path) -> None:
    assert sum(one.seconds for one in gpu.PARTS.values()) <= gpu.TOTAL_SECONDS <= 560
    assert list(gpu.PARTS) == "build conformance laws memcheck racecheck bench".split()
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0)
    status, result = run(gpu, monkeypatch, tmp_path / "results", one=part(gpu, "pass"))
    assert status == 1 and result["parts"]["one"]["reason"] == "no time was left"


def test_commands_find_this_pythons_programs_and_this_checkout(gpu, monkeypatch, tmp_path) -> None:
    """Where nothing of that is set, as when this Python is called by its path."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.symlink_to(sys.executable)  # a resolved path would lead elsewhere
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    made = gpu.environment()
    assert made["PATH"] == f"{tmp_path}/bin:/usr/bin"
    assert made["PYTHONPATH"] == f"{ROOT}:/tmp/site"
    monkeypatch.delenv("PYTHONPATH")
    assert gpu.environment()["PYTHONPATH"] == str(ROOT)


def test_a_test_that_hangs_is_named(gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu, "STUCK_SECONDS", 1)
    test = tmp_path / "test_cuda.py"
    test.write_text("import time\n\ndef test_deadlock():\n    time.sleep(3)\n")
    log = tmp_path / "log"
    for parallel in ([], ["-n", "1"] if importlib.util.find_spec("xdist") else []):
        with log.open("w") as out:
            gpu.run_command(gpu.pytest_command(*parallel, str(test)), 60, out, {})
        before, found, _ = log.read_text().partition('test_cuda.py", line 4 in test_deadlock')
        assert found and "test_cuda.py::test_deadlock" in before


def test_without_an_extension_nothing_else_runs(gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    parts = {"build": part(gpu, "raise SystemExit(1)"), "laws": part(gpu, "pass")}
    status, result = run(gpu, monkeypatch, tmp_path / "results", **parts)
    assert status == 1 and list(result["parts"]) == ["build"]


@pytest.mark.parametrize("works", [True, False])
def test_the_extension_of_a_wheel_serves_where_none_can_be_built(
    gpu, monkeypatch, tmp_path, works: bool
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "CHECK", "" if works else "raise SystemExit('built without CUDA')")
    (tmp_path / ".whl").mkdir()
    name = "calm_rt-0.1.0-cp311-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(tmp_path / ".whl" / name, "w") as wheel:
        wheel.writestr(gpu.EXTENSION, "machine code")
    parts = {"build": part(gpu, "raise SystemExit(1)"), "laws": part(gpu, "pass")}
    status, result = run(gpu, monkeypatch, tmp_path / "results", **parts)
    assert status == 1 and (tmp_path / gpu.EXTENSION).read_text() == "machine code"
    instead = f"the extension of {name}" + ("" if works else ", which fails")
    assert result["parts"]["build"]["instead"] == instead
    assert list(result["parts"]) == (["build", "laws"] if works else ["build"])


def test_results_name_device_date_and_commit(gpu, monkeypatch, tmp_path, capsys) -> None:
    row = {"case": "noise-x", "passes": "forward", "dtype": "float32", "flop": 5e9, "bytes": 2e9}
    measured = {
        "limits": {"copy": 4e12, "product": {"float32": 5e13}},
        "rows": [
            {**row, "rival": "native", "median_ms": 1.0},
            {**row, "rival": "official", "median_ms": 12.0},
        ],
    }
    program = f"import sys; open(sys.argv[1], 'w').write({json.dumps(measured)!r})"
    status, result = run(gpu, monkeypatch, tmp_path / "results", bench=part(gpu, program, gpu.ROWS))
    assert status == 0 and result["rows"] == measured["rows"]
    assert result["device"] == "NVIDIA H200" and {"date", "commit"} <= set(result)
    path = tmp_path / "results" / f"h200-{result['date'][:10]}.md"
    endings = {other.name.removeprefix(path.stem) for other in path.parent.iterdir()}
    assert endings == {".md", ".json", ".log"}
    printed = capsys.readouterr().out
    head, _, *table = path.read_text().splitlines()
    assert head.startswith(f"NVIDIA H200, {result['date']}, commit ")
    assert "| noise-x | forward | 1 | 12 |  |  |  |  | 50% | 10% |" in table
    assert "\n".join(table) in printed and len({line.count("|") for line in table}) == 1


def test_results_of_a_run_without_the_benchmark_hold_no_older_rows(
    gpu, monkeypatch, tmp_path
) -> None:
    _, result = run(gpu, monkeypatch, tmp_path / "results", one=part(gpu, "print('first')"))
    [path] = (tmp_path / "results").glob("*.json")
    gpu.rows_beside(path).write_text(json.dumps({"rows": [{"case": "of an earlier run"}]}))
    status, result = run(gpu, monkeypatch, tmp_path / "results", one=part(gpu, "pass"))
    assert status == 0 and "rows" not in result
    assert not list((tmp_path / "results").glob("*.md"))
    assert "first" not in path.with_suffix(".log").read_text()


def test_an_end_from_outside_leaves_what_was_measured(gpu, monkeypatch, tmp_path) -> None:
    """Results of the parts before, rows and output of the one that ran, in few files."""
    program = "import os, sys; open(sys.argv[1], 'w').write('{}'); print('half'); os._exit(0)"
    run_command = gpu.run_command

    def end(command, *arguments):
        run_command(command, *arguments)
        if "half" in command[-2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_command", end)
    parts = {"laws": part(gpu, "pass"), "bench": part(gpu, program, gpu.ROWS)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--output", str(tmp_path / "a" / "b")])
    files = {path.name.partition(".")[2]: path for path in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"json", "rows.json", "log"}
    assert list(json.loads(files["json"].read_text())["parts"]) == ["laws"]
    assert files["rows.json"].read_text() == "{}" and "half" in files["log"].read_text()


def test_results_are_written_whole_or_not_at_all(gpu, tmp_path) -> None:
    result = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05"}
    assert gpu.result_name(result["device"], "2026-01-02") == "h100-80gb-hbm3-2026-01-02.json"
    path = tmp_path / "result.json"
    gpu.write_result(result, path)
    with pytest.raises(TypeError):
        gpu.write_result({**result, "parts": object()}, path)
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == result


@pytest.fixture
def gpu_rows():
    spec = importlib.util.spec_from_file_location("gpu_rows", PROGRAM.with_name("gpu_rows.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_large_case_is_an_op_with_a_cost(gpu_rows) -> None:
    from calm_rt import benchmark, costs

    assert {case.op for case in gpu_rows.CASES} == {case.op for case in benchmark.benchmark_cases()}
    assert all(callable(getattr(costs, case.op)) for case in gpu_rows.CASES)
    assert set(gpu_rows.TIER_CASES) < set(map(str, gpu_rows.CASES))


def test_what_fails_leaves_the_others(gpu_rows, monkeypatch, tmp_path) -> None:
    """A rival, the profiler, or a whole case."""

    def measure(case, passes, rivals, *_, failed, **__):
        if case.op == "noise":
            raise ValueError("of noise itself")
        failed["compiled"] = "of a rival"
        return [{"case": str(case), "rival": rival} for rival in rivals if rival != "compiled"]

    def kernel_times(case, backward):
        if case.op == "encode":
            raise RuntimeError("of the profiler")
        return {"kernel": 1.0}

    monkeypatch.setattr(gpu_rows.benchmark, "measure", measure)
    monkeypatch.setattr(gpu_rows.benchmark, "machine", lambda device: {})
    monkeypatch.setattr(gpu_rows.benchmark, "limits", lambda device: {})
    monkeypatch.setattr(gpu_rows, "kernel_times", kernel_times)
    monkeypatch.setattr(gpu_rows, "measure_tier", lambda path: [{"rival": "library_tier"}])
    assert gpu_rows.main(tmp_path / "rows.json") == 1
    result = json.loads((tmp_path / "rows.json").read_text())
    assert list(result["errors"].values()) == ["of noise itself"]
    tier, *rows = result["rows"]
    assert tier == {"rival": "library_tier"} and {"official", "native"} <= {
        row["rival"] for row in rows
    }
    native = [row for row in rows if row["rival"] == "native"]
    assert len(native) == len(gpu_rows.CASES) - 1
    for row in native:
        failed = {"compiled": "of a rival"}
        if row["case"].startswith("encode"):
            failed["kernels"] = "RuntimeError: of the profiler"
        assert row["failed"] == failed and ("kernels" in row) == ("kernels" not in failed)


def test_rows_are_those_of_rivals_that_ran(monkeypatch) -> None:
    from calm_rt import benchmark, official, testing

    case = next(case for case in testing.CASES if str(case) == "noise-normal")
    monkeypatch.setattr(official, "noise", None)
    monkeypatch.setattr(benchmark, "peak_memory", None)
    arguments, failed = ("forward", ["official", "native"], "cpu", 1, True), {}
    [row] = benchmark.measure(case, *arguments, failed=failed)
    assert row["rival"] == "native" and row["median_ms"] > 0 and row["peak_extra_bytes"] is None
    assert list(failed) == ["official", "native, memory"]
    with pytest.raises(TypeError):
        benchmark.measure(case, *arguments)
