"""What is packed: the source distribution, the wheel of Python alone, the layout for `kernels`."""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from needs import need
from test_primitives import NVCC

import calm_rt

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")
REGISTRATION = """
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, M) STABLE_TORCH_LIBRARY(NAME, M)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, M) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, M)
#define REGISTER_EXTENSION(NAME)
"""
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def build(kind: str, source: Path, output: Path, **environment: str) -> Path:
    """Builds without a network and without a build environment of its own."""
    program = BUILD.format(kind, str(output))
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return output / run.stdout.splitlines()[-1]


@pytest.fixture
def wheel_matrix(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    return importlib.import_module("wheel_matrix")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked source distribution, made from what git tracks alone."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout
    for name in files.split():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    archive = build("sdist", folder / "tree", folder)
    with tarfile.open(archive) as packed:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            packed.extraction_filter = tarfile.data_filter
        packed.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_source_distribution_has_all_that_builds_and_tests(source: Path) -> None:
    assert source.name == f"calm_rt-{calm_rt.__version__}"
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout
    missing = [name for name in files.split() if not (source / name).is_file()]
    assert not [name for name in missing if not name.startswith(".")], missing


def test_wheel_of_python_alone(source: Path, tmp_path: Path) -> None:
    wheel = build("wheel", source, tmp_path, CALM_RT_PURE="1")
    assert wheel.name == f"calm_rt-{calm_rt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "installed")
    assert "calm_rt/reference.py" in names and "calm_rt/py.typed" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("csrc")]
    program = (
        "import sys;"  # without the finder of an editable installation, which knows an extension
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)];"
        "import calm_rt, torch; assert calm_rt.__file__.startswith(PATH);"
        "assert 'not built' in calm_rt.info()['ops']['noise']['cpu'];"
        "print(calm_rt.ops.linear_argmax(torch.eye(3), torch.eye(3)).tolist())"
    ).replace("PATH", repr(str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[0, 1, 2]"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler -m64", "CALM_RT_CUDA": "ON"}, "is no C++ compiler no-such"),
        ({"CXX": f"{sys.executable} -m64"}, "building needs cmake and ninja: pip install"),
    ],
)
def test_what_building_needs_is_named(environment: dict, message: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, **environment, "PATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and message in run.stderr
    assert "Traceback" not in run.stderr


def test_program_of_the_wheel_matrix_runs_here(tmp_path: Path, wheel_matrix) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", wheel_matrix.SMOKE]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("ok: python"), run.stderr


def test_layout_of_kernels(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    script = ROOT / "packaging" / "export_kernels.py"
    run = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    config = tomllib.loads((folder / "build.toml").read_text())
    parts = [config["torch"], *config["kernel"].values()]
    sources = [name for part in parts for name in part["src"]]
    assert len(sources) == len(set(sources)) and all((folder / name).is_file() for name in sources)
    cuda = {path.name for path in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")}
    assert {Path(name).name for name in config["kernel"]["cuda"]["src"]} == cuda
    # the flags of each instruction set are those of the build
    build_file = (ROOT / "CMakeLists.txt").read_text()
    wanted = dict(re.findall(r"set\(ISA_FLAGS_(\w+) (.*)\)", build_file))
    for isa, flags in wanted.items():
        flags = flags.replace("${ISA_FLAGS_avx2}", wanted["avx2"]).replace('""', "").split()
        assert set(flags) < set(config["kernel"][f"cpu_{isa}"]["cxx-flags"])
    again = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert again.returncode != 0 and "does not exist yet" in again.stderr
    devices = re.search(r"CMAKE_CUDA_ARCHITECTURES (.*?) CACHE", build_file)[1]
    capabilities = ",".join(config["kernel"]["cuda"]["cuda-capabilities"])
    assert re.findall(r"\d+a?", devices) == re.findall(r"\d+a?", capabilities.replace(".", ""))
    # a kernel and the binding of each backend compile in this layout, beside the builder's header
    (folder / "registration.h").write_text(REGISTRATION)
    headers = Path(torch.__file__).parent / "include", sysconfig.get_path("include")
    system = [part for path in headers for part in ("-isystem", path)]
    noise = [*config["kernel"]["cpu_portable"]["cxx-flags"], "-Icsrc", "cpu_portable/noise.cpp"]
    flags = [*config["torch"]["cxx-flags"], "-Icsrc", "-I.", *system]
    flags += ["-DTORCH_EXTENSION_NAME=_calm_rt_a1b2", "-DTORCH_TARGET_VERSION=0x20b000000000000"]
    binding = [[*flags, f"-D{kind}_KERNEL", config["torch"]["src"][0]] for kind in ("CPU", "CUDA")]
    runs = [
        subprocess.Popen(["c++", "-fsyntax-only", "-w", *arguments], cwd=folder)
        for arguments in (noise, *binding)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]


def configure(folder: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess:
    """Of the build alone, elsewhere than in CI."""
    names = ("CI", "CUDA_HOME", "CUDA_PATH")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    options = [f"-DCALM_RT_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


def test_an_nvcc_that_is_too_old_is_named(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    without = configure(tmp_path / "auto", "AUTO", PATH=path)
    assert without.returncode == 0, without.stderr
    assert f"they need nvcc 12.8, and {nvcc} is 12.4" in " ".join(without.stderr.split())
    assert "cuda_kernels" not in (tmp_path / "auto" / "build.ninja").read_text()
    insisting = configure(tmp_path / "on", "ON", PATH=path)
    assert insisting.returncode != 0
    assert f"needs nvcc 12.8; {nvcc} is 12.4" in " ".join(insisting.stderr.split())


@pytest.mark.parametrize("cuda, ci", [("AUTO", {}), ("ON", {}), ("AUTO", {"CI": "true"})])
def test_a_spill_ends_our_builds_and_no_others(tmp_path: Path, cuda: str, ci: dict) -> None:
    need(NVCC, "nvcc is neither on PATH nor in CUDA_HOME")
    configured = configure(tmp_path, cuda, CUDA_HOME=str(Path(NVCC).parents[1]), **ci)
    assert configured.returncode == 0, configured.stderr
    flags = (tmp_path / "build.ninja").read_text()
    assert "-warn-spills" in flags
    assert ("-warn-spills,-Werror" in flags) == (cuda == "ON" or bool(ci))


def test_a_torch_that_no_index_has_is_skipped(tmp_path: Path, monkeypatch, wheel_matrix) -> None:
    """With a file of constraints too, about which pip speaks of a conflict instead."""
    constraint = tmp_path / "constraints.txt"
    constraint.write_text("torch<=2.14.1\n")
    monkeypatch.setattr(wheel_matrix, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for value in ("", str(constraint)):
        monkeypatch.setenv("PIP_CONSTRAINT", value)
        assert wheel_matrix.try_wheel(tmp_path / "a.whl", sys.executable, "torch==0.0.1") is None
