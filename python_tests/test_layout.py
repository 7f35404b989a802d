"""The tree is complete: an op that exists somewhere exists everywhere; files keep their shape."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

from calm_rt import _native, ops, reference
from calm_rt.testing import CASES

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("csrc", "calm_rt", "python_tests", "benchmarks", "examples", "packaging")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
]
COMPOSED = ("decode",)  # of the kernels of other ops alone
needs_checkout = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a checkout")


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_has_reference_case_and_docs(op: str) -> None:
    function = getattr(ops, op)
    assert inspect.getmodule(function).__name__ == f"calm_rt.ops.{op}"
    assert callable(getattr(reference, op))
    assert any(case.op == op and not case.benchmark for case in CASES)
    for word in ("returns:", "raises: ValueError", "source:"):
        assert word in function.__doc__, f"{op}: docstring lacks {word}"
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", function.__doc__), (
            f"{op}: docstring does not explain {name}"
        )


@needs_checkout
@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_has_its_files(op: str) -> None:
    kernels = [f"kernels/{op}.h", f"kernels/cpu/{op}.cpp", f"kernels/cuda/{op}.cu"]
    if op in COMPOSED:
        assert not any((ROOT / "csrc" / path).exists() for path in kernels)
        kernels = []
    for path in (f"ops/{op}.h", *kernels):
        assert (ROOT / "csrc" / path).is_file(), f"{op}: csrc/{path} is missing"
    registrations = (ROOT / "csrc/ops.cpp").read_text()
    for device in ("Cpu", "Cuda"):
        assert f'm.impl("{op}", TORCH_BOX(&calm_rt::{op}<calm_rt::{device}>));' in registrations
    assert any(case.op == op and case.benchmark for case in CASES), f"{op}: no benchmark case"
    assert f"def {op}(" in (ROOT / "calm_rt/official.py").read_text(), f"{op}: no official formula"


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_is_registered_with_its_fake(op: str) -> None:
    assert _native.loaded(), _native.load_error()
    name = f"calm_rt::{op}"
    for key in ("CPU", "CompositeExplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            break
    else:
        pytest.fail(f"{op}: no CPU kernel is registered")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@needs_checkout
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_keep_their_shape(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "split the file: it is more than one thing"
    assert path.stem not in ("utils", "helpers", "misc")
    layer = path.relative_to(ROOT).as_posix()
    if layer.startswith("calm_rt"):  # docstrings have one grammar: "raises: ValueError for ..."
        assert not re.search(r"^ +(Raises|Source|Memory|Returns):? [A-Za-z`]", text, re.MULTILINE)
    included = re.findall(r'#include [<"]([^>"]+)[>"]', text)
    if layer.startswith(("csrc/kernels", "csrc/common")):
        assert not [
            name for name in included if name.startswith(("torch/", "ATen/", "c10/", "ops/"))
        ]
    if layer.startswith("csrc/common"):
        assert not [name for name in included if name.startswith("kernels/")]
    if layer.startswith("csrc") and re.search(r"\basm\b", text):
        assert layer.startswith(("csrc/kernels/cuda/primitives", "csrc/simulator/"))


LAYERS = [  # a module imports of its own line and of those above
    "reference atomic options torch_archive flops",
    "ops _native official magnitudes costs tensor_files figures library threads curves",
    "nn host hub documents shuffle environment inputs testing",
    "tokenizer data model_folder draws branches",
    "checkpoint tuples brier causal_lm losses official_losses benchmark",
    "pool report scaling training_config",
    "matches rejection evaluation training_state",
    "sampling training_loop",
    "sequence planted training",
    "replay",
    "engine",
    "generation",
    "planning quickstart official_models official_bugs patched patched_generate patching arguments",
    "steps commands",
    "cli",
    "__init__ __main__",
]
UPWARD = {("nn", "checkpoint")}  # inside of methods save(), for those who look there
IMPORT_NATIVE = {"ops", "environment", "benchmark", "__init__"}  # what runs, what is here, backend


def imports_of(path: Path) -> set[str]:
    """The modules and folders of calm_rt that a file of it imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            parts = ["calm_rt", *parts] if node.level else parts
            names = [".".join([*parts, alias.name]) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("calm_rt.")}
    return found


@needs_checkout
def test_imports_go_one_way() -> None:
    """reference <- ops <- nn <- sampling, evaluation, training <- generation <- patching, cli."""
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
    paths = sorted((ROOT / "calm_rt").rglob("*.py"))
    owners = [path.relative_to(ROOT / "calm_rt").parts[0].removesuffix(".py") for path in paths]
    assert set(owners) == set(level)
    upward = set()
    for own, path in zip(owners, paths, strict=True):
        imported = imports_of(path) & set(level)
        upward |= {(own, other) for other in imported if level[other] > level[own]}
        assert "_native" not in imported or own in {*IMPORT_NATIVE, "_native"}, path
    assert upward == UPWARD


@needs_checkout
def test_the_simulator_has_the_schemas_of_the_extension() -> None:
    def schemas(path: str) -> set[str]:
        found = re.findall(r"m\.def\(([^;]*)\);", (ROOT / path).read_text())
        return {"".join(re.findall(r'"([^"]*)"', schema)) for schema in found}

    simulated = schemas("csrc/simulator/module.cpp")
    own = {schema for schema in simulated if schema.startswith("set_")}
    assert len(own) == 2 and simulated - own <= schemas("csrc/ops.cpp")


@needs_checkout
def test_stream_tables_agree() -> None:
    header = (ROOT / "csrc/common/philox.h").read_text()
    table = {name: int(value) for name, value in re.findall(r"  k(\w+) = (\d+),", header)}
    assert table == {
        stream.name.title().replace("_", ""): int(stream) for stream in reference.Stream
    }


@needs_checkout
@pytest.mark.parametrize(
    ("op", "constant", "header", "name"),
    [
        ("linear_argmax", "LONGEST", "kernels/linear_argmax.h", "kLongestScreened"),
        ("linear_cross_entropy", "NARROW_ROWS", "ops/vocabulary_products.h", "kNarrowRows"),
    ],
)
def test_limits_that_python_knows_agree(op: str, constant: str, header: str, name: str) -> None:
    found = re.findall(rf"\b{name} = (\d+);", (ROOT / "csrc" / header).read_text())
    module = inspect.getmodule(getattr(ops, op))
    assert [int(value) for value in found] == [getattr(module, constant)]


@needs_checkout
def test_lint_and_pre_commit_take_the_same_versions() -> None:
    hooks = ROOT / ".pre-commit-config.yaml"
    if not hooks.is_file():
        pytest.skip("a source distribution")
    pinned = re.search(r"pip install -q (ruff==.*)", (ROOT / "Makefile").read_text())[1]
    assert re.findall(r"==(\S+)", pinned) == re.findall(r"rev: v(\S+)", hooks.read_text())


@needs_checkout
def test_no_shared_symbol_is_compiled_for_one_instruction_set() -> None:
    """An inline std function compiled for AVX-512 could be the copy that the linker keeps."""
    built = ROOT.glob("build/*/CMakeFiles/cpu_avx512.dir/csrc/kernels/cpu/*.o")
    objects = [path for path in built if "sanitize" not in path.parts]  # its own
    if not objects:
        pytest.skip("installed from elsewhere: no object files here")
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", *map(str, objects)], capture_output=True, text=True
    )
    weak = re.findall(r"^\S+ [VWu] (.*)$", listing.stdout, re.MULTILINE)
    assert weak and all("calm_rt::avx512::" in name for name in weak), weak
