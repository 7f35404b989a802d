"""The machine code of the CUDA kernels: nothing spills, nothing lies in local memory, and the
matrix instructions are there. Needs no GPU, but an extension that was built with CUDA."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

from calm_rt import _native

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "resources.py"
MOST_THREADS = {"bound_groups_kernel": 256, "bound_groups_wgmma_kernel": 384}  # a block of it
REGISTER_FILE = 65536  # registers of a multiprocessor, from sm_80 on
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

pytestmark = pytest.mark.skipif(not REPORT.exists(), reason="not in a checkout")


@pytest.fixture(scope="module")
def resources():
    need(_native.build_info().get("cuda"), "built without CUDA: CALM_RT_CUDA=ON builds with nvcc")
    spec = importlib.util.spec_from_file_location("resources", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    need(module.find_cuobjdump(), "cuobjdump is missing: pip install nvidia-cuda-cuobjdump")
    return module


@pytest.fixture(scope="module")
def kernels(resources) -> list:
    return resources.kernels()


def test_every_kernel_file_is_compiled_for_every_architecture(kernels) -> None:
    sources = {path.stem for path in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")}
    for architecture in ARCHITECTURES:
        assert {kernel.file for kernel in kernels if kernel.architecture == architecture} == sources


def test_every_kernel_file_brings_ptx_for_newer_devices(resources) -> None:
    sources = {path.stem for path in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")}
    listing = resources.dump("--list-ptx")
    assert set(re.findall(r": (\w+)\.sm_80\.ptx", listing)) == sources


def test_no_kernel_has_local_memory(kernels) -> None:
    """A spill, an array with an index that is known only at run time, or a call with a stack."""
    assert kernels
    slow = [kernel for kernel in kernels if kernel.stack or kernel.local]
    assert not slow, "\n".join(map(str, slow))


def test_blocks_fit_the_register_file(kernels) -> None:
    for name, threads in MOST_THREADS.items():
        found = [kernel for kernel in kernels if name in kernel.symbol]
        assert found and all(kernel.registers * threads <= REGISTER_FILE for kernel in found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_argmax_multiplies_with_tensor_cores(resources, kernels, architecture: str) -> None:
    """Matrix products of bfloat16, asynchronous copies of 16 bytes and matrix loads, as written."""
    symbols = {kernel.symbol for kernel in kernels if "bound_groups_kernel" in kernel.symbol}
    assert len(symbols) == 3
    for symbol in symbols:
        code = resources.dump("--dump-sass", "--gpu-architecture", architecture, "-fun", symbol)
        for instruction in (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\S*\.128", r"LDSM\.16\.M88\.4"):
            assert re.search(instruction, code), f"{symbol} has no {instruction}"
        assert not re.search(r"\b(LDL|STL)\b", code)


def test_argmax_multiplies_by_warpgroups_on_sm_90a(resources, kernels) -> None:
    """Products of 64 by 256, boxes by the copy engine, and registers that change hands."""
    [symbol] = {kernel.symbol for kernel in kernels if "bound_groups_wgmma_kernel" in kernel.symbol}
    code = resources.dump("--dump-sass", "--gpu-architecture", "sm_90a", "-fun", symbol)
    for instruction in (r"HGMMA\.64x256x16\.F32\.BF16", r"UTMALDG\.2D", r"USETMAXREG"):
        assert re.search(instruction, code), f"{symbol} has no {instruction}"
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_over_lines_read_ahead(resources, kernels, architecture: str) -> None:
    """Packs of 48 bytes and more are under way before a thread waits for one of them."""
    packed = re.compile(r"column_sums_kernelI\w+Lb1E|norm_gradients_kernelI\w+TermsE[12]")
    symbols = {kernel.symbol for kernel in kernels if packed.search(kernel.symbol)}
    assert len(symbols) == 13
    for symbol in symbols:
        code = resources.dump("--dump-sass", "--gpu-architecture", architecture, "-fun", symbol)
        steps = re.findall(r"LDG\.E\S*\.(128|256)|\b(?:FADD|FFMA|BRA)\b", code)
        most = ahead = 0
        for bits in steps:
            ahead = ahead + int(bits) // 8 if bits else 0
            most = max(most, ahead)
        assert most >= 48, f"{symbol} reads {most} bytes and waits"


def test_report_names_every_kernel(kernels) -> None:
    result = subprocess.run([sys.executable, REPORT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == len(kernels) + 2
