"""Build one wheel from the source distribution and run it in other environments: make wheels.

    python packaging/wheel_matrix.py [--wheel FILE] [PYTHON TORCH ...]

Each pair is an interpreter and a torch requirement, e.g. python3.12 torch==2.11.0. Every
environment is a fresh one outside the checkout; there the package must load its extension, run
every kernel and agree with the reference. A pair whose Python or torch cannot be had is skipped and
said to be; downloads several GB for the CUDA builds of torch. CPU builds are `torch==2.11.0+cpu`:
PIP_EXTRA_INDEX_URL names an index that has them.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheels"
PYTHONS = ("python3.11", "python3.12")
TORCHES = ("torch==2.11.0", "torch==2.13.0", "torch==2.14.1")
BUILDS = ("", "+cpu")  # PyPI's own have CUDA
# what pip says of a torch that no index has, also where a file of constraints names another
NOT_FOUND = ("No matching distribution", "ResolutionImpossible")
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")

SMOKE = """
import warnings; warnings.simplefilter("error")
import sys, numpy, torch, calm_rt
from calm_rt import _native, host, ops, testing
for op in ops.__all__:
    case = next(case for case in testing.CASES if case.op == op and not case.benchmark)
    results = {}
    for backend in ("native", "reference"):
        arguments = case.make()
        with calm_rt.backend(backend):
            result = getattr(ops, op)(**arguments)
        tensors = list(result) if isinstance(result, tuple) else [result]
        if case.gradients:
            leaves = case.leaves(arguments)
            tensors += torch.autograd.grad(sum(t.sum() for t in tensors), leaves)
        results[backend] = [tensor.detach() for tensor in tensors]
    torch.testing.assert_close(results["native"], results["reference"], rtol=1e-4, atol=1e-4)
words = host.philox4x32(numpy.zeros((1, 4), numpy.uint32), 0)
assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]  # of the Philox paper
build = _native.build_info()
print(f"ok: python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
print(f"    built against {build['built_against_torch']} with CUDA {build['cuda'] or None},",
      f"CUDA kernels usable: {torch.ops.calm_rt.has_cuda()},",
      f"_host: {'C++' if host._host else 'numpy'}")
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], check=True, **options)


def build_wheel() -> Path:
    """The wheel, from the source distribution alone, with a manylinux tag from auditwheel."""
    for name in ("dist", "repaired"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    # without --wheel or --sdist, build makes the wheel from the archive that it made first
    run(sys.executable, "-m", "build", "--no-isolation", "-o", FOLDER / "dist", ROOT)
    (wheel,) = (FOLDER / "dist").glob("*.whl")
    excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
    run(sys.executable, "-m", "auditwheel", "repair", wheel, "-w", FOLDER / "repaired", *excluded)
    (wheel,) = (FOLDER / "repaired").glob("*-cp311-abi3-manylinux*.whl")
    return wheel


def is_there(python: str) -> bool:
    """Whether the interpreter runs; version managers leave commands that only say no."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def try_wheel(wheel: Path, python: str, torch: str) -> str | None:
    """Install the wheel beside this torch and run the smoke program.

    returns: what it printed; None where pip finds no such torch.
    """
    venv = FOLDER / f"{Path(python).name}-{torch.replace('==', '-')}"
    run(python, "-m", "venv", "--clear", venv)
    pip = [venv / "bin/pip", "install", "-q"]
    installed = subprocess.run([*map(str, pip), torch], capture_output=True, text=True)
    if any(words in installed.stderr for words in NOT_FOUND):
        return None
    installed.check_returncode()
    run(*pip, wheel, capture_output=True, text=True)
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = run(
        venv / "bin/python", "-c", SMOKE, cwd=venv, env=outside, capture_output=True, text=True
    )
    return result.stdout.strip()


def main() -> int:
    """Exit status: 0 if a pair ran and none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="try this one instead of building it")
    parser.add_argument("pairs", nargs="*", metavar="PYTHON TORCH")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error(f"pairs: expected PYTHON TORCH ..., got {' '.join(options.pairs)}")
    pairs = list(zip(options.pairs[::2], options.pairs[1::2], strict=True))
    if not pairs:
        products = itertools.product(PYTHONS, TORCHES, BUILDS)
        pairs = [(python, torch + build) for python, torch, build in products]
    wheel = options.wheel or build_wheel()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    passed, failed = 0, 0
    for python, torch in pairs:
        if not is_there(python):
            print(f"skipped: no {python} here", flush=True)
            continue
        try:
            text = try_wheel(wheel, python, torch)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"FAILED {python} {torch}: {error}\n{error.stderr or ''}", flush=True)
            continue
        passed += text is not None
        print(text or f"skipped: {python} finds no {torch}", flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
