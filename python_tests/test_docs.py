"""Every code block of README and docs runs, but for the lines of NOT_RUN, each for a reason.

Python and shell blocks run in order; other blocks hold no commands. The page of the ops is what the
docstrings say.
"""

import dataclasses
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from official_standin import build, token_ids
from test_benchmark import LIMITS, TINY

import calm_rt
from calm_rt import benchmark, checkpoint, cli, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\w+=\S+ )*(?:make|calm-rt|python|pip|torchrun|pytest) .*", re.MULTILINE)
SCREEN = 60  # lines of README
NOT_RUN = {  # lines without their comments
    "make quickstart": "takes minutes; test_cli.py runs the command on a small corpus",
    "make test": "runs this test",
    "make lint": "checks the style of the files, not what they do",
    "make types": "downloads a checker; it checks annotations, not what runs",
    "make sanitize": "takes minutes; it runs test_sanitize.py",
    "make fuzz": "takes minutes; test_fuzz.py runs with fewer examples",
    "make bench": "takes minutes; test_benchmark.py runs the engine",
    "make gpu": "needs a GPU; test_gpu.py tests the program",
    "make wheels": "downloads several GB; test_packaging.py runs its program here",
    "make install": "made what runs this test",
    "pip install --no-build-isolation .": "builds anew; make install does the same",
    "python -m build --no-isolation": "builds anew; test_packaging.py makes the distributions",
    "CALM_RT_PURE=1 python -m build --no-isolation --wheel": "test_packaging.py makes that wheel",
    "python packaging/export_kernels.py FOLDER": "test_packaging.py runs it",
}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not in a checkout")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the pages name, a hub with one model, tiny cases."""
    shutil.copytree(folder / "calm", tmp_path / "runs" / "quickstart")
    shutil.copytree(folder / "data", tmp_path / "runs" / "quickstart" / "data")
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copyfile(folder / "corpus.jsonl", tmp_path / "corpus.jsonl")
    checkpoint.save(calm_rt.load(folder / "calm"), tmp_path / "CALM-M", layout="official")
    hub = SimpleNamespace(
        constants=SimpleNamespace(HF_HUB_OFFLINE=False),
        list_repo_files=lambda name: [path.name for path in (tmp_path / "CALM-M").iterdir()],
        snapshot_download=lambda name, allow_patterns: str(tmp_path / "CALM-M"),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    cases = [dataclasses.replace(case, benchmark=True, rounds=5) for case in TINY]
    monkeypatch.setattr(benchmark, "CASES", cases)
    monkeypatch.setattr(benchmark, "RIVALS", benchmark.QUICK_RIVALS)
    monkeypatch.setattr(benchmark, "limits", lambda device: LIMITS)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 0)
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
        "prompt_ids": token_ids(),
    }
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shell_blocks_run_in_order(page: Path, here: Path) -> None:
    for text in blocks(page, "sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words and " ".join(words) not in NOT_RUN:
                assert words[0] == "calm-rt", f"{line}: run it, or say in NOT_RUN why not"
                assert cli.main(words[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_other_blocks_hold_no_commands(page: Path) -> None:
    for language, text in BLOCK.findall(page.read_text()):
        assert language in ("python", "sh", "text", "diff", ""), language
        if language not in ("python", "sh"):
            assert not COMMAND.search(text), "a block of the language sh runs"


def test_what_is_not_run_is_there() -> None:
    lines = [line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines()]
    commands = {" ".join(shlex.split(line, comments=True)) for line in lines}
    assert not NOT_RUN.keys() - commands, "lines that no page has any more"
    targets = [line.split()[1] for line in NOT_RUN if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    programs = re.findall(r"python (packaging/\w+\.py)", " ".join([*NOT_RUN, makefile]))
    assert len(programs) == 2 and all((ROOT / name).is_file() for name in programs)
    named = {name for reason in NOT_RUN.values() for name in re.findall(r"test_\w+\.py", reason)}
    assert all((Path(__file__).parent / name).is_file() for name in named)


def test_page_of_the_ops_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "ops.md").read_text() == generate.page(), "run make docs"
    assert all(f"## {name}\n" in generate.page() for name in ops.__all__)


def test_readme_is_one_screen() -> None:
    """And says first what the energy score is, then how to put it in, run it, what it gives."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= SCREEN
    parts = (
        "score = mean |",
        "```diff",
        "## Two commands",
        "make quickstart",
        "\n| op |",
        "csrc/ ",
    )
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), places
    rows = re.findall(r"^\| `.*$", text, re.MULTILINE)
    measured = (ROOT / "docs" / "performance.md").read_text()
    assert len(rows) == 3
    for row in rows:  # the same figures on the page that has all
        assert row.rstrip("* |") in measured, row


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
