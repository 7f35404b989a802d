"""Every op at its large cases against its rivals, measured so that the ratios can be trusted.

The rivals of a case run in one process and take turns, round by round, so that whatever slows the
machine for a while hits all of them; the median of the rounds counts. `official` is the official
code's formula in eager PyTorch, `compiled` torch.compile of it, `library` torch's own function,
`liger` Liger's where it is installed beside a GPU, `native` the kernel. Official and compiled draw
with torch's generator, the kernel with Philox by position. On a GPU its own clock counts, and L2
holds nothing of a call before. report.py writes what is measured here.
"""

import contextlib
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calm_rt import _native, costs, library, official, ops
from calm_rt.environment import info
from calm_rt.ops.check import check
from calm_rt.testing import CASES, Case

RIVALS = ("official", "compiled", "library", "liger", "native")
QUICK_RIVALS = ("official", "library", "native")
QUICK_ROUNDS = 5  # a case that gets fewer takes long: a quick run leaves it out
SAMPLE_SECONDS = 1e-3  # one timing lasts as long at least; shorter calls are repeated
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # far beyond any cache
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
ERASED_BYTES = 1 << 28  # more than any GPU's L2, so that writing them leaves nothing else there
LIMIT_ROUNDS = 15  # the fastest counts: a limit is what the machine can do

Call = Callable[[], object]


def benchmark_cases(names: Sequence[str] | None = None) -> list[Case]:
    """The benchmark cases of these ops, or of all.

    raises: ValueError for an op without one.
    """
    cases = [case for case in CASES if case.benchmark]
    known = list(dict.fromkeys(case.op for case in cases))
    for name in names or ():
        check(name in known, "ops", f"some of {', '.join(known)}", name)
    return [case for case in cases if names is None or case.op in names]


def rivals_of(case: Case, among: Sequence[str] = RIVALS, device: str = "cpu") -> list[str]:
    """Those of the rivals that the case has on the device."""
    absent = set() if hasattr(library, case.op) else {"library"}
    if device != "cuda" or library.liger(case.op) is None:
        absent.add("liger")
    return [rival for rival in among if rival not in absent]


def passes_of(case: Case) -> list[str]:
    return ["forward", *(["forward+backward"] if case.gradients else [])]


def make_arguments(case: Case, rival: str, device: str) -> dict[str, Any]:
    """The case's arguments as this rival takes them."""
    return case.make(device=device, official=rival in ("official", "compiled"))


def contender(case: Case, rival: str, arguments: dict[str, Any], backward: bool) -> Call:
    """A call that runs the op once; the caller resets torch's compiler between cases."""
    module = {"native": ops, "library": library}.get(rival, official)
    function = library.liger(case.op) if rival == "liger" else getattr(module, case.op)
    if rival == "compiled":
        function = torch.compile(function)
    leaves = case.leaves(arguments)

    def forward() -> object:
        with torch.no_grad():
            return function(**arguments)

    def both() -> object:
        return torch.autograd.grad(function(**arguments).sum(), leaves)

    return both if backward else forward


def route(rival: str) -> _native.backend:
    """The native rival may not fall back, and the reference runs no kernel."""
    return _native.backend(rival if rival in _native.BACKENDS else "auto")


def compete(
    calls: dict[str, Call],
    device: str,
    rounds: int,
    seconds: float = math.inf,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Times calls against each other; every round times each once, in an order that turns.

    rounds: at most; at least 3, and no more once `seconds` are over.
    failed: takes the errors of rivals, which are left out from there on; None raises them.
    returns: seconds of one call, for each rival a list of the rounds.
    """
    repeats = {}
    for rival, call in calls.items():
        with route(rival), _error_in(failed, rival):
            _timed(call, 1, device)  # compiles, and fills the allocator
            repeats[rival] = max(1, math.ceil(SAMPLE_SECONDS / _timed(call, 1, device)))
    times: dict[str, list[float]] = {rival: [] for rival in repeats}
    order, end = list(repeats), time.perf_counter() + seconds
    with _no_garbage_collection():
        for count in range(rounds):
            if count >= min(3, rounds) and time.perf_counter() > end:
                break
            for rival in order:
                with route(rival), _error_in(failed, rival):
                    times[rival].append(_timed(calls[rival], repeats[rival], device))
            order = [rival for rival in order[1:] + order[:1] if rival not in (failed or ())]
    return {rival: times[rival] for rival in repeats if rival in order}


@contextlib.contextmanager
def _error_in(failed: dict[str, str] | None, rival: str) -> Iterator[None]:
    """Puts an error there, if that is a place and the rival not native, which must not fail."""
    try:
        yield
    except Exception as error:
        if failed is None or rival == "native":
            raise
        failed[rival] = f"{type(error).__name__}: {error}"


def measure(
    case: Case,
    passes: str,
    rivals: Sequence[str],
    device: str,
    rounds: int,
    memory: bool,
    failed: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one case and pass, one a rival.

    failed: takes the errors of rivals (of memory, say, or of a compiler); None raises them.
    """
    backward = "backward" in passes
    torch.compiler.reset()
    arguments, calls = {}, {}
    for rival in rivals:
        with _error_in(failed, rival):
            arguments[rival] = make_arguments(case, rival, device)
            calls[rival] = contender(case, rival, arguments[rival], backward)
    times = compete(calls, device, rounds, failed=failed)
    cost = getattr(costs, case.op)(backward, **arguments["native"])
    gradient = sum(leaf.nbytes for leaf in case.leaves(arguments["native"])) if backward else 0
    rows = []
    for rival in times:
        peak = None
        with _error_in(failed, f"{rival}, memory"):
            peak = peak_memory(case, rival, backward, device) if memory else None
        rows.append(
            {
                "kind": "op",
                "op": case.op,
                "case": str(case),
                "passes": passes,
                "device": device,
                "dtype": str(case.dtype).removeprefix("torch."),
                "rival": rival,
                "median_ms": 1e3 * statistics.median(times[rival]),
                "min_ms": 1e3 * min(times[rival]),
                "max_ms": 1e3 * max(times[rival]),
                "rounds": len(times[rival]),
                "peak_extra_bytes": peak,
                "gradient_bytes": gradient,
                "flop": cost.flop,
                "bytes": cost.bytes,
                "flop_int8": cost.screened if device == "cpu" else 0,
            }
        )
    return rows


def measure_all(
    cases: Iterable[Case], device: str, quick: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every case and pass, as they are finished.

    quick: fewer rounds, without torch.compile, memory and the longest cases.
    """
    chosen = [case for case in cases if not (quick and case.rounds < QUICK_ROUNDS)]
    work = [(case, passes) for case in chosen for passes in passes_of(case)]
    bar = tqdm(work, unit="row", leave=False, disable=None)
    for case, passes in bar:
        bar.set_postfix_str(f"{case} {passes}")
        rivals = rivals_of(case, QUICK_RIVALS if quick else RIVALS, device)
        rounds = QUICK_ROUNDS if quick else case.rounds
        yield measure(case, passes, rivals, device, rounds, memory=not quick)


def machine(device: str) -> dict[str, Any]:
    """Where and with what the rows are measured."""
    report = info()
    build = report["build"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": build.get("isa", ""),
        "torch": report["torch"],
        "python": report["python"],
        "platform": report["platform"],
        "calm_rt": report["calm_rt"],
        "commit": _commit() or build.get("commit", ""),
        "built_from": build.get("commit", ""),
        "load": list(os.getloadavg()),  # what else ran here at the start
    }


def limits(device: str) -> dict[str, Any]:
    """What this machine can do now: bytes a second of a copy, FLOP a second of a library product.

    returns: {"copy": bytes/s, "product": {dtype: FLOP/s}}; int8 on a CPU only, where a kernel
        screens in it.
    """
    bytes_copied, size = COPY_BYTES[device], PRODUCT_SIZE[device]
    source = torch.randn(bytes_copied // 4, device=device)
    target = torch.empty_like(source)
    [copies] = compete({"copy": lambda: target.copy_(source)}, device, LIMIT_ROUNDS).values()
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        # a GPU multiplies ones faster than numbers that need all their bits
        matrix = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(matrix)
        call = {"product": lambda a=matrix, b=out: torch.mm(a, a, out=b)}
        [products] = compete(call, device, LIMIT_ROUNDS).values()
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(products)
    if device == "cpu" and hasattr(torch, "_int_mm"):
        whole = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        call = {"product": lambda: torch._int_mm(whole, whole.t())}
        call["transposed"] = lambda: torch._int_mm(whole, whole)
        times = compete(call, device, LIMIT_ROUNDS).values()
        rates["int8"] = 2 * size**3 / min(map(min, times))
    return {"copy": 2 * bytes_copied / min(copies), "product": rates}


def peak_memory(case: Case, rival: str, backward: bool, device: str) -> int:
    """Bytes that one warm call needs beyond its arguments; on the CPU in a process of its own."""
    if device == "cuda":
        return peak_on_gpu(contender(case, rival, make_arguments(case, rival, device), backward))
    return probed(__name__, str(case), rival, str(int(backward)))


def peak_on_gpu(call: Call) -> int:
    """Bytes that one warm call takes beyond what is there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def probed(module: str, *arguments: str) -> int:
    """What a module prints as its last line in a process of its own: bytes."""
    command = [sys.executable, "-m", module, *arguments]
    # memory that was freed goes back at once, or a warm heap would hide what a call takes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: the memory probe failed:\n{result.stderr}")
    return int(result.stdout.splitlines()[-1])


def growth(call: Call) -> int:
    """Growth of this process's resident memory during a call, the library and the compiler being
    warm."""
    call()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return _resident("VmHWM") - before


def _probe_memory(name: str, rival: str, backward: bool) -> int:
    [case] = [case for case in CASES if str(case) == name]
    return growth(contender(case, rival, make_arguments(case, rival, "cpu"), backward))


def _resident(field: str) -> int:
    """VmRSS, resident memory now, or VmHWM, its peak; in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _timed(call: Call, repeats: int, device: str) -> float:
    """Seconds of one call, the mean of so many."""
    if device == "cuda":
        return _timed_by_events(call, repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _timed_by_events(call: Call, repeats: int) -> float:
    """The same by the GPU's clock, which also counts where it waits for the host to issue work."""
    eraser = _eraser()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        eraser.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats


@functools.cache
def _eraser() -> torch.Tensor:
    """Memory to write over whatever L2 holds."""
    return torch.empty(ERASED_BYTES, dtype=torch.uint8, device="cuda")


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would be charged to whoever runs when it comes."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def processor_name() -> str:
    """As Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that this file is in, with -dirty after changes; empty outside of one."""
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


if __name__ == "__main__":
    print(_probe_memory(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
