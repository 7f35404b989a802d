"""Whole steps against their rivals, as rows of kind `step` beside those of the ops.

A training step is loss, backward, clipping and AdamW in fp32: `official` is the official code's
loss in eager PyTorch on the same modules, `compiled` torch.compile of it, `native` calm_rt.losses
as calm_rt.training runs it, the encoder folded. A step of the quickstart is the same at its sizes,
`reference` without kernels. The choice of a patch is that of planted.py.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calm_rt import benchmark, losses, official_losses, quickstart
from calm_rt.benchmark import QUICK_ROUNDS, Call
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, fold_encoder
from calm_rt.training_config import TrainingConfig
from calm_rt.training_state import build_optimizer

RIVALS = ("official", "compiled", "native")
QUICK_RIVALS = ("official", "native")
QUICKSTART_RIVALS = ("reference", "native")
ROUNDS = 15
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
IDS |= {
    f"quickstart-{stage}": (batch_size, quickstart.BLOCK_SIZE)
    for stage, batch_size in quickstart.BATCH_SIZES.items()
}
TRAINING = TrainingConfig()

Loss = Callable[[nn.Module, Tensor], Tensor]


def rivals_of(kind: str, among: Sequence[str]) -> Sequence[str]:
    """Those of the rivals that such a step has; a step of the quickstart has its own."""
    return QUICKSTART_RIVALS if kind.startswith("quickstart") else among


def loss_of(kind: str, rival: str) -> Loss:
    """The loss as a function of a model and ids."""

    def official_energy(model, ids):
        return official_losses.energy_loss(model, ids, NUM_TARGETS)

    def native_energy(model, ids):
        return losses.energy_loss(model, ids, num_targets=NUM_TARGETS)[0]

    def native_autoencoder(model, ids):
        share = quickstart.RANDOM_TOKENS if kind.startswith("quickstart") else 0.0
        return losses.autoencoder_loss(model, ids, random_tokens=share)[0]

    of_calm = kind.endswith("calm")
    if rival in QUICKSTART_RIVALS:
        return native_energy if of_calm else native_autoencoder
    loss = official_energy if of_calm else official_losses.autoencoder_loss
    return torch.compile(loss) if rival == "compiled" else loss


def configurations(kind: str) -> tuple[AutoencoderConfig, CalmConfig]:
    if not kind.startswith("quickstart"):
        return AUTOENCODER, CALM
    size = {"vocab_size": quickstart.VOCAB_SIZES[0]}
    return (
        AutoencoderConfig(**quickstart.AUTOENCODER_SIZES, **size),
        CalmConfig(**quickstart.CALM_SIZES, **size),
    )


def make_model(kind: str, rival: str) -> Autoencoder | Calm:
    """The same weights for every rival."""
    torch.manual_seed(0)
    autoencoder, calm = configurations(kind)
    if kind.endswith("autoencoder"):
        return Autoencoder(autoencoder).train()
    model = Calm(calm, autoencoder).train()
    nn.init.normal_(model.generative_head.final_layer.linears[2].weight, std=0.02)
    if rival in QUICKSTART_RIVALS:
        fold_encoder(model.ae_model)
    return model


def training_step(kind: str, rival: str, device: str = "cpu") -> Call:
    """A call that takes one step, and returns its loss."""
    loss, model = loss_of(kind, rival), make_model(kind, rival).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = (TRAINING.learning_rate, TRAINING.betas, TRAINING.weight_decay)
    optimizer = build_optimizer(model, *settings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, IDS[kind], generator=generator).to(device)

    def step() -> Tensor:
        value = loss(model, ids)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, TRAINING.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def training_steps(kind: str) -> Callable[[Sequence[str], str], dict[str, Call]]:
    def make(rivals: Sequence[str], device: str) -> dict[str, Call]:
        return {rival: training_step(kind, rival, device) for rival in rivals_of(kind, rivals)}

    return make


def choices(rivals: Sequence[str], device: str) -> dict[str, Call]:
    """Calls that choose a patch at temperature 1/2 from pools with the same patches."""
    from calm_rt.planted import PlantedCalm, likely_pools

    model = PlantedCalm(likely_pools(), torch.float32, device)
    calls = {"official": model.select_officially, "compiled": model.select_compiled}
    calls["native"] = model.select
    return {rival: calls[rival] for rival in rivals}


STEPS = {f"{kind}-training": training_steps(kind) for kind in IDS} | {"choice-of-a-patch": choices}


def step_rows(
    op: str, case: str, dtype: str, times: dict[str, list[float]], **others: Any
) -> list[dict[str, Any]]:
    """A row for each rival, with the fields of an op's rows.

    times: seconds of its rounds.  others: fields that differ, or more of them.
    """
    return [
        {
            "kind": "step",
            "op": op,
            "case": case,
            "passes": "step",
            "device": "cpu",
            "dtype": dtype,
            "rival": rival,
            "median_ms": 1e3 * statistics.median(values),
            "min_ms": 1e3 * min(values),
            "max_ms": 1e3 * max(values),
            "rounds": len(values),
            "peak_extra_bytes": None,
            "gradient_bytes": 0,  # what a step takes holds those of the parameters
            "flop": None,
            "bytes": None,
            **others,
        }
        for rival, values in times.items()
    ]


def measure_step(
    name: str, rivals: Sequence[str], device: str, rounds: int, memory: bool
) -> list[dict[str, Any]]:
    """The rows of one step, one a rival."""
    torch.compiler.reset()
    times = benchmark.compete(STEPS[name](rivals, device), device, rounds)
    rows = step_rows(name, name, "float32", times, device=device)
    for row in rows if memory else []:
        row["peak_extra_bytes"] = _peak_memory(name, row["rival"], device)
    return rows


def measure_steps(device: str, quick: bool = False) -> Iterator[list[dict[str, Any]]]:
    """The rows of every step, as they are finished.

    quick: fewer rounds, without torch.compile and memory.
    """
    settings = (QUICK_RIVALS, device, QUICK_ROUNDS) if quick else (RIVALS, device, ROUNDS)
    for name in STEPS:
        yield measure_step(name, *settings, memory=not quick)


def _peak_memory(name: str, rival: str, device: str) -> int:
    """Bytes that one warm step takes beyond model and optimizer."""
    if device == "cuda":
        return benchmark.peak_on_gpu(STEPS[name]([rival], device)[rival])
    return benchmark.probed(__name__, name, rival)


if __name__ == "__main__":
    chosen = sys.argv[2]
    with benchmark.route(chosen):
        print(benchmark.growth(STEPS[sys.argv[1]]([chosen], "cpu")[chosen]))
