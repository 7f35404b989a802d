"""Training of the autoencoder and of CALM, resumable bit for bit, on one process or several.

Positions in the data and random numbers are pure functions of (seed, step), so accumulation,
resuming and another number of processes see the same blocks and the same noise. A run that is
bounded by `minutes` follows the clock and repeats only up to that.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from calm_rt import checkpoint, evaluation
from calm_rt.atomic import scratch_folder
from calm_rt.data import TokenShards
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.model_folder import CONFIG, TENSORS
from calm_rt.nn import (
    Autoencoder,
    AutoencoderConfig,
    Calm,
    CalmConfig,
    fold_encoder,
    folded_bytes,
)
from calm_rt.ops.check import check
from calm_rt.training_config import FREE_SETTINGS, TrainingConfig
from calm_rt.training_loop import Loss, Metrics, TrainingDiverged, TrainingLoop
from calm_rt.training_state import STATE, TrainingState, World, build_optimizer

__all__ = ["TrainingConfig", "TrainingDiverged", "train", "train_autoencoder"]

Model = TypeVar("Model", Autoencoder, Calm)


def train_autoencoder(
    config: AutoencoderConfig | None,
    data: TokenShards,
    output: str | Path,
    training: TrainingConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Autoencoder:
    """Trains an autoencoder on token shards and leaves it, its log and its curves in a folder.

    config: sizes; None with resume, for the ones in the folder.
    output: gets config.json, model.safetensors, training_state.safetensors, log.jsonl, curves.png.
    resume: continue the run in output; the result is bitwise that of a run never interrupted.
    overwrite: replace a run that is already in output.
    returns: the trained model.
    raises: ValueError for settings that do not fit, TrainingDiverged, OSError for an unwritable
        folder, KeyboardInterrupt after Ctrl-C once the checkpoint is written.
    """
    model, output = _start(
        config, Autoencoder, Autoencoder, output, training.seed, resume, overwrite
    )
    world = World(device)
    ids = _held_out(data, training).to(world.device)

    def evaluate(precision: str) -> Metrics:
        accuracy = evaluation.reconstruction_accuracy
        return {
            "accuracy": accuracy(model, ids),
            "accuracy_sigma_0.3": accuracy(model, ids, noise_std=0.3, seed=training.seed),
        }

    def loss(*arguments, **options) -> tuple[Tensor, dict[str, Tensor]]:
        return autoencoder_loss(*arguments, **options, random_tokens=training.random_tokens)

    _fit(model, loss, evaluate, data, output, training, resume, world)
    return model


def train(
    config: CalmConfig | None,
    autoencoder: Autoencoder | None,
    data: TokenShards,
    output: str | Path,
    training: TrainingConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Calm:
    """Trains a CALM on token shards, with a frozen autoencoder, and leaves it, its log and its
    curves in a folder.

    config: sizes.  autoencoder: a trained one.  Both None with resume, for those in the folder.
    The other arguments, what is left in output and what is raised: as train_autoencoder.
    returns: the trained model.
    """

    def build(config: CalmConfig) -> Calm:
        if not isinstance(autoencoder, Autoencoder):
            check(False, "autoencoder", "an Autoencoder", type(autoencoder).__name__)
        model = Calm(config, autoencoder.config)
        model.ae_model.load_state_dict(autoencoder.state_dict())
        return model

    target = training.target_accuracy
    check(target is None, "target_accuracy", "None for a CALM, which has no accuracy", target)
    model, output = _start(config, Calm, build, output, training.seed, resume, overwrite)
    limit = model.config.max_position_embeddings * model.config.patch_size
    check(
        2 * model.config.patch_size <= training.block_size <= limit,
        "block_size",
        f"at least two patches, at most max_position_embeddings x K = {limit}",
        training.block_size,
    )
    world = World(device)
    ids = _held_out(data, training).to(world.device)

    def evaluate(precision: str) -> Metrics:
        loss, terms = energy_loss(
            model, ids, seed=training.seed, precision=precision, num_targets=training.num_targets
        )
        brier = evaluation.brier_lm(model, ids, num_draws=2, seed=training.seed)
        return {
            "held_out_loss": loss.item(),
            **{f"held_out_{name}": value.item() for name, value in terms.items()},
            "brier_lm": brier.score,
            "brier_lm_interval": list(brier.interval),
        }

    def loss(*arguments, **options) -> tuple[Tensor, dict[str, Tensor]]:
        return energy_loss(*arguments, **options, num_targets=training.num_targets)

    _fit(model, loss, evaluate, data, output, training, resume, world)
    return model


def _start(
    config: AutoencoderConfig | CalmConfig | None,
    kind: type[Model],
    build: Callable[[Any], Model],
    output: str | Path,
    seed: int,
    resume: bool,
    overwrite: bool,
) -> tuple[Model, Path]:
    """The model that a run starts from, and the run's folder."""
    output = Path(output)
    if resume:
        TrainingState.load(output)  # says what is missing before the model is read
        model = checkpoint.load(output)
        if not isinstance(model, kind):
            check(False, "resume", f"a run of {kind.__name__} in {output}", type(model).__name__)
        if config is not None:
            check(
                config == model.config,
                "config",
                f"the sizes of the run in {output} (or None)",
                config,
            )
        return model, output
    check(config is not None, "config", "the model's sizes", None)
    taken = [name for name in (STATE, CONFIG, TENSORS) if (output / name).exists()]
    if taken and not overwrite:
        remedy = "run; resume it, overwrite it" if STATE in taken else "model; overwrite it"
        raise ValueError(f"output: {output} already holds a {remedy} or choose another folder")
    with scratch_folder(output, "output"):  # says so where nothing can be written
        pass
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config), output


def _fit(
    model: Model,
    loss_function: Loss,
    evaluate: Callable[[str], Metrics],
    data: TokenShards,
    output: Path,
    training: TrainingConfig,
    resume: bool,
    world: World,
) -> None:
    """The loop: from the state in output, or from step 0, to the end of training."""
    parts = world.size * training.accumulation
    patch_size, vocab_size = model.config.patch_size, model.config.vocab_size
    check(
        training.batch_size % parts == 0,
        "batch_size",
        f"a multiple of processes x accumulation = {parts}",
        training.batch_size,
    )
    check(
        training.block_size % patch_size == 0,
        "block_size",
        f"a multiple of patch_size {patch_size}",
        training.block_size,
    )
    check(
        data.patch_size == patch_size,
        "data",
        f"shards for patch_size {patch_size}",
        data.patch_size,
    )
    check(
        data.vocab_size <= vocab_size,
        "data",
        f"token ids below vocab_size {vocab_size}",
        data.vocab_size,
    )
    model.to(world.device).train()
    optimizer = build_optimizer(
        model, training.learning_rate, training.betas, training.weight_decay
    )
    state = _state(training, data, output, resume)
    if resume:
        state.restore(output, model, optimizer)
    if isinstance(model, Calm) and training.fold_encoder:
        size = folded_bytes(model.ae_model) / 1e6
        if world.rank == 0:
            print(f"encoder folded into {size:.1f} MB of tables (fold_encoder=False saves them)")
        fold_encoder(model.ae_model)
    loop = TrainingLoop(
        model, loss_function, evaluate, data, output, training, world, optimizer, state
    )
    loop.run()
    model.eval()


def _state(
    training: TrainingConfig, data: TokenShards, output: Path, resume: bool
) -> TrainingState:
    """The state to start from; a resumed run must have the settings and the data of its start."""
    settings, defaults = (
        json.loads(json.dumps(dataclasses.asdict(values)))  # tuples as JSON has them
        for values in (training, TrainingConfig())
    )
    fingerprint = dataclasses.asdict(data.header)
    if not resume:
        return TrainingState(training=settings, data=fingerprint)
    state = TrainingState.load(output)
    stored = defaults | state.training  # an older version had fewer
    for name in settings.keys() - FREE_SETTINGS:
        expected = f"{stored[name]} as in {output}"
        check(settings[name] == stored[name], name, expected, settings[name])
    for name, value in state.data.items():
        expected, got = (f"{name} {v}" for v in (f"{value} as in {output}", fingerprint.get(name)))
        check(fingerprint.get(name) == value, "data", expected, got)
    state.training = settings
    return state


def _held_out(data: TokenShards, training: TrainingConfig) -> Tensor:
    """The held-out blocks that every evaluation looks at, [blocks, block_size]."""
    check(isinstance(data, TokenShards), "data", "TokenShards", repr(data))
    return next(data.held_out_batches(training.evaluation_blocks, training.block_size, limit=1))
