"""Every op at its large cases: the official formula, torch.compile of it and the kernel.

    pytest benchmarks -k energy_score

Each group prints its rows together; a `library` row is torch's own function, where it has one.
`extra_info` holds the device, the threads, the peak of extra memory and the size of the gradient
to compare it with. Rows of a group run one after the other; `calm-rt bench` lets them take turns
and writes a report.
"""

import sys

import pytest
import torch

from calm_rt.benchmark import (
    RIVALS,
    benchmark_cases,
    contender,
    machine,
    make_arguments,
    passes_of,
    peak_memory,
    rivals_of,
    route,
)
from calm_rt.testing import Case

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PASSES = ("forward", "forward+backward")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", benchmark_cases(), ids=str)
def test_op(benchmark, case: Case, passes: str, rival: str, device: str) -> None:
    if passes not in passes_of(case):
        pytest.skip("the op has no gradient")
    if rival not in rivals_of(case, device=device):
        pytest.skip("no such function here")
    benchmark.group = f"{case} {passes} {device}"
    arguments = make_arguments(case, rival, device)
    backward = "backward" in passes
    torch.compiler.reset()
    call = contender(case, rival, arguments, backward)

    def timed():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    with route(rival):
        timed()  # compiles, and fills the allocator
        benchmark.extra_info.update(
            machine(device),
            peak_extra_bytes=peak_memory(case, rival, backward, device),
            gradient_bytes=sum(leaf.nbytes for leaf in case.leaves(arguments)),
        )
        benchmark.pedantic(timed, rounds=case.rounds, warmup_rounds=min(2, case.rounds // 2))


if __name__ == "__main__":
    print("run: pytest benchmarks -k OP", file=sys.stderr)
    sys.exit(2)
