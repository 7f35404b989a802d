"""The scripts under benchmarks: their rows as JSON, and that their rivals do the same work."""

import importlib
import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not in a checkout")
FIELDS = {"op", "case", "passes", "device", "dtype", "rival", "median_ms", "min_ms", "max_ms"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def written_by(script, monkeypatch, tmp_path, *arguments):
    file = tmp_path / "rows.json"
    command = ["/anywhere/bench_this.py", *map(str, arguments), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    results = json.loads(file.read_text())
    assert {"date", "device", "commit", "threads", "torch", "load"} <= set(results["machine"])
    assert results["command"].startswith("python benchmarks/bench_this.py ")
    for row in results["rows"]:
        assert FIELDS <= set(row)
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    return results


def test_tuples_first_chooses_the_same_patches(script) -> None:
    bench = script("bench_generation")
    pools = bench.pools_without_repeats()[:2]
    pools = torch.cat([pools, pools[:1, :1].expand(1, bench.CANDIDATES, -1)])
    model = bench.PlantedCalm(pools, torch.float32)
    turns = itertools.cycle(model.latents)
    for sure in (False, False, True):
        usual, first = model.select(), bench.select_tuples_first(model, turns)
        assert torch.equal(usual.patches, first.patches)
        assert first.sure.tolist() == [sure] and first.draws.tolist() == [8 if sure else 208]
    model.pools, model.latents = model.pools[2:], model.latents[2:]
    rows = bench.by_entropy(model, 1)
    assert [(row["sure"], row["bits"]) for row in rows] == [(True, 0)]
    assert bench.table(rows, 100.0).count("sure") == 1
    assert len(bench.draw(rows, 100.0, "a title").axes) == 2


def test_selection_rows_as_json(script, monkeypatch, tmp_path, capsys) -> None:
    bench = script("bench_generation")
    times = {"official": [0.2, 0.1, 0.3], "native": [0.02], "tuples first": [0.03]}
    monkeypatch.setattr(bench, "PlantedCalm", lambda pools, dtype: None)
    monkeypatch.setattr(bench, "measure", lambda model, rounds: times)
    results = written_by(bench, monkeypatch, tmp_path, "--rounds", 3)
    cases = {(row["case"], row["dtype"]) for row in results["rows"]}
    assert len(cases) == 4 and ("selection-real-bf16", "bfloat16") in cases
    assert len(results["rows"]) == 12
    [row] = [r for r in results["rows"][:3] if r["rival"] == "official"]
    assert (row["median_ms"], row["min_ms"], row["rounds"]) == (200, 100, 3)
    assert "tuples first" in capsys.readouterr().out


def test_training_rows_as_json(script, monkeypatch, tmp_path) -> None:
    bench = script("bench_training")
    times = {"official": [0.2, 0.1], "native": [0.02, 0.03]}
    monkeypatch.setattr("calm_rt.benchmark.compete", lambda steps, device, rounds: times)
    monkeypatch.setattr("calm_rt.steps.training_step", lambda *arguments: None)
    results = written_by(bench, monkeypatch, tmp_path)
    cases = [row["case"] for row in results["rows"]]
    kinds = ("calm", "autoencoder", "quickstart-autoencoder", "quickstart-calm")
    assert cases == [f"{kind}-training" for kind in kinds for _ in times]


def test_whole_texts_as_json(script, monkeypatch, tmp_path, folder) -> None:
    bench = script("bench_generation")
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(bench, "BATCH_SIZE", 2)
    model = folder / "calm"
    results = written_by(bench, monkeypatch, tmp_path, "--rounds", 1, "--model", model)
    assert {(row["case"], row["rival"]) for row in results["rows"]} == {
        ("4 tokens", "official"),
        ("4 tokens", "native"),
        ("2 sequences of 4 tokens", "one by one"),
        ("2 sequences of 4 tokens", "native"),
        ("2 sequences of 4 tokens at temperature 1", "one by one"),
        ("2 sequences of 4 tokens at temperature 1", "native"),
    }
    assert {row["model"] for row in results["rows"]} == {"calm"}


# ---- bad requests ----


@pytest.fixture
def refuses(monkeypatch, capsys):
    """Runs a script as a program, which must end with exit code 2 and one line that matches."""

    def check(name, arguments, *words):
        path = FOLDER / name
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        output = capsys.readouterr()
        [line] = output.err.splitlines()
        assert stop.value.code == 2 and not output.out, output
        assert all(word in line for word in words), line

    return check


@pytest.mark.parametrize("name", ["bench_generation.py", "bench_training.py"])
def test_what_cannot_be_measured_or_written_is_said_before(name, refuses, tmp_path) -> None:
    for rounds in (0, -1):
        expected = f"{name}: rounds: expected at least 1, got {rounds}"
        refuses(name, ["--rounds", rounds], expected)
    for path in (tmp_path / "absent" / "rows.json", tmp_path, FOLDER / name / "rows.json"):
        refuses(name, ["--json", path], f"{name}: json: expected a file in a folder", str(path))


def test_bad_models_and_pictures(refuses, tmp_path, folder) -> None:
    name, absent = "bench_generation.py", tmp_path / "absent"
    refuses(name, ["--model", absent], "absent/config.json: no such file")
    refuses(name, ["--model", folder / "autoencoder"], "a folder of Calm, got Autoencoder")
    refuses(name, ["--model", folder / "calm", "--plot", "a.png"], "plot: expected none", "pools")
    refuses(name, ["--plot", absent / "a.png"], "plot: expected a file in a folder")
    refuses(name, ["--plot", tmp_path / "a.doc"], "plot: expected a file that ends in", "png")
    refuses(name, ["--record", absent, folder / "data"], "absent/config.json")
    refuses(name, ["--record", folder / "calm", absent], "absent", "calm-rt tokenize")


def test_bad_prompts(refuses, tmp_path, folder) -> None:
    name, absent, calm = "bench_prompts.py", tmp_path / "absent", folder / "calm"
    for count in (0, -5):
        refuses(name, [calm, folder / "data", "--prompts", count], "prompts: expected at least 1")
    refuses(name, [calm, folder / "data", "--json", absent / "rows.json"], "json: expected a file")
    refuses(name, [absent, folder / "data"], "absent/config.json: no such file")
    refuses(name, [folder / "autoencoder", folder / "data"], "a folder of Calm, got Autoencoder")
    refuses(name, [calm, absent], "absent", "calm-rt tokenize")
    refuses(name, [calm, folder / "data"], "data: expected a held-out document of 320 tokens")


def test_scripts_without_arguments(refuses, monkeypatch, capsys) -> None:
    refuses("bench_ops.py", [], "run: pytest benchmarks -k OP")
    for argument, code in (("--help", 0), ("x", 2)):
        monkeypatch.setattr(sys, "argv", ["resources.py", argument])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(FOLDER / "resources.py"), run_name="__main__")
        output = capsys.readouterr()
        assert stop.value.code == code and "usage: resources.py" in output.out + output.err
