"""Whether kernels run is never a secret: backends, a missing or broken extension, the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

import calm_rt
from calm_rt import _native, ops, testing
from calm_rt.testing import CASES

PACKAGE = Path(calm_rt.__file__).parent
# an editable installation would lend its extension to a copy that has none
ISOLATE = (
    "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path "
    "if 'editable' not in getattr(finder, '__module__', '').lower()];"
)
CASE = next(case for case in CASES if case.op == "energy_score")


def run_copy(folder: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program with the copy of the package that lies in the folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", ISOLATE + program]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its extension."""
    shutil.copytree(
        PACKAGE, tmp_path / "calm_rt", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_native_backend_refuses_to_fall_back() -> None:
    meta = tree_map(lambda value: testing.move(value, torch.float32, "meta"), CASE.make())
    with calm_rt.backend("native"), pytest.raises(calm_rt.NativeUnavailable, match="for meta"):
        ops.energy_score(**meta)


def test_backends_nest_and_end() -> None:
    before = _native.chosen_backend()
    with calm_rt.backend("reference"):
        with calm_rt.backend("native"):
            assert _native.chosen_backend() == "native"
        assert _native.chosen_backend() == "reference"
    assert _native.chosen_backend() == before


def test_unknown_backend_is_named() -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of auto, native, reference, got 'fast'"
    ):
        calm_rt.backend("fast")


def test_without_the_extension_the_reference_runs_silently(copy: Path) -> None:
    result = run_copy(
        copy,
        "import calm_rt; from calm_rt.testing import CASES; from calm_rt import ops;"
        "case = next(c for c in CASES if c.op == 'energy_score');"
        "ops.energy_score(**case.make()).sum().backward();"
        "print(calm_rt.info()['ops']['energy_score']['cpu'])",
    )
    assert result.returncode == 0 and "calm_rt" not in result.stderr, result.stderr
    assert result.stdout.startswith("reference: the extension calm_rt._C is not built")


def test_a_broken_extension_warns_once_with_both_versions(copy: Path) -> None:
    (copy / "calm_rt" / "_C.abi3.so").write_bytes(b"not a library\nbuilt_against_torch=1.2.3\n")
    result = run_copy(
        copy,
        "import calm_rt, json; from calm_rt import ops, testing;"
        "case = next(c for c in testing.CASES if c.op == 'energy_score');"
        "ops.energy_score(**case.make()); print(json.dumps(calm_rt.info()['build']));"
        "calm_rt.backend('native'); ops.energy_score(**case.make())",
    )
    assert result.stderr.count("does not load in torch") == 2  # the warning, and the error
    assert "built against torch 1.2.3" in result.stderr and torch.__version__ in result.stderr
    assert "NativeUnavailable" in result.stderr
    assert "does not load" in json.loads(result.stdout)["missing"]


def test_an_older_extension_lacks_an_op_and_says_so() -> None:
    program = (
        "import torch, calm_rt; from calm_rt import _native, ops, testing;"
        "_native._registered.remove('energy_score');"
        "case = next(c for c in testing.CASES if c.op == 'energy_score');"
        "ops.energy_score(**case.make()); print(calm_rt.info()['ops']['energy_score']['cpu']);"
        "_native.register('no_such_op', print)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "older than this package and lacks energy_score" in result.stdout


def test_info_is_plain_data_and_says_why() -> None:
    report = json.loads(json.dumps(calm_rt.info()))
    assert set(report["ops"]) == set(ops.__all__)
    assert all("native" in routes["cpu"] for routes in report["ops"].values())
    assert report["build"]["isa"] in report["build"]["instruction_sets"].split(";")


def test_importing_opens_no_connection() -> None:
    program = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import calm_rt; calm_rt.info()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_exist_and_the_import_is_light() -> None:
    program = (
        "import sys, calm_rt;"
        "heavy = {'sentencepiece', 'matplotlib', 'tokenizers', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "[getattr(calm_rt, name) for name in calm_rt.__all__]"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
