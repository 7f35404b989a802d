"""Every op at its large cases: the official formula, torch.compile of it and the kernel.

    pytest benchmarks -k energy_score

Each group prints its rows together; a `library` row is torch's own function, where it has one.
`extra_info` holds the device, the threads, the peak of extra memory and the size of the gradient
to compare it with. Official and compiled draw with torch's generator, the kernel with Philox by
position.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import library
import pytest
import torch

import calm_rt
from calm_rt import _native, official, ops
from calm_rt.testing import CASES, Case

BENCHMARKS = [case for case in CASES if case.benchmark and case.op not in _native.REFERENCE_ONLY]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RIVALS = ("official", "compiled", "library", "native")
PASSES = ("forward", "forward+backward")


def contender(case: Case, rival: str, arguments: dict, backward: bool):
    """A call without arguments that runs the op once."""
    module = {"native": ops, "library": library}.get(rival, official)
    function = getattr(module, case.op)
    if rival == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function)
    leaves = case.leaves(arguments)

    def forward():
        with torch.no_grad():
            return function(**arguments)

    def both():
        return torch.autograd.grad(function(**arguments).sum(), leaves)

    return both if backward else forward


def make(case: Case, rival: str, device: str) -> dict:
    """The case's arguments as this rival takes them."""
    return case.make(device=device, official=rival in ("official", "compiled"))


def peak_memory(case: Case, rival: str, backward: bool, device: str) -> int:
    """Bytes that one warm call needs beyond its arguments."""
    if device == "cuda":
        call = contender(case, rival, make(case, rival, device), backward)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, str(case), rival, str(int(backward))]
    # memory that was freed goes back at once, or a warm heap would hide what a call takes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", BENCHMARKS, ids=str)
def test_op(benchmark, case: Case, passes: str, rival: str, device: str) -> None:
    if "backward" in passes and not case.gradients:
        pytest.skip("the op has no gradient")
    if rival == "library" and not hasattr(library, case.op):
        pytest.skip("this torch has no such function of its own")
    benchmark.group = f"{case} {passes} {device}"
    arguments = make(case, rival, device)
    backward = "backward" in passes
    call = contender(case, rival, arguments, backward)

    def timed():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    with calm_rt.backend("native" if rival == "native" else "auto"):
        timed()  # compiles, and fills the allocator
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name()
            if device == "cuda"
            else platform.processor() or platform.machine(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            instruction_set=_native.build_info().get("isa", ""),
            peak_extra_bytes=peak_memory(case, rival, backward, device),
            gradient_bytes=sum(leaf.nbytes for leaf in case.leaves(arguments)),
        )
        benchmark.pedantic(timed, rounds=case.rounds, warmup_rounds=min(2, case.rounds // 2))


def resident(field: str) -> int:
    """VmRSS, resident memory now, or VmHWM, its peak; in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def measure_peak(name: str, rival: str, backward: bool) -> int:
    """Growth of this process's resident memory during a call, the library and the compiler being
    warm."""
    case = next(case for case in BENCHMARKS if str(case) == name)
    call = contender(case, rival, make(case, rival, "cpu"), backward)
    call()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(measure_peak(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
