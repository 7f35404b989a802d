"""Whole steps beside the ops in a benchmark's report, and what they run."""

import dataclasses
import json

import pytest
import torch

from calm_rt import _native, benchmark, cli, ops, planted, quickstart, report, steps
from calm_rt.nn import AutoencoderConfig, CalmConfig
from calm_rt.testing import CASES

LIMITS = {"copy": 1e10, "product": {"float32": 1e11, "bfloat16": 2e11}}


@pytest.fixture
def small(monkeypatch):
    """One tiny op, training steps of a tiny model, and no limits and no memory to measure."""
    sizes = {"patch_size": 4, "vocab_size": 20, "latent_size": 8}
    monkeypatch.setattr(steps, "SIZES", sizes)
    tiny = AutoencoderConfig(hidden_size=16, intermediate_size=16, **sizes)
    monkeypatch.setattr(steps, "AUTOENCODER", tiny)
    own = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    own |= {"num_attention_heads": 2, "num_samples": 2}
    monkeypatch.setattr(steps, "CALM", CalmConfig(**own, **sizes))
    for stage, config in (("AUTOENCODER", tiny), ("CALM", steps.CALM)):
        names = getattr(quickstart, f"{stage}_SIZES")
        sizes = {name: getattr(config, name) for name in names}
        monkeypatch.setattr(quickstart, f"{stage}_SIZES", sizes)
    monkeypatch.setattr(steps, "IDS", dict.fromkeys(steps.IDS, (2, 16)))
    kinds = {name: make for name, make in steps.STEPS.items() if "training" in name}
    monkeypatch.setattr(steps, "STEPS", kinds)
    [case] = [case for case in CASES if str(case) == "noise-normal"]
    monkeypatch.setattr(benchmark, "CASES", [dataclasses.replace(case, benchmark=True, rounds=5)])
    monkeypatch.setattr(benchmark, "limits", lambda device: LIMITS)


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def results_of(folder):
    return json.loads((folder / report.RESULTS).read_text())


def test_steps_stand_in_the_report_and_in_a_comparison(small, tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    assert bench("--quick", "--steps", "--report", first) == 0
    results = results_of(first)
    rows = [row for row in results["rows"] if row["kind"] == "step"]
    assert {(row["case"], row["rival"]) for row in rows} == {
        (f"{kind}-training", rival)
        for kind in steps.IDS
        for rival in steps.rivals_of(kind, steps.QUICK_RIVALS)
    }
    assert all(0 < row["min_ms"] <= row["median_ms"] for row in rows)
    for row in rows:
        row["peak_extra_bytes"] = 7_000_000
        row["min_ms"] = row["median_ms"]  # steady, whatever else runs here
    report.write_report(results, first)
    for row in rows:
        row["median_ms"] *= 2 if row["rival"] == "native" else 1
        row["min_ms"] = row["median_ms"]
    report.write_report(results, second)
    text = (second / report.REPORT).read_text()
    times, memory = text.split("## Memory")
    assert "calm-training" in times and "whole steps" in times and "roofline" in times
    assert "calm-training" in memory and " 7 " in memory
    capsys.readouterr()
    assert bench("--compare", first, second) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "training" in line]
    assert len(lines) == 4 and all("slower" in line for line in lines)


def test_a_report_of_an_earlier_version_is_still_compared(small, tmp_path, capsys):
    """It has neither kinds nor steps."""
    assert bench("--quick", "--report", tmp_path / "a") == 0
    results = results_of(tmp_path / "a")
    for row in results["rows"]:
        del row["kind"]
    report.write_report(results, tmp_path / "b")
    assert bench("--compare", tmp_path / "b", tmp_path / "a") == 0
    assert "noise-normal" in capsys.readouterr().out


def test_which_runs_have_steps(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "measure_steps", lambda device, quick: seen.append(quick) or ())
    monkeypatch.setattr(benchmark, "measure_all", lambda *_: ())
    for arguments, expected in (
        (["--quick"], []),
        (["--ops", "noise"], []),
        ([], [False]),
        (["--quick", "--steps"], [True]),
        (["--ops", "noise", "--steps"], [False]),
    ):
        for spelling in ("--report", "--output"):  # the one is documented, the other was
            folder = tmp_path / spelling[2:]
            assert bench(*arguments, "--json", spelling, folder) == 0
            assert seen == expected and (folder / report.REPORT).is_file()
            seen.clear()


@pytest.mark.parametrize("kind", ["calm", "autoencoder"])
def test_a_training_step_trains(small, kind):
    for rival in ("official", "native"):
        step = steps.training_step(kind, rival)
        losses = [float(step()) for _ in range(300)]
        assert sum(losses[-20:]) < sum(losses[:20]), rival


@pytest.mark.parametrize("stage", ["calm", "autoencoder"])
def test_the_quickstart_does_the_same_with_kernels_and_without(small, stage, monkeypatch):
    called, call = [], _native.call
    monkeypatch.setattr(_native, "call", lambda op, *rest: called.append(op) or call(op, *rest))
    losses, kernels = {}, {}
    for rival in steps.QUICKSTART_RIVALS:
        step = steps.training_step(f"quickstart-{stage}", rival)
        called.clear()
        with benchmark.route(rival):
            losses[rival] = [float(step()) for _ in range(3)]
        kernels[rival] = set(called)
    assert losses["reference"] == pytest.approx(losses["native"], rel=1e-3)
    assert not kernels["reference"] and kernels["native"]


def test_memory_is_that_of_a_step():
    """The official loss makes all logits of 2,048 x 4 tokens."""
    official, native = (
        steps._peak_memory("autoencoder-training", rival, "cpu") for rival in ("official", "native")
    )
    assert 0 < native < official and official > 2048 * 4 * 1024 * 4


def test_pools_come_back_from_the_decoder():
    pools = planted.likely_pools()
    model = planted.PlantedCalm(pools, torch.float32)
    decoded = ops.decode(model.latents.flatten(0, 1), model.ae_model.decoder.weights())
    assert torch.equal(decoded.view(pools.shape), pools)
    unique = [len(pool.unique(dim=0)) for pool in pools]
    assert unique == sorted(unique, reverse=True) and unique[0] > 100 > unique[-1]
    for pool in pools:  # at temperature 1/2 both choose a patch that was drawn twice
        for patch in (model.select_officially(), model.select().patches):
            assert (pool == patch).all(1).sum() >= 2
