"""Patched models in other people's loops: Trainer's accumulation, two processes of DDP."""

import gc
from pathlib import Path

import pytest
import torch
from official_standin import LM, assert_same_mean, build, losses, token_ids
from torch import nn
from two_processes import run_two

import calm_rt
from calm_rt.training_state import World

RUNS = 6  # of one training, for the spread of its loss


def train(model: nn.Module, folder: Path, accumulation: int, seed: int) -> tuple[float, float]:
    """Losses of training and evaluation; the same batches whatever the accumulation."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ids = token_ids(batch=32, patches=8)
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-9,  # the loss stays what it is
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    loss = trainer.train().training_loss
    return loss, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", ["Autoencoder", "EnergyTransformer"])
def test_accumulation_leaves_the_loss_what_it_is(kind, tmp_path):
    runs = {}
    for accumulation in (1, 4):
        model = build(kind)
        assert "loss_kwargs" in calm_rt.patch(model).cured
        results = [train(model, tmp_path, accumulation, seed) for seed in range(RUNS)]
        runs[accumulation] = torch.tensor(results).double()
    assert_same_mean(runs[1], runs[4])
    spread = runs[1].std(0) / runs[1].mean(0)
    assert (spread < 0.2).all()  # so that a factor of 4 could not hide in it


def test_loss_kwargs_can_be_kept_and_somebody_else_may_say():
    model = build()
    report = calm_rt.patch(model, keep_bugs=["loss_kwargs"])
    assert report.not_cured["loss_kwargs"] == "in keep_bugs"
    assert not hasattr(model, "accepts_loss_kwargs")
    calm_rt.unpatch(model)
    with calm_rt.patch(model):
        assert model.accepts_loss_kwargs is False
    assert not hasattr(model, "accepts_loss_kwargs")
    model.accepts_loss_kwargs = True
    with calm_rt.patch(model) as report:
        assert "loss_kwargs" not in report.cured | report.not_cured
    assert model.accepts_loss_kwargs is True
    del model.accepts_loss_kwargs

    class Mine(type(model)):
        def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
            return super().forward(input_ids, labels)

    model.__class__ = Mine
    report = calm_rt.patch(model)
    assert report.not_cured["loss_kwargs"] == "Mine has its own forward"


def distributed_rank(folder: Path) -> None:
    """One of two ranks with equal seeds, weights and tokens."""
    World("cpu")  # the group, to be left at exit
    rank = torch.distributed.get_rank()
    model, ids = build().train(), token_ids()
    calm_rt.patch(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(3)
    own = losses(parallel, ids)
    hidden = torch.ones(2, LM["hidden_size"])
    draws = model.generative_head.sample(hidden)
    patches = model.temperature_sampling(hidden, 1.0)
    parallel(input_ids=ids, labels=ids).loss.backward()
    grad = model.embed_proj[0].weight.grad
    saved = {"losses": own, "draws": draws, "patches": patches, "grad": grad}
    torch.save({name: tensor.detach() for name, tensor in saved.items()}, folder / f"{rank}.pt")
    del parallel, own  # what holds the group is gone when it is left
    gc.collect()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_draw_different_noise_and_share_gradients(tmp_path):
    program = (
        "from pathlib import Path; import test_patch_training as t; "
        "t.distributed_rank(Path(sys.argv[1]))"
    )
    run_two(program, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not (first["losses"] == second["losses"]).any()
    assert not torch.isclose(first["draws"], second["draws"]).all(-1).any()
    assert first["grad"].any() and torch.equal(first["grad"], second["grad"])
    assert_same_mean(first["losses"], second["losses"])
    torch.manual_seed(4)
    assert_same_mean(losses(build().train(), token_ids()), first["losses"])
