"""The CPU kernels of every instruction set that this processor has, in processes told which to use.

CALM_RT_CPU_ISA and CALM_RT_CPU_PRODUCTS are read once, at the import; what cannot be served is
said.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")] + ["-mfma", "-mf16c"],
}
ISAS = *ISA_FLAGS, "amx"  # the code of avx512
KERNELS = [*(ROOT / "csrc/kernels/cpu").glob("*.cpp"), *(ROOT / "csrc/common").glob("*.cpp")]
LAWS = "error_at_most or views_equal or expanded_rows or two_runs or thread_count"

# One line for each case whose output is whole numbers: exact ids, choices, steps of uniforms.
WHOLE_NUMBERS = """
import hashlib, torch, calm_rt
from calm_rt import ops
from calm_rt.testing import CASES

for case in CASES:
    exact_ids = case.op in ("linear_argmax", "select_patch", "survivors")
    uniform = case.op == "noise" and case.make()["distribution"] == "uniform"
    if case.benchmark or not (exact_ids or uniform):
        continue
    with calm_rt.backend("native"):
        output = getattr(ops, case.op)(**case.make())
    output = output[0] if isinstance(output, tuple) else output
    numbers = (output.double() * 2**24).long() if uniform else output
    print(case, hashlib.sha256(numbers.numpy().tobytes()).hexdigest())
"""


def environment(isa: str, products: str = "") -> dict[str, str]:
    chosen = {"CALM_RT_CPU_ISA": isa, "CALM_RT_CPU_PRODUCTS": products}
    return {**os.environ, **chosen, "OMP_NUM_THREADS": "1"}


def in_process(isa: str, program: str, products: str = "") -> subprocess.CompletedProcess:
    command, variables = [sys.executable, "-c", program], environment(isa, products)
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True)


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
    """With our products of floats; test_ops.py has the laws with those that this process takes."""
    needs(isa)
    files = ["test_ops.py", "test_linear_argmax.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", f"{LAWS} or test_linear_argmax", *files]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment(isa, "own"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("kernel", sorted(KERNELS), ids=lambda path: path.stem)
def test_portable_code_asks_for_no_x86(kernel: Path, tmp_path: Path) -> None:
    """As for ARM, but for its instructions: nothing outside of guards is x86's."""
    standard = "cstddef cstdint cstdlib cstring cmath algorithm array atomic type_traits utility"
    lines = [f"#include <{name}>" for name in standard.split()]  # these ask what the machine is
    header = tmp_path / "other_machine.h"
    header.write_text("\n".join([*lines, "#undef __x86_64__", "#undef __SSE2__", ""]))
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only", "-std=c++20", "-Wno-psabi"]
    command += ["-include", header, "-DCALM_ISA=portable", "-DCALM_ISA_PORTABLE"]
    result = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", kernel], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def run_program(isa: str, name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """A C++ program of this folder, made for an instruction set."""
    needs(isa)
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not in a checkout")
    arithmetic = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-w"]
    command = [os.environ.get("CXX", "c++"), *arithmetic, *flags, *ISA_FLAGS[isa]]
    source = [f"-DCALM_ISA={isa}", f"-I{ROOT / 'csrc'}", ROOT / "python_tests" / f"{name}.cpp"]
    subprocess.run([*command, *source, "-o", folder / name], check=True)
    return subprocess.run([folder / name], capture_output=True, text=True)


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_products_are_right(isa: str, tmp_path: Path) -> None:
    """Within rounding, the same for any number of rows, and not a byte out of bounds."""
    result = run_program(isa, "product", tmp_path, "-fsanitize=address,undefined")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_exponential_is_within_one_unit_in_the_last_place(isa: str, tmp_path: Path) -> None:
    result = run_program(isa, "exponential", tmp_path)
    assert result.returncode == 0 and float(result.stdout) <= 1, result.stdout


PRODUCT = """
import torch, calm_rt
from calm_rt import ops

print(calm_rt.info()["build"]["products"])
torch.manual_seed(0)
x, gate, up = (torch.randn(rows, 1000) for rows in (20, 96, 96))  # beyond one block
for rows in (4, 20):
    out = ops.gated_mlp(x[:rows], torch.ones(1000), gate, up, torch.randn(1000, 96))
    print(out.double().sum().item())
"""


def test_whose_products_are_used() -> None:
    """And each does compute: their bits differ. `few` takes ours for four rows."""
    kinds = "own", "few", "library"
    outputs = [in_process("", PRODUCT, kind).stdout.split() for kind in kinds]
    assert tuple(output[0] for output in outputs) == kinds
    own, few, library = (output[1:] for output in outputs)
    assert own[0] != library[0] and own[1] != library[1]
    assert few == [own[0], library[1]]
    assert in_process("", PRODUCT).stdout.split() in outputs


@pytest.mark.parametrize(("wanted", "whose"), [("library", "library"), ("own", "own"), ("", "own")])
def test_info_shows_whose_argmax_a_gpu_takes(monkeypatch, wanted: str, whose: str) -> None:
    monkeypatch.setenv("CALM_RT_CUDA_ARGMAX", wanted)
    program = "import calm_rt; print(calm_rt.info()['build']['cuda_argmax'])"
    assert in_process("", program).stdout.strip() == whose


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
def test_a_request_that_cannot_be_served_is_said(wanted: str, monkeypatch) -> None:
    monkeypatch.setenv("CALM_RT_CUDA_ARGMAX", wanted)
    result = in_process(wanted, "import calm_rt", wanted)
    assert f"got {wanted!r}. Using {used('')}" in result.stderr
    assert f"CALM_RT_CPU_PRODUCTS: expected own, few or library, got {wanted!r}" in result.stderr
    assert f"CALM_RT_CUDA_ARGMAX: expected own or library, got {wanted!r}" in result.stderr
    monkeypatch.delenv("CALM_RT_CUDA_ARGMAX")
    assert "CALM_RT_C" not in in_process("", "import calm_rt").stderr
