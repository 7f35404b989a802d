"""keep_freed_memory: a step's memory serves the next one, in processes that asked for it."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from calm_rt.heap import keep_freed_memory

def faults():  # pages that three steps get from the system
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
kept = keep_freed_memory()
torch.ones(10_000_000)
print(given_back, int(kept), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize("asked", [{}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": ""}])
def test_a_step_gets_the_memory_of_the_one_before(asked: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS]
    run = subprocess.run(command, env=environment | asked, capture_output=True, check=True)
    given_back, kept, then = map(int, run.stdout.split())
    assert kept == (not asked)
    assert 10 * then < given_back if kept else 2 * then > given_back
