"""`make gpu` without a GPU: it says so; its parts, limits and results behave."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="not in a checkout")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The program as a module, on a machine that seems to have a GPU and nothing to do."""
    spec = importlib.util.spec_from_file_location("gpu", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(module, "ROWS", tmp_path / "rows.json")
    return module


def part(gpu, program: str, seconds: float = 60):
    return gpu.Part("a test", seconds, lambda: [[sys.executable, "-c", program]])


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
        third=part(gpu, "pass"),
    )
    assert status == 1
    assert [outcome["passed"] for outcome in result["parts"].values()] == [False, False, True]
    assert "exit status 3" in result["parts"]["first"]["reason"]
    assert result["parts"]["second"]["reason"] == "no such tool here"
    assert "why it failed" in capsys.readouterr().out


def test_a_part_ends_at_its_limit_with_what_it_started(gpu, monkeypatch, tmp_path) -> None:
    """The command's own child would write a file after the limit."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    status, result = run(gpu, monkeypatch, tmp_path / "results", slow=part(gpu, program, seconds=1))
    assert status == 1 and "stopped after 1 s" in result["parts"]["slow"]["reason"]
    time.sleep(max(0, start + 3 - time.monotonic()))
    assert not late.exists()


def test_a_part_has_its_own_environment(gpu, monkeypatch, tmp_path) -> None:
    environments = {name: one.environment for name, one in gpu.PARTS.items() if one.environment}
    assert environments == {
        "build": {"CALM_RT_CUDA": "ON"},
        "sanitizer": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    }
    monkeypatch.setenv("CALM_RT_CUDA", "AUTO")
    one = part(gpu, "import os; assert os.environ['CALM_RT_CUDA'] == 'ON'")
    needs_it = dataclasses.replace(one, environment=environments["build"])
    status, result = run(gpu, monkeypatch, tmp_path / "results", needs_it=needs_it, plain=one)
    assert status == 1
    assert [outcome["passed"] for outcome in result["parts"].values()] == [True, False]


def test_the_sanitizer_sees_the_warpgroups_kernel(gpu, monkeypatch) -> None:
    """In both types, and misaligned. -k takes the names of tests as they are on a GPU."""
    monkeypatch.setattr(gpu, "find_tool", lambda name: sys.executable)
    *_, selected, file = gpu.sanitizer_commands()[0]
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


def test_parts_share_ten_minutes(gpu, monkeypatch, tmp_path) -> None:
    assert sum(one.seconds for one in gpu.PARTS.values()) <= gpu.TOTAL_SECONDS == 600
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0)
    status, result = run(gpu, monkeypatch, tmp_path / "results", one=part(gpu, "pass"))
    assert status == 1 and result["parts"]["one"]["reason"] == "no time was left"


def test_results_name_device_date_and_commit(gpu, monkeypatch, tmp_path, capsys) -> None:
    row = {"case": "noise-x", "passes": "forward", "dtype": "float32", "flop": 5e9, "bytes": 2e9}
    measured = {
        "limits": {"copy": 4e12, "product": {"float32": 5e13}},
        "rows": [
            {**row, "rival": "native", "median_ms": 1.0},
            {**row, "rival": "official", "median_ms": 12.0},
        ],
    }
    program = f"open({str(gpu.ROWS)!r}, 'w').write({json.dumps(measured)!r})"
    status, result = run(gpu, monkeypatch, tmp_path / "results", bench=part(gpu, program))
    assert status == 0 and result["rows"] == measured["rows"]
    assert result["device"] == "NVIDIA H200" and {"date", "commit"} <= set(result)
    path = tmp_path / "results" / f"h200-{result['date'][:10]}.md"
    assert {other.name for other in path.parent.iterdir()} == {path.name, f"{path.stem}.json"}
    printed = capsys.readouterr().out
    head, _, *table = path.read_text().splitlines()
    assert head.startswith(f"NVIDIA H200, {result['date']}, commit ")
    assert "| noise-x | forward | 1 | 12 |  |  |  |  | 50% | 10% |" in table
    assert "\n".join(table) in printed and len({line.count("|") for line in table}) == 1


def test_results_of_a_run_without_the_benchmark_hold_no_older_rows(
    gpu, monkeypatch, tmp_path
) -> None:
    gpu.ROWS.write_text(json.dumps({"rows": [{"case": "of an earlier run"}]}))
    status, result = run(gpu, monkeypatch, tmp_path / "results", one=part(gpu, "pass"))
    assert status == 0 and "rows" not in result
    assert not list((tmp_path / "results").glob("*.md"))


def test_results_are_written_whole_or_not_at_all(gpu, tmp_path) -> None:
    result = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05"}
    path = gpu.write_result(result, tmp_path)
    assert path.name == "h100-80gb-hbm3-2026-01-02.json"
    with pytest.raises(TypeError):
        gpu.write_result({**result, "parts": object()}, tmp_path)
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
