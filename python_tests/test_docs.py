"""Every code block of README and docs runs; the page of the ops is what the docstrings say."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from official_standin import build

import calm_rt
from calm_rt import cli, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"tokenize", "train-autoencoder", "train", "evaluate", "generate", "plan", "info"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not in a checkout")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the pages name."""
    shutil.copytree(folder / "calm", tmp_path / "runs" / "quickstart")
    shutil.copytree(folder / "data", tmp_path / "runs" / "quickstart" / "data")
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copyfile(folder / "corpus.jsonl", tmp_path / "corpus.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page: Path, here: Path) -> None:
    torch.manual_seed(0)
    names = {
        "x": torch.randn(3, 5, 6, requires_grad=True),  # [S, R, L]
        "mean": torch.randn(5, 6),
        "log_std": torch.randn(5, 6),
        "row_ids": torch.arange(5),
        "step": 0,
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(20, 8),
        "official_model": build("EnergyTransformer"),
    }
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path, here: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for language, text in BLOCK.findall(page.read_text()):
        if language not in ("sh", "text", ""):
            continue
        for line in re.findall(r"^(?:make|calm-rt) .*", text, re.MULTILINE):
            program, *words = shlex.split(line, comments=True)
            if program == "make":
                assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), line
            else:
                check_command(words, run=language != "text")


def check_command(arguments: list[str], run: bool) -> None:
    """The parser must know the arguments; commands that take a moment and have their files run."""
    cli.build_parser().parse_args(arguments)
    if not run or arguments[0] not in RUN:
        return
    if arguments[0] in ("tokenize", "train-autoencoder", "train"):
        target = Path(arguments[arguments.index("--output") + 1])
        if target.exists():
            shutil.rmtree(target)
    assert cli.main(arguments) == 0, arguments


def test_page_of_the_ops_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "ops.md").read_text() == generate.page(), "run make docs"
    assert all(f"## {name}\n" in generate.page() for name in ops.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_op_shows_in_the_profiler_under_its_name(backend: str) -> None:
    from calm_rt.testing import CASES

    for op in ops.__all__:
        case = next(case for case in CASES if case.op == op and not case.benchmark)
        arguments = case.make()
        parts = op == "encode" and backend == "native"  # what has names there with gradients
        for grad in (False,) if parts else (False, True):
            activities = [torch.profiler.ProfilerActivity.CPU]
            with (
                calm_rt.backend(backend),
                torch.set_grad_enabled(grad),
                torch.profiler.profile(activities=activities) as profiler,
            ):
                getattr(ops, op)(**arguments)
            counts = {event.key: event.count for event in profiler.key_averages()}
            assert counts.get(f"calm_rt::{op}") == 1, (op, grad, counts)


def test_design_lists_every_file_of_the_package() -> None:
    listed = set(re.findall(r"(\w+)\.py\b", (ROOT / "docs" / "design.md").read_text()))
    files = {path.stem for path in (ROOT / "calm_rt").glob("*.py")} - {"__init__", "__main__"}
    assert not files - listed
