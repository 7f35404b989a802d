"""`make gpu`: everything that needs an NVIDIA GPU, in one command of at most ten minutes.

    python benchmarks/gpu.py [--output DIR] [PART ...]

Runs with this Python and its own torch; nothing is fetched from a network. A part is a few commands
in processes of their own with a limit of time; one that fails does not stop the next, but without
an extension there is none: where it cannot be built, that of a wheel in .whl/ or dist/ is taken.
After each part what came of it goes to benchmarks/results/<device>-<date>.json, the table of rows
to the same name with .md; the whole output is in .log, rows of a benchmark that was ended from
outside are in .rows.json. Exit status: 0 if every part passed, 1 otherwise or without a GPU.
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
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = "ROWS"  # in a command: the file for the benchmark's rows
EXTENSION = "calm_rt/_C.abi3.so"
TOTAL_SECONDS = 560  # of ten minutes, with torch's import and the last part's end
LAST_LINES = 80  # of a failed part's output that are shown
RIVALS = {  # columns of the table: how many times as long they take
    "official": "x official",
    "compiled": "x compiled",
    "library": "x library",
    "liger": "x Liger",
    "library_tier": "x library tier",
}
SANITIZED = "cuda and (two_runs or views and offset and argmax)"  # of test_ops.py
WORKERS = 8  # of pytest-xdist: the laws are many small calls, of which most time passes on the host
STUCK_SECONDS = 60  # after which a test's threads are shown
CHECK = (  # ends with a reason where torch does not load the extension or it has no CUDA kernels
    "import sys, torch; from calm_rt import _native as native; "
    "sys.exit(native.why_reference('noise', 'cuda', torch.float32, {'cuda': (torch.float32,)}))"
)

Command = list[str]


@dataclass(frozen=True)
class Part:
    """One thing to do on the GPU.

    what: in words.
    seconds: kept for all of its commands, however long the parts before take; and what those leave.
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
    """As setup.py does it, whatever pip and setuptools are here; without nvcc it fails."""
    options = ["-DCALM_RT_CUDA=ON", f"-DCALM_RT_COMMIT={commit() or 'unknown'}"]
    return [
        *cmake_commands(".", "build/gpu", *options),
        ["cmake", "--install", "build/gpu", "--prefix", "."],
        [sys.executable, "-m", "calm_rt", "info"],
        *check_commands(),
    ]


def cmake_commands(source: str, folder: str, *options: str, target: str = "all") -> list[Command]:
    python = f"-DPython_EXECUTABLE={sys.executable}"
    flags = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", python, *options]
    return [
        ["cmake", "-S", source, "-B", folder, *flags],
        ["cmake", "--build", folder, "--target", target],
    ]


def check_commands() -> list[Command]:
    return [[sys.executable, "-c", CHECK]]


def pytest_command(*arguments: str, select: str = "cuda") -> Command:
    """Each test is named before it runs, so that the last names tell which one hangs."""
    if importlib.util.find_spec("pytest") is None:
        raise Missing("pytest is not installed for this Python")
    options = ["-v", "-o", f"faulthandler_timeout={STUCK_SECONDS}", "-k", select]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def law_commands() -> list[Command]:
    options = ["--durations=20"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    if importlib.util.find_spec("pytest_timeout"):  # a worker that hangs leaves the others' tests
        options += [f"--timeout={2 * STUCK_SECONDS}", "--timeout-method=thread"]
    names = "test_ops", "test_cuda", "test_select_patch", "test_survivors", "test_replay"
    return [pytest_command(*options, *(f"python_tests/{name}.py" for name in names))]


def conformance_commands() -> list[Command]:
    folder, target = "build/simulator", "simulator_conformance"
    return [
        *cmake_commands("csrc/simulator", folder, target=target),
        pytest_command("python_tests/test_primitives.py"),
    ]


def sanitizer_commands(name: str, *options: str) -> list[Command]:
    """A tool over two calls of every op, and argmax of misaligned views; our kernels alone."""
    tool = find_tool("compute-sanitizer")
    listing = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    only = "--kernel-name" if "--kernel-name" in listing else "--filter"
    tests = pytest_command("python_tests/test_ops.py", select=SANITIZED)
    options += (only, "kns=calm_rt", "--error-exitcode", "9", "--target-processes", "all")
    return [[tool, "--tool", name, *options, *tests]]


def memcheck_commands() -> list[Command]:
    # calls of the driver that torch makes to see whether they fail are no errors
    return sanitizer_commands("memcheck", "--report-api-errors", "no")


def racecheck_commands() -> list[Command]:
    return sanitizer_commands("racecheck")


def bench_commands() -> list[Command]:
    return [[sys.executable, "benchmarks/gpu_rows.py", ROWS]]


PARTS = {
    "build": Part("the extension, with this machine's torch", 200, build_commands),
    "conformance": Part(  # where a tool is missing the test would be skipped otherwise
        "each primitive, on the device as simulated",
        40,
        conformance_commands,
        {"CALM_RT_CUDA": "ON"},
    ),
    "laws": Part("every law on cuda; streams, graphs, bad input, 2^31 scores", 130, law_commands),
    "memcheck": Part(  # torch's cache would hide what lies past a tensor in a block of its own
        "memory accesses of every kernel",
        45,
        memcheck_commands,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    "racecheck": Part("races in every kernel", 45, racecheck_commands),
    "bench": Part("every op against its rivals", 100, bench_commands),
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


def run_part(name: str, part: Part, seconds: float, path: Path) -> dict[str, Any]:
    """Runs a part's commands until one fails or the time is over.

    path: of the result, beside which output and rows are written.
    returns: {"passed", "seconds", "reason" where it did not pass}.
    """
    start = time.monotonic()
    reason, log = None, path.with_suffix(".log")
    with log.open("a") as out:
        before = out.tell()
        try:
            for words in part.commands():
                command = [str(rows_beside(path)) if word == ROWS else word for word in words]
                print(f"== {name}: {' '.join(command)}", file=out, flush=True)
                left = seconds - (time.monotonic() - start)
                reason = run_command(command, left, out, part.environment)
                if reason is not None:
                    break
        except (Missing, OSError) as error:
            reason = str(error)
    result = {"passed": reason is None, "seconds": round(time.monotonic() - start, 1)}
    if reason is None:
        return result
    output = log.read_bytes()[before:].decode(errors="replace")
    print("\n".join(output.splitlines()[-LAST_LINES:]))
    return result | {"reason": reason}


def run_command(
    command: Command, seconds: float, out: Any, variables: dict[str, str]
) -> str | None:
    """Why it did not end well; None if it did. Whatever it started ends with it."""
    if seconds <= 0:
        return "no time was left"
    # in a session of its own, so that an end on time also reaches what it started
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | variables,
        stdout=out,
        stderr=out,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s: {' '.join(command)}"
    return None if status == 0 else f"exit status {status}: {' '.join(command)}"


def environment() -> dict[str, str]:
    """This process's, with programs beside this Python (cmake, ninja) and this checkout first."""
    first = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    paths = {
        name: os.pathsep.join(filter(None, (folder, os.environ.get(name))))
        for name, folder in first.items()
    }
    return {**os.environ, **paths, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}


def unpack_wheel() -> str | None:
    """Takes the extension out of a wheel that was brought here.  returns: the wheel's name."""
    for wheel in [*ROOT.glob(".whl/calm_rt-*.whl"), *ROOT.glob("dist/calm_rt-*.whl")]:
        with zipfile.ZipFile(wheel) as packed:
            if EXTENSION in packed.namelist():
                packed.extract(EXTENSION, ROOT)
                return wheel.name
    return None


def result_name(device: str, date: str) -> str:
    """h200-2026-11-25.json for an NVIDIA H200."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join([*(word for word in words if word != "nvidia"), date]) + ".json"


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes the result, and beside it the table of its rows where it has some.

    result: device, date, commit, parts, and what gpu_rows.py measured.
    """
    write_whole(path, json.dumps(result, indent=1) + "\n")
    if result.get("rows"):
        head = f"{result['device']}, {result['date']}, commit {result.get('commit', '')}"
        write_whole(path.with_suffix(".md"), f"{head}\n\n{table(result)}\n")


def write_whole(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
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


def rows_beside(path: Path) -> Path:
    """Where gpu_rows.py writes what it has measured so far, by the path of the result."""
    return path.with_suffix(".rows.json")


def read_rows(path: Path) -> dict[str, Any]:
    """The benchmark part's rows as far as it came."""
    return json.loads(path.read_text()) if path.exists() else {}


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
    start = time.monotonic()  # before torch is imported, which takes seconds
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
    date = datetime.now(UTC).isoformat(timespec="seconds")
    path = options.output / result_name(device, date[:10])  # replaces that of the same day
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_beside(path)
    for old in (path.with_suffix(".log"), rows):
        old.unlink(missing_ok=True)
    result: dict[str, Any] = {"device": device, "date": date, "commit": commit(), "parts": {}}
    names = options.parts or list(PARTS)
    for place, name in enumerate(names):
        part = PARTS[name]
        print(f"{name}: {part.what}", flush=True)
        later = sum(PARTS[other].seconds for other in names[place + 1 :])
        left = TOTAL_SECONDS - later - (time.monotonic() - start)
        outcome = run_part(name, part, left, path)
        usable = outcome["passed"] or name != "build"
        if not usable and (wheel := unpack_wheel()):
            usable = run_part(name, Part(wheel, 30, check_commands), 30, path)["passed"]
            outcome["instead"] = f"the extension of {wheel}" + ("" if usable else ", which fails")
        result["parts"][name] = outcome
        ended = ", ".join(outcome[key] for key in ("reason", "instead") if key in outcome)
        print(f"{name}: {ended or 'passed'} ({outcome['seconds']} s)", flush=True)
        write_result(result | read_rows(rows), path)
        if not usable:
            break
    result |= read_rows(rows)
    rows.unlink(missing_ok=True)  # the result has them
    if result.get("rows"):
        print(table(result))
    print(f"{path}")
    return 0 if all(outcome["passed"] for outcome in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
