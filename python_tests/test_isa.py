"""The CPU kernels of every instruction set that this processor has, in processes told which to use.

CALM_RT_CPU_ISA is read once, at the import; what cannot be served is said.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calm_rt

ISAS = ("portable", "avx2", "avx512")
LAWS = "error_at_most or views_equal or expanded_rows or two_runs or thread_count"

# One line for each case whose output is whole numbers: exact ids, choices, steps of uniforms.
WHOLE_NUMBERS = """
import hashlib, torch, calm_rt
from calm_rt import ops
from calm_rt.testing import CASES

for case in CASES:
    exact_ids = case.op in ("linear_argmax", "select_patch")
    uniform = case.op == "noise" and case.make()["distribution"] == "uniform"
    if case.benchmark or not (exact_ids or uniform):
        continue
    with calm_rt.backend("native"):
        output = getattr(ops, case.op)(**case.make())
    numbers = (output.double() * 2**24).long() if uniform else output
    print(case, hashlib.sha256(numbers.numpy().tobytes()).hexdigest())
"""


def environment(isa: str) -> dict[str, str]:
    return {**os.environ, "CALM_RT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}


def in_process(isa: str, program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment(isa), capture_output=True, text=True, check=True)


@functools.cache
def used(isa: str) -> str:
    """What the kernels use where `isa` is asked for."""
    program = "import calm_rt; print(calm_rt.info()['build']['isa'])"
    return in_process(isa, program).stdout.strip()


def needs(isa: str) -> None:
    if used(isa) != isa:
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", ISAS)
def test_laws_hold(isa: str) -> None:
    needs(isa)
    if isa == calm_rt.info()["build"]["isa"]:
        pytest.skip("this process uses it in test_ops.py itself")
    files = ["test_ops.py", "test_linear_argmax.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", f"{LAWS} or test_linear_argmax", *files]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment(isa),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]


def test_whole_numbers_have_the_same_bits() -> None:
    outputs = {isa: in_process(isa, WHOLE_NUMBERS).stdout for isa in ISAS}
    assert outputs["portable"].count("\n") > 5
    assert len(set(outputs.values())) == 1, outputs


@pytest.mark.parametrize("isa", ISAS)
def test_info_shows_it(isa: str) -> None:
    needs(isa)
    command = [sys.executable, "-m", "calm_rt", "info"]
    result = subprocess.run(command, env=environment(isa), capture_output=True, text=True)
    assert result.returncode == 0 and f"isa {isa}" in " ".join(result.stdout.split())
    assert "CALM_RT_CPU_ISA" not in result.stderr


@pytest.mark.parametrize("wanted", ["avx9000", "AVX2", "none"])
def test_a_request_that_cannot_be_served_is_said(wanted: str) -> None:
    result = in_process(wanted, "import calm_rt")
    assert f"got {wanted!r}. Using {used('')}" in result.stderr
    assert "CALM_RT_CPU_ISA" not in in_process("", "import calm_rt").stderr
