"""Build one wheel and run it in other environments: make wheels.

    python python_tests/wheel_matrix.py [PYTHON TORCH ...]

Each pair is an interpreter and a torch requirement, e.g. python3.12 torch==2.11.0. Every
environment
is a fresh one outside the checkout; there the package must load its extension, run its kernel and
agree with the reference. Downloads several GB for the CUDA builds of torch.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheels"
MATRIX = [
    "python3.11",
    "torch==2.13.0",
    "python3.11",
    "torch==2.14.1",
    "python3.12",
    "torch==2.11.0",
]
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")

SMOKE = """
import warnings; warnings.simplefilter("error")
import sys, torch, calm_rt
from calm_rt import _native, ops, testing
case = next(case for case in testing.CASES if case.op == "energy_score")
results = {}
for backend in ("native", "reference"):
    arguments = case.make()
    with calm_rt.backend(backend):
        score = ops.energy_score(**arguments)
    leaves = case.leaves(arguments)
    results[backend] = [score.detach(), *torch.autograd.grad(score.sum(), leaves)]
torch.testing.assert_close(results["native"], results["reference"], rtol=1e-4, atol=1e-5)
build = _native.build_info()
print(f"ok: python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
print(f"    built against {build['built_against_torch']} with CUDA {build['cuda'] or None},",
      f"CUDA kernels usable: {torch.ops.calm_rt.has_cuda()}")
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], check=True, **options)


def build_wheel() -> Path:
    """The wheel, with a manylinux tag where auditwheel can give it one."""
    shutil.rmtree(FOLDER / "dist", ignore_errors=True)
    options = ["--no-build-isolation", "--no-deps", "-q", "-w", FOLDER / "dist"]
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (wheel,) = (FOLDER / "dist").glob("*.whl")
    excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
    run(sys.executable, "-m", "auditwheel", "repair", wheel, "-w", FOLDER / "repaired", *excluded)
    return max((FOLDER / "repaired").glob("*.whl"), key=lambda path: path.stat().st_mtime)


def try_wheel(wheel: Path, python: str, torch: str) -> str:
    """Install the wheel beside this torch and run the smoke program; returns what it printed."""
    venv = FOLDER / f"{Path(python).name}-{torch.replace('==', '-')}"
    run(python, "-m", "venv", "--clear", venv)
    run(venv / "bin/pip", "install", "-q", torch, wheel)
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = run(
        venv / "bin/python", "-c", SMOKE, cwd=venv, env=outside, capture_output=True, text=True
    )
    return result.stdout.strip()


def main() -> int:
    pairs = sys.argv[1:] or MATRIX
    wheel = build_wheel()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    failures = 0
    for python, torch in zip(pairs[::2], pairs[1::2], strict=True):
        if shutil.which(python) is None:
            print(f"skipped: no {python} here")
            continue
        try:
            print(try_wheel(wheel, python, torch), flush=True)
        except subprocess.CalledProcessError as error:
            failures += 1
            print(f"FAILED {python} {torch}: {error}\n{error.stderr or ''}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
