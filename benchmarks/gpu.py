"""`make gpu`: everything that needs an NVIDIA GPU, in one command of at most ten minutes.

    python benchmarks/gpu.py [--output DIR] [PART ...]

Runs with this Python and its own torch; nothing is fetched from a network. A part is a few commands
in processes of their own with a limit of time; one that fails does not stop the next. What came of
them goes to benchmarks/results/<device>-<date>.json, the table of rows to the same name with .md,
the whole output of a part to build/gpu/<part>.log. Exit status: 0 if every part passed, 1 otherwise
or without a GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
ROWS = BUILD / "rows.json"  # what gpu_rows.py has measured so far
TOTAL_SECONDS = 600
LAST_LINES = 25  # of a failed part's output that are shown
RIVALS = {  # columns of the table: how many times as long they take
    "official": "x official",
    "compiled": "x compiled",
    "library": "x library",
    "liger": "x Liger",
    "library_tier": "x library tier",
}
SANITIZED = "cuda and (two_runs or views and offset and argmax)"  # of test_ops.py
WORKERS = 8  # of pytest-xdist: the laws are many small calls, of which most time passes on the host

Command = list[str]


@dataclass(frozen=True)
class Part:
    """One thing to do on the GPU.

    what: in words.  seconds: for all of its commands.
    commands: makes them, or raises Missing.
    environment: variables that its commands get beside this process's own.
    """

    what: str
    seconds: int
    commands: Callable[[], list[Command]]
    environment: dict[str, str] = field(default_factory=dict)


class Missing(Exception):
    """A tool that a part needs is not on this machine."""


def build_commands() -> list[Command]:
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    return [
        [sys.executable, "-m", "pip", *install],
        [sys.executable, "-m", "calm_rt", "info"],
    ]


def pytest_command(*arguments: str, select: str = "cuda") -> Command:
    if importlib.util.find_spec("pytest") is None:
        raise Missing("pytest is not installed for this Python")
    return [sys.executable, "-m", "pytest", "-q", "-k", select, *arguments]


def law_commands() -> list[Command]:
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    names = "test_ops", "test_cuda", "test_select_patch", "test_survivors", "test_replay"
    return [pytest_command(*parallel, *(f"python_tests/{name}.py" for name in names))]


def conformance_commands() -> list[Command]:
    folder, python = "build/simulator", f"-DPython_EXECUTABLE={sys.executable}"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", python]
    return [
        ["cmake", "-S", "csrc/simulator", "-B", folder, *options],
        ["cmake", "--build", folder, "--target", "simulator_conformance"],
        pytest_command("python_tests/test_primitives.py"),
    ]


def sanitizer_commands() -> list[Command]:
    """Both tools over two calls of every op, and argmax of misaligned views; our kernels alone."""
    tool = find_tool("compute-sanitizer")
    listing = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    only = "--kernel-name" if "--kernel-name" in listing else "--filter"
    tests = pytest_command("python_tests/test_ops.py", select=SANITIZED)
    options = [only, "kns=calm_rt", "--error-exitcode", "9", "--target-processes", "all"]
    return [[tool, "--tool", name, *options, *tests] for name in ("memcheck", "racecheck")]


def bench_commands() -> list[Command]:
    return [[sys.executable, "benchmarks/gpu_rows.py", str(ROWS)]]


PARTS = {
    "build": Part(  # without nvcc it fails, where AUTO would leave the kernels out
        "the extension, with this machine's torch", 150, build_commands, {"CALM_RT_CUDA": "ON"}
    ),
    "laws": Part("every law on cuda; streams, graphs, bad input, 2^31 scores", 160, law_commands),
    "conformance": Part("each primitive, on the device as simulated", 40, conformance_commands),
    "sanitizer": Part(  # torch's cache would hide what lies past a tensor in a block of its own
        "memcheck and racecheck over every kernel",
        90,
        sanitizer_commands,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    "bench": Part("every op against its rivals", 160, bench_commands),
}


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit.  raises: Missing."""
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parent) if nvcc else ""
    folders = os.pathsep.join([beside, "/usr/local/cuda/bin"])
    path = shutil.which(name) or shutil.which(name, path=folders)
    if path is None:
        raise Missing(f"{name} is neither on PATH nor beside nvcc")
    return path


def device_name() -> str | None:
    """Of the first GPU that torch sees; None where there is none."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run_part(name: str, part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part's commands until one fails or the time is over.

    seconds: what is left of all parts' time; the part's own limit holds too.
    returns: {"passed", "seconds", "reason" where it did not pass}.
    """
    start = time.monotonic()
    limit = min(part.seconds, seconds)
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{name}.log"
    reason = None
    try:
        with log.open("w") as out:
            for command in part.commands():
                left = limit - (time.monotonic() - start)
                reason = run_command(command, left, out, part.environment)
                if reason is not None:
                    break
    except Missing as missing:
        reason = str(missing)
    result = {"passed": reason is None, "seconds": round(time.monotonic() - start, 1)}
    if reason is None:
        return result
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:]))
    return result | {"reason": reason}


def run_command(
    command: Command, seconds: float, out: Any, variables: dict[str, str]
) -> str | None:
    """Why it did not end well; None if it did. Whatever it started ends with it."""
    if seconds <= 0:
        return "no time was left"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2", **variables}
    # in a session of its own, so that an end on time also reaches what it started
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
    )
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s: {' '.join(command)}"
    return None if status == 0 else f"exit status {status}: {' '.join(command)}"


def result_name(device: str, date: str) -> str:
    """h200-2026-11-25.json for an NVIDIA H200."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join([*(word for word in words if word != "nvidia"), date]) + ".json"


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Writes the result, and beside it the table of its rows where it has some; those of the same
    device and day are replaced.

    result: device, date, commit, parts, and what gpu_rows.py measured.
    returns: path of the result.
    """
    path = folder / result_name(result["device"], result["date"][:10])
    write_whole(path, json.dumps(result, indent=1) + "\n")
    if result.get("rows"):
        head = f"{result['device']}, {result['date']}, commit {result.get('commit', '')}"
        write_whole(path.with_suffix(".md"), f"{head}\n\n{table(result)}\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes the file whole or not at all, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".unfinished-", delete=False
    )
    with unfinished as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def commit() -> str:
    """Of this checkout, with -dirty after changes; empty where git does not know."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def read_rows() -> dict[str, Any]:
    """The benchmark part's rows as far as it came."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else {}


def table(result: dict[str, Any]) -> str:
    """Native rows against their rivals and against what the device can do, in Markdown."""
    rows = result.get("rows", [])
    times = {(row["case"], row["passes"], row["rival"]): row["median_ms"] for row in rows}
    lines = [
        f"| case | passes | ms | {' | '.join(RIVALS.values())} | % of copy | % of GEMM |",
        "|---|---|---|" + "---|" * len(RIVALS) + "---|---|",
    ]
    for row in rows:
        if row["rival"] != "native":
            continue
        key, seconds = (row["case"], row["passes"]), row["median_ms"] / 1e3
        ratios = [times.get((*key, rival)) for rival in RIVALS]
        shown = ["" if ms is None else f"{ms / row['median_ms']:.3g}" for ms in ratios]
        product = result["limits"]["product"].get(row["dtype"])
        shares = [
            f"{row['bytes'] / seconds / result['limits']['copy']:.0%}",
            "" if product is None else f"{row['flop'] / seconds / product:.0%}",
        ]
        cells = [*key, f"{row['median_ms']:.4g}", *shown, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"parts: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    device = device_name()
    if device is None:
        print(
            "make gpu: torch sees no NVIDIA GPU here, so there is nothing to run; "
            "`make test` runs the CUDA kernels in the simulator",
            file=sys.stderr,
        )
        return 1
    start, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    ROWS.unlink(missing_ok=True)  # of an earlier run
    result: dict[str, Any] = {"device": device, "date": date, "commit": commit(), "parts": {}}
    for name in options.parts or PARTS:
        part = PARTS[name]
        print(f"{name}: {part.what}", flush=True)
        left = TOTAL_SECONDS - (time.monotonic() - start)
        outcome = run_part(name, part, left)
        result["parts"][name] = outcome
        print(f"{name}: {outcome.get('reason', 'passed')} ({outcome['seconds']} s)", flush=True)
        path = write_result(result | read_rows(), options.output)
    result |= read_rows()
    if result.get("rows"):
        print(table(result))
    print(f"{path}")
    return 0 if all(outcome["passed"] for outcome in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
