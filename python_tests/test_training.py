"""The training loop: resuming, interruption, several processes, divergence, full disks."""

import atexit
import dataclasses
import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from two_processes import run_two

from calm_rt import checkpoint, tensor_files
from calm_rt.curves import TrainingLog, plot_curves, read_log
from calm_rt.data import TokenShards, write_shards
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig
from calm_rt.training import TrainingConfig, TrainingDiverged, train, train_autoencoder
from calm_rt.training_state import STATE, World, build_optimizer

PATCH, VOCABULARY, LATENT = 2, 40, 4
SHORT = {
    "batch_size": 4,
    "block_size": 16,
    "warmup_steps": 2,
    "evaluation_blocks": 2,
    "log_every": 1,
    "evaluate_every": 4,
    "save_every": 3,
    "precision": "fp32",
}


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    path, fingerprint = Path("letters"), "letters"
    vocab_size, bos_id, eos_id, pad_id = VOCABULARY, 1, 2, 3

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") + 4 for letter in text] for text in texts]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    texts = [("abc" * (i % 7 + 2) + "xyz" * (i % 5 + 1))[i % 3 :] for i in range(60)]
    return write_shards(texts, Letters(), tmp_path_factory.mktemp("shards"), PATCH, held_out=0.3)


def autoencoder_config(**changes):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "latent_size": LATENT, "ae_dropout": 0.25}
    return AutoencoderConfig(patch_size=PATCH, vocab_size=VOCABULARY, **(sizes | changes))


def calm_config(**changes):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "noise_size": 4}
    sizes |= {"num_attention_heads": 2, "num_mlp_layers": 1, "num_samples": 3}
    shared = {"patch_size": PATCH, "vocab_size": VOCABULARY, "latent_size": LATENT}
    return CalmConfig(**shared, **(sizes | changes))


# ---- settings ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"minutes": 0.0}, "minutes"),
        ({"schedule": "steep"}, "constant, cosine, linear"),
        ({"precision": "fp8"}, "auto, fp32, bf16"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_learning_rate_schedules():
    settings = {"steps": 100, "warmup_steps": 9, "learning_rate": 2.0}
    constant = TrainingConfig(**settings)
    assert [constant.rate(step, 0) for step in (0, 4, 9, 99)] == pytest.approx([0.2, 1, 2, 2])
    for schedule, half in (("linear", 1.0), ("cosine", 1.0)):
        config = TrainingConfig(**settings, schedule=schedule)
        rates = [config.rate(step, 0) for step in range(9, 101)]
        assert config.rate(50, 0) == pytest.approx(half) and rates[-1] == pytest.approx(0)
        assert rates == sorted(rates, reverse=True)
    timed = TrainingConfig(**settings, schedule="linear", minutes=1.0)
    assert timed.rate(10, 45) == pytest.approx(0.5)
    assert timed.progress(10, 60) == 1


def test_decay_of_matrices_only():
    model = Calm(calm_config(), autoencoder_config())
    decayed, others = build_optimizer(model, 1e-3, (0.9, 0.95), 0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"])
    others = {names[id(p)] for p in others["params"]}
    assert "transformer.embed_tokens.weight" in others
    assert all("norm" in n or "bias" in n or "ln" in n or "embed" in n for n in others)
    count = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(others) == count


# ---- the loop ----


def run(shards, output, steps, *, calm=False, **changes):
    """A short run; returns the losses of its log."""
    switches = {k: changes.pop(k) for k in ("resume", "overwrite") if k in changes}
    settings = TrainingConfig(steps=steps, **(SHORT | changes))
    resumed = switches.get("resume", False)
    if calm:
        torch.manual_seed(3)
        autoencoder = None if resumed else Autoencoder(autoencoder_config())
        config = None if resumed else calm_config()
        train(config, autoencoder, shards, output, settings, **switches)
    else:
        config = None if resumed else autoencoder_config()
        train_autoencoder(config, shards, output, settings, **switches)
    return losses(output)


def losses(output):
    return {line["step"]: line["loss"] for line in read_log(output) if "loss" in line}


def assert_same_run(first, second):
    """Bitwise: losses, parameters, moments."""
    assert losses(first) == losses(second)
    for file in (STATE, checkpoint.TENSORS):
        one, other = (tensor_files.read_tensors(folder / file) for folder in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("calm", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_is_bitwise_uninterrupted(shards, tmp_path, calm, schedule, monkeypatch):
    """The second run loses its last steps, as in a crash, and goes on from the checkpoint."""
    run(shards, tmp_path / "whole", 8, calm=calm, schedule=schedule)
    seen = TokenShards.train_batch

    def crash(self, step, *arguments, **options):
        if step == 5:
            raise RuntimeError("power cut")
        return seen(self, step, *arguments, **options)

    monkeypatch.setattr(TokenShards, "train_batch", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(shards, tmp_path / "cut", 8, calm=calm, schedule=schedule)
    assert list(losses(tmp_path / "cut")) == [1, 2, 3, 4, 5]  # step 3 is the last one saved
    monkeypatch.undo()
    run(shards, tmp_path / "cut", 8, calm=calm, schedule=schedule, resume=True)
    assert list(losses(tmp_path / "cut")) == list(range(1, 9))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(shards, tmp_path, monkeypatch, name):
    run(shards, tmp_path / "whole", 6)
    seen, previous = TokenShards.train_batch, signal.getsignal(name)

    def press(self, step, *arguments, **options):
        if step == 4:
            os.kill(os.getpid(), name)
        return seen(self, step, *arguments, **options)

    monkeypatch.setattr(TokenShards, "train_batch", press)
    with pytest.raises(KeyboardInterrupt, match=r"step [56] is saved in .*resume"):
        run(shards, tmp_path / "cut", 6, save_every=1000)
    assert signal.getsignal(name) is previous
    monkeypatch.undo()
    assert isinstance(checkpoint.load(tmp_path / "cut"), Autoencoder)
    run(shards, tmp_path / "cut", 6, save_every=1000, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_can_go_on(shards, tmp_path):
    run(shards, tmp_path / "whole", 6)
    run(shards, tmp_path / "longer", 2)
    run(shards, tmp_path / "longer", 6, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "longer")
    run(shards, tmp_path / "longer", 6, resume=True)  # nothing is left to do
    assert_same_run(tmp_path / "whole", tmp_path / "longer")


@pytest.mark.parametrize("calm", [False, True])
def test_accumulation_is_the_same_run(shards, tmp_path, calm):
    whole = run(shards, tmp_path / "whole", 4, calm=calm)
    parts = run(shards, tmp_path / "parts", 4, calm=calm, accumulation=4)
    assert parts == pytest.approx(whole, rel=1e-5)
    other = run(shards, tmp_path / "other", 4, calm=calm, seed=1)
    assert other != pytest.approx(whole, rel=1e-3)


def test_two_processes_are_the_same_run(shards, tmp_path):
    """Two processes under torchrun's environment draw the noise that one draws."""
    whole = run(shards, tmp_path / "whole", 4, calm=True)
    program = (
        "import test_training as t; from pathlib import Path; "
        "t.run(t.TokenShards(sys.argv[1]), Path(sys.argv[2]), 4, calm=True)"
    )
    run_two(program, shards.folder, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(whole, rel=1e-5)


def leave_group() -> None:
    """Takes part in a group to its end, and ends with 1 where a thread of gloo outlives it."""

    def leave() -> None:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        os._exit(any("gloo" in name for name in names))

    atexit.register(leave)  # the last handler, the first one registered
    world = World("cpu")
    world.average([torch.ones(8)])
    torch.optim.AdamW([torch.ones(1)])  # loads what would keep the group


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are seen in /proc")
def test_no_thread_outlives_the_group():
    run_two("import test_training as t; t.leave_group()")


def test_divergence_keeps_the_last_checkpoint(shards, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"not finite at step .* step \d+ in .* is kept"):
        run(shards, tmp_path, 50, learning_rate=1e30, save_every=1, warmup_steps=0)
    assert json.loads(tensor_files.read_metadata(tmp_path / STATE)["state"])["step"] >= 1
    with pytest.raises(TrainingDiverged, match="no checkpoint"):
        run(shards, tmp_path / "none", 50, learning_rate=1e30, save_every=100, warmup_steps=0)
    assert not (tmp_path / "none" / STATE).exists()


@pytest.mark.parametrize("failing", ["calm_rt.tensor_files.save_file", "os.replace"])
def test_full_disk_keeps_the_last_checkpoint(shards, tmp_path, monkeypatch, failing):
    run(shards, tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

    replace = os.replace

    def full(*arguments, **__):
        if failing == "os.replace" and Path(arguments[1]).suffix != ".safetensors":
            return replace(*arguments)  # of the log, which a run begins with
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space left"):
        run(shards, tmp_path, 6, resume=True)
    monkeypatch.undo()
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert not list(tmp_path.glob(".*"))
    assert list(run(shards, tmp_path, 6, resume=True)) == [1, 2, 3, 4, 5, 6]


def test_unwritable_folder(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: cannot write into .*file/run"):
        run(shards, tmp_path / "file" / "run", 2)


def test_runs_are_not_mixed_up(shards, tmp_path):
    with pytest.raises(ValueError, match="start it without resume"):
        run(shards, tmp_path, 2, resume=True)
    run(shards, tmp_path, 2)
    with pytest.raises(ValueError, match="already holds a run"):
        run(shards, tmp_path, 2)
    for changes, message in (({"seed": 3}, "seed"), ({"learning_rate": 1.0}, "learning_rate")):
        with pytest.raises(ValueError, match=f"{message}: expected .* as in"):
            run(shards, tmp_path, 4, resume=True, **changes)
    with pytest.raises(ValueError, match="a run of Calm"):
        run(shards, tmp_path, 4, calm=True, resume=True)
    settings = TrainingConfig(steps=4, **SHORT)
    with pytest.raises(ValueError, match="config"):
        config = autoencoder_config(latent_size=5)
        train_autoencoder(config, shards, tmp_path, settings, resume=True)
    other = write_shards(["abc"] * 50 + ["xyz"], Letters(), tmp_path / "other", PATCH, 0.3)
    with pytest.raises(ValueError, match="data"):
        run(other, tmp_path, 4, resume=True)
    assert len(run(shards, tmp_path, 1, overwrite=True)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "accumulation": 2}, "batch_size"),
        ({"block_size": 15}, "block_size"),
        ({"block_size": 100_000}, "block_size"),
    ],
)
def test_blocks_that_do_not_fit(shards, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(shards, tmp_path, 2, **changes)


def test_models_that_do_not_fit_the_data(shards, tmp_path):
    settings = TrainingConfig(steps=2, **SHORT)
    for changes, message in (({"patch_size": 4}, "patch_size"), ({"vocab_size": 20}, "vocab_size")):
        config = dataclasses.replace(autoencoder_config(), **changes)
        with pytest.raises(ValueError, match=message):
            train_autoencoder(config, shards, tmp_path, settings)
    with pytest.raises(ValueError, match="config"):
        train_autoencoder(None, shards, tmp_path, settings)
    with pytest.raises(ValueError, match="autoencoder"):
        train(calm_config(), None, shards, tmp_path, settings)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        config = calm_config(max_position_embeddings=7)
        train(config, Autoencoder(autoencoder_config()), shards, tmp_path, settings)


def test_learns_and_stops_at_the_target(shards, tmp_path):
    settings = {"learning_rate": 2e-2, "evaluate_every": 50, "target_accuracy": 0.95}
    config = autoencoder_config(hidden_size=32, intermediate_size=64, ae_dropout=0.0)
    settings = TrainingConfig(steps=1000, **(SHORT | settings | {"save_every": 1000}))
    train_autoencoder(config, shards, tmp_path, settings)
    lines = read_log(tmp_path)
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    assert accuracies[-1] >= 0.95 > max(accuracies[:-1], default=0)
    assert lines[-1]["step"] < 1000
    assert checkpoint.load(tmp_path).config == config


def test_what_a_run_leaves(shards, tmp_path):
    run(shards, tmp_path, 4, calm=True)
    expected = {"config.json", "model.safetensors", STATE, "log.jsonl", "curves.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    first, *_, last = read_log(tmp_path)
    assert {"step", "loss", "diversity", "fidelity", "learning_rate", "tokens_per_second"} < set(
        first
    )
    assert {"held_out_loss", "held_out_diversity", "brier_lm", "brier_lm_interval"} < set(last)
    assert first["loss"] == pytest.approx(2 * first["fidelity"] - first["diversity"], rel=1e-5)
    assert isinstance(checkpoint.load(tmp_path), Calm)


def test_precision_is_decided_once(shards, tmp_path, monkeypatch):
    run(shards, tmp_path, 2, precision="auto")
    state = json.loads(tensor_files.read_metadata(tmp_path / STATE)["state"])
    assert state["precision"] in ("fp32", "bf16")
    monkeypatch.setattr("calm_rt.training_loop.TrainingLoop._choose_precision", None)
    run(shards, tmp_path, 4, precision="auto", resume=True)


# ---- log and curves ----


def test_log_survives_a_torn_line(tmp_path):
    log = TrainingLog(tmp_path)
    log.write(1, {"loss": 2.0})
    log.write(2, {"loss": math.nan, "interval": [math.inf, 1.0]})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_log(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "interval": [None, 1.0]},
    ]
    TrainingLog(tmp_path, first_step=1).write(2, {"loss": 1.0})
    assert [line["loss"] for line in read_log(tmp_path)] == [2.0, 1.0]


def test_curves_of_holes_and_intervals(tmp_path):
    log = TrainingLog(tmp_path)
    log.write(1, {"loss": None, "interval": [None, None]})
    log.write(2, {"loss": 1.0, "interval": [0.0, 2.0]})
    plot_curves({"one": tmp_path, "none": tmp_path / "absent"}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_process_alone():
    world = World("cpu")
    tensors = [torch.tensor([2.0])]
    world.average(tensors)
    assert world.size == 1 and tensors[0] == 2 and world.agree("x") == "x"
