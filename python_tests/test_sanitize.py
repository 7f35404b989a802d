"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on drawn arguments.

`make sanitize` builds the extension a second time, into build/sanitize. A package of links to the
Python files beside that extension runs the fuzz tests in a process that loads the sanitizers first.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_simulator import ROOT

BUILD = ROOT / "build" / "sanitize"
KERNELS = "csrc/kernels/cpu"

pytestmark = pytest.mark.sanitize


def link_package(folder: Path, extension: Path) -> None:
    """folder/calm_rt: links to the package's Python files, and to an extension."""
    package = folder / "calm_rt"
    package.mkdir()
    for path in (ROOT / "calm_rt").iterdir():
        if path.suffix != ".so":
            (package / path.name).symlink_to(path)
    (package / extension.name).symlink_to(extension)


def run_tests(folder: Path, *arguments: str, isa: str = "") -> subprocess.CompletedProcess:
    """pytest in this folder's test directory with the package that lies in another one."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they need until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "CALM_RT_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-s", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT / "python_tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def built() -> Path:
    extension = BUILD / "_C.abi3.so"
    assert extension.exists(), f"{extension} is not built: make sanitize"
    return extension


def test_fuzz_under_sanitizers(tmp_path: Path) -> None:
    link_package(tmp_path, built())
    result = run_tests(tmp_path, "test_fuzz.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:6000]


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_laws_under_sanitizers_on_other_instruction_sets(tmp_path: Path, isa: str) -> None:
    link_package(tmp_path, built())
    result = run_tests(tmp_path, "test_ops.py", "-k", "error_at_most or zero_rows", isa=isa)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:6000]


@dataclass(frozen=True)
class Bug:
    """A change to the source of a CPU kernel, and what must be reported of it."""

    name: str
    file: str
    old: str
    new: str
    report: str
    op: str

    def __str__(self) -> str:
        return self.name


KNOWN = "known &= ids[j] >= 0 && ids[j] < p.vocabulary"
WHOLE_VECTOR = "for (; l + lanes<V> <= p.size; l += lanes<V>) {"
WILD = "AddressSanitizer|signed integer overflow"  # of what lies at an id, or of where that is
WORD = "static_cast<uint64_t>(*p.seed)"

BUGS = (
    Bug("any-id-is-known", "encode.cpp", KNOWN, "known &= true", WILD, "encode"),
    Bug(
        "read-past-row",
        "encode.cpp",
        WHOLE_VECTOR,
        WHOLE_VECTOR.replace("l + lanes<V> <= p.size", "l < p.size"),
        "AddressSanitizer: heap-buffer-overflow",
        "encode",
    ),
    Bug(
        "signed-overflow",
        "select_patch.cpp",
        WORD,
        WORD.replace("*p.seed", "(*p.seed | int64_t{1} << 62) * 3"),
        "signed integer overflow",
        "select_patch",
    ),
)


def build_with(bug: Bug, folder: Path) -> Path:
    """The extension with the bug in it, by the build's own commands."""
    shutil.copytree(ROOT / KERNELS, folder / "mutant")
    source = folder / "mutant" / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has changed, adapt the bug"
    source.write_text(text.replace(bug.old, bug.new))
    listing = subprocess.run(
        ["ninja", "-C", BUILD, "-t", "commands", "_C.abi3.so"], capture_output=True, text=True
    )
    extension = folder / "_C.abi3.so"
    commands = [line for line in listing.stdout.splitlines() if bug.file in line]
    assert len(commands) > 1, listing.stderr
    objects = {
        f"CMakeFiles/cpu_{isa}.dir/{KERNELS}/{bug.file}": folder / f"{isa}.cpp"
        for isa in ("portable", "avx2", "avx512")
    }
    for command in commands:  # one for each instruction set, then the link
        for old, new in objects.items():
            command = command.replace(old, str(new))
        command = command.replace(str(ROOT / KERNELS / bug.file), str(source))
        command = command.replace("-o _C.abi3.so", f"-o {extension}")
        subprocess.run(command, shell=True, cwd=BUILD, check=True)
    return extension


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    built()
    link_package(tmp_path, build_with(bug, tmp_path))
    result = run_tests(tmp_path, "test_fuzz.py", "-k", bug.op)
    assert result.returncode != 0 and re.search(bug.report, result.stdout + result.stderr), (
        result.stdout[-2000:] + result.stderr[:6000]
    )
