"""One training step of a small CALM and of its autoencoder: official, compiled and ours.

    pytest benchmarks -k training
    python benchmarks/bench_training.py [--profile] [--json FILE]

`official` is the official code's loss in eager PyTorch on the same modules, `compiled`
torch.compile of it, `ours` calm_rt.losses as calm_rt.training runs it, the encoder folded. A step
is loss, backward, clipping and AdamW, in fp32; the three take turns round by round.
"""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_rows import conditions, medians, step_rows, write_rows
from torch import Tensor, nn

from calm_rt import losses, official_losses
from calm_rt.benchmark import compete
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, fold_encoder
from calm_rt.report import duel_text
from calm_rt.training_config import TrainingConfig
from calm_rt.training_state import build_optimizer

SIZES = {"patch_size": 4, "vocab_size": 1024, "latent_size": 128}
AUTOENCODER = AutoencoderConfig(hidden_size=256, intermediate_size=640, **SIZES)
CALM = CalmConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_samples=8,
    **SIZES,
)
NUM_TARGETS = 100
IDS = {"calm": (8, 260), "autoencoder": (16, 512)}  # blocks and tokens: 512 rows of 8 draws; 2048
ROUNDS = 15
TRAINING = TrainingConfig()

Loss = Callable[[nn.Module, Tensor], Tensor]


def losses_of(kind: str) -> dict[str, Loss]:
    """The loss of each rival, as functions of a model and ids."""
    if kind == "calm":

        def official(model, ids):
            return official_losses.energy_loss(model, ids, NUM_TARGETS)

        def ours(model, ids):
            return losses.energy_loss(model, ids, num_targets=NUM_TARGETS)[0]
    else:
        official = official_losses.autoencoder_loss

        def ours(model, ids):
            return losses.autoencoder_loss(model, ids)[0]

    return {"official": official, "compiled": torch.compile(official), "ours": ours}


def make_model(kind: str, rival: str) -> Autoencoder | Calm:
    """The same weights for every rival."""
    torch.manual_seed(0)
    if kind == "autoencoder":
        return Autoencoder(AUTOENCODER).train()
    model = Calm(CALM, AUTOENCODER).train()
    nn.init.normal_(model.generative_head.final_layer.linears[2].weight, std=0.02)
    if rival == "ours":
        fold_encoder(model.ae_model)
    return model


def make_step(kind: str, rival: str, loss: Loss) -> Callable[[], Tensor]:
    """A call that takes one step."""
    model = make_model(kind, rival)
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = (TRAINING.learning_rate, TRAINING.betas, TRAINING.weight_decay)
    optimizer = build_optimizer(model, *settings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SIZES["vocab_size"], IDS[kind], generator=generator)

    def step() -> Tensor:
        value = loss(model, ids)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, TRAINING.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def measure(kind: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of step, one a rival."""
    torch.compiler.reset()
    steps = {rival: make_step(kind, rival, loss) for rival, loss in losses_of(kind).items()}
    case = f"{kind}-training"
    return step_rows(case, case, "float32", compete(steps, "cpu", rounds), ids=IDS[kind])


def comparison(kind: str, rows: list[dict[str, Any]]) -> str:
    return duel_text(f"one {kind} step, ids {list(IDS[kind])}", medians(rows), "ours")


def profile(kind: str, rival: str) -> str:
    """Where a step's time goes, by operator."""
    step = make_step(kind, rival, losses_of(kind)[rival])
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [
        f"    {event.self_cpu_time_total / total:6.1%}  {event.count:4} x  {event.key}"
        for event in events[:10]
    ]
    return "\n".join([f"  {rival}, {total / 1e3:.1f} ms under the profiler", *lines])


@pytest.mark.parametrize("kind", IDS)
def test_training_step(kind: str, capsys) -> None:
    rows = measure(kind, ROUNDS)
    with capsys.disabled():
        print(f"\n{comparison(kind, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and their conditions")
    options = parser.parse_args()
    where, rows = conditions(), []
    for kind in IDS:
        measured = measure(kind, options.rounds)
        rows += measured
        write_rows(options.json, where, rows)
        print(comparison(kind, measured), flush=True)
        if options.profile:
            print(profile(kind, "official"), profile(kind, "ours"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
