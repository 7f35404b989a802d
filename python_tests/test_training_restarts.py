"""What a run may be started from, over and again: other data, earlier runs, broken first saves."""

import errno
import json
import os
import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import (
    SHORT,
    Letters,
    assert_same_run,
    autoencoder_config,
    calm_config,
    losses,
    run,
    shards,  # noqa: F401
)

from calm_rt import checkpoint
from calm_rt.curves import LOG, read_log
from calm_rt.data import TokenShards, write_shards
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.model_folder import copy_tokenizer
from calm_rt.nn import Autoencoder, Calm
from calm_rt.tensor_files import read_metadata
from calm_rt.training import TrainingConfig, train
from calm_rt.training_state import STATE

TEXTS = [("abc" * (i % 7 + 2) + "xyz" * (i % 5 + 1))[i % 3 :] for i in range(60)]


class Shuffled(Letters):
    """Another tokenizer of as many tokens."""

    fingerprint = "shuffled letters"


@pytest.mark.parametrize(("tokenizer", "held_out"), [(Letters(), 0.6), (Shuffled(), 0.3)])
def test_other_shards_of_the_same_size_are_refused(shards, tmp_path, tokenizer, held_out):  # noqa: F811
    run(shards, tmp_path / "run", 2)
    other = write_shards(TEXTS, tokenizer, tmp_path / "data", 2, held_out=held_out)
    assert other.num_tokens == shards.num_tokens
    with pytest.raises(ValueError, match=r"data: expected (tokenizer|num_train\w+) .* as in .*run"):
        run(other, tmp_path / "run", 4, resume=True)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("calm", [False, True])
def test_a_disk_that_is_full_at_the_first_save_costs_no_more_than_that(
    shards,  # noqa: F811
    tmp_path,
    monkeypatch,
    calm,
):
    """The state was written, the model behind it was not."""
    run(shards, tmp_path / "whole", 6, calm=calm)
    kind, saves = (Calm if calm else Autoencoder), []

    def save(model, path):
        saves.append(path)
        if len(saves) == 2:  # the first is that of step 0
            full()
        checkpoint.save(model, path)

    monkeypatch.setattr(kind, "save", save)
    with pytest.raises(OSError, match="No space"):
        run(shards, tmp_path / "cut", 6, calm=calm)
    monkeypatch.undo()
    run(shards, tmp_path / "cut", 6, calm=calm, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_nothing_of_an_overwritten_run_is_resumed(shards, tmp_path, monkeypatch):  # noqa: F811
    run(shards, tmp_path, 6)
    monkeypatch.setattr(TokenShards, "train_batch", full)
    with pytest.raises(OSError, match="No space"):
        run(shards, tmp_path, 6, seed=1, overwrite=True)
    monkeypatch.undo()
    assert not (tmp_path / STATE).exists() and not losses(tmp_path)
    with pytest.raises(ValueError, match="start it without resume"):
        run(shards, tmp_path, 6, seed=1, resume=True)


def test_a_model_is_not_overwritten(shards, tmp_path):  # noqa: F811
    Autoencoder(autoencoder_config()).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"output: .* already holds a model"):
        run(shards, tmp_path, 2)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(shards, tmp_path, 2, overwrite=True)


@pytest.mark.parametrize("target", [None, 0.01])
def test_ctrl_c_at_an_evaluation_is_that_of_no_ctrl_c(shards, tmp_path, monkeypatch, target):  # noqa: F811
    settings = {"target_accuracy": target, "evaluate_every": 4}
    run(shards, tmp_path / "whole", 8, **settings)
    seen = TokenShards.train_batch

    def press(self, step, *arguments, **options):
        if step == 2:  # the next one is the last
            os.kill(os.getpid(), signal.SIGINT)
        return seen(self, step, *arguments, **options)

    monkeypatch.setattr(TokenShards, "train_batch", press)
    with pytest.raises(KeyboardInterrupt, match="step 4 is saved"):
        run(shards, tmp_path / "cut", 8, **settings)
    monkeypatch.undo()
    run(shards, tmp_path / "cut", 8, resume=True, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    evaluated = [
        [line["step"] for line in read_log(tmp_path / name) if "accuracy" in line]
        for name in ("whole", "cut")
    ]
    assert evaluated[0] == evaluated[1] == ([4] if target else [4, 8])


def test_settings_that_a_run_does_not_have(shards, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="target_accuracy: expected None for a CALM"):
        settings = TrainingConfig(steps=2, **SHORT, target_accuracy=0.9)
        train(calm_config(), Autoencoder(autoencoder_config()), shards, tmp_path, settings)
    for changes in ({"target_accuracy": 99.9}, {"betas": (0.9,)}, {"seed": 2**63}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            TrainingConfig(**changes)
    for name in ("evaluation_blocks", "num_targets", "warmup_steps", "seed"):
        with pytest.raises(ValueError, match=f"{name}: expected an int, got 2.5"):
            TrainingConfig(**{name: 2.5})


def test_losses_take_the_callers_precision():
    """Of the weights and of torch.autocast."""
    torch.manual_seed(0)
    model, autoencoder = (
        Calm(calm_config(), autoencoder_config()),
        Autoencoder(autoencoder_config()),
    )
    torch.nn.init.normal_(
        model.generative_head.final_layer.linears[2].weight
    )  # else its draws are 0
    ids = torch.randint(4, 40, (2, 8))
    for loss, module in ((energy_loss, model), (autoencoder_loss, autoencoder)):
        plain = loss(module, ids)[0]
        assert torch.equal(loss(module, ids, precision="fp32")[0], plain)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = loss(module, ids)[0]
            assert torch.equal(loss(module, ids, precision="fp32")[0], plain)
        assert torch.equal(loss(module, ids, precision="bf16")[0], mixed)
        assert not torch.equal(mixed, plain)
        assert loss(module.bfloat16(), ids)[0].isfinite()
        module.float()


def test_what_is_saved_is_a_model(tmp_path):
    model = Autoencoder(autoencoder_config())
    checkpoint.save(torch.compile(model, backend="eager"), tmp_path)
    assert torch.equal(checkpoint.load(tmp_path).encoder.norm.weight, model.encoder.norm.weight)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="model: expected an Autoencoder or a Calm, got Linear"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_diverged_model_comes_back(tmp_path):
    model = Autoencoder(autoencoder_config())
    with torch.no_grad():
        model.encoder.embed_tokens.weight[3] = torch.nan
    checkpoint.save(model, tmp_path, layout="official")
    loaded = checkpoint.load(tmp_path).encoder.embed_tokens.weight
    assert torch.equal(loaded.isnan(), model.encoder.embed_tokens.weight.isnan())


def test_a_copied_tokenizer_is_the_only_one(tmp_path):
    source, target, other = (tmp_path / name for name in ("source", "target", "other"))
    for folder in (source, target, other):
        folder.mkdir()
    (source / "tokenizer.json").write_text("new")
    (target / "tokenizer.model").write_text("old")
    (other / "real.json").write_text("kept")
    (target / "tokenizer.json").symlink_to(other / "real.json")
    copy_tokenizer(source, target)
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("tokenizer.json", "new")]
    assert (other / "real.json").read_text() == "kept"
    copy_tokenizer(other, target)  # which has none
    assert (target / "tokenizer.json").read_text() == "new"


def test_a_setting_that_is_refused_costs_no_run(shards, tmp_path):  # noqa: F811
    run(shards, tmp_path, 2, calm=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="block_size: expected at least two patches"):
        run(shards, tmp_path, 2, calm=True, overwrite=True, block_size=2)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def rewrite_settings(folder, change) -> None:
    tensors, metadata = load_file(folder / STATE), read_metadata(folder / STATE)
    state = json.loads(metadata["state"])
    change(state["training"])
    save_file(tensors, folder / STATE, {"state": json.dumps(state)})


def test_runs_of_other_versions(shards, tmp_path):  # noqa: F811
    """An older one had fewer settings, a newer one has more."""
    run(shards, tmp_path, 2)
    rewrite_settings(tmp_path, lambda settings: settings.pop("num_targets"))
    run(shards, tmp_path, 4, resume=True)
    rewrite_settings(tmp_path, lambda settings: settings.update(new_setting=1))
    with pytest.raises(ValueError, match=r"not a training state .*unknown settings new_setting"):
        run(shards, tmp_path, 6, resume=True)


def test_shards_are_pickled_by_their_folder(shards, tmp_path, monkeypatch):  # noqa: F811
    data = pickle.dumps(shards)
    assert len(data) < 1000 < shards.num_tokens
    monkeypatch.chdir(tmp_path)
    assert all(
        map(torch.equal, shards.train_batch(0, 2, 8), pickle.loads(data).train_batch(0, 2, 8))
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "1e-3"), ("minutes", "1"), ("clip_norm", None), ("betas", 0.9)],
)
def test_settings_that_are_no_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected "):
        TrainingConfig(**{name: value})


def test_the_log_ends_before_a_line_that_is_none_of_its_own(tmp_path):
    (tmp_path / LOG).write_text('{"step": 1, "loss": 2.0}\n[3]\n{"step": 2}\n')
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]
