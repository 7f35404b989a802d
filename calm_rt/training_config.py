"""Settings of a training run."""

import dataclasses
import math
from numbers import Real

from calm_rt.losses import PRECISIONS
from calm_rt.ops.check import check, check_int, check_seed

COUNTS = (  # each at least 1
    "steps",
    "batch_size",
    "block_size",
    "accumulation",
    "log_every",
    "evaluate_every",
    "save_every",
    "evaluation_blocks",
    "num_targets",
)
NUMBERS = (
    "learning_rate",
    "weight_decay",
    "clip_norm",
    "random_tokens",
    "minutes",
    "target_accuracy",
)
SCHEDULES = ("constant", "cosine", "linear")
# settings that a resumed run may change; the others would make it another run
FREE_SETTINGS = {
    "steps",
    "minutes",
    "accumulation",
    "log_every",
    "evaluate_every",
    "save_every",
    "evaluation_blocks",
    "target_accuracy",
    "fold_encoder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Defaults suit a small model; sizes count the whole step over all processes."""

    steps: int = 1000
    minutes: float | None = None  # ends the run; the schedule then follows the share of time used
    batch_size: int = 16  # blocks a step
    block_size: int = 512  # tokens a block
    accumulation: int = 1  # parts in which a process computes its share of the batch
    learning_rate: float = 1e-3
    warmup_steps: int = 100  # linear from 0
    schedule: str = "constant"  # after warm-up: "constant", or "cosine" or "linear" down to 0
    weight_decay: float = 0.1  # of matrices; not of embeddings, norms and biases
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    precision: str = "auto"  # "fp32", "bf16" (autocast), or whichever is faster here, measured once
    random_tokens: float = 0.0  # share of the autoencoder's tokens made random, to learn rare ones
    num_targets: int = 100  # M, target draws of the energy score
    fold_encoder: bool = True  # posteriors by table, for K V H numbers of memory (nn.fold_encoder)
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200
    save_every: int = 500
    evaluation_blocks: int = 16  # held-out blocks in an evaluation
    target_accuracy: float | None = None  # on held-out tokens; ends an autoencoder's run

    def __post_init__(self) -> None:
        for name in COUNTS:
            check_int(name, getattr(self, name), 1)
        for name in NUMBERS:
            value = getattr(self, name)
            given = value is not None or name not in ("minutes", "target_accuracy")
            check(not given or isinstance(value, Real), name, "a number", repr(value))
        check_int("warmup_steps", self.warmup_steps, 0)
        check_seed(self.seed)
        check(
            0 < self.learning_rate < math.inf,
            "learning_rate",
            "a positive number",
            self.learning_rate,
        )
        check(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", self.weight_decay)
        check(
            isinstance(self.betas, tuple | list)
            and len(self.betas) == 2
            and all(isinstance(beta, Real) and 0 <= beta < 1 for beta in self.betas),
            "betas",
            "two numbers in [0, 1)",
            self.betas,
        )
        check(self.clip_norm > 0, "clip_norm", "a positive number", self.clip_norm)
        share = 0 <= self.random_tokens < 1
        check(share, "random_tokens", "a share in [0, 1)", self.random_tokens)
        target = self.target_accuracy is None or 0 < self.target_accuracy <= 1
        check(target, "target_accuracy", "a share in (0, 1]", self.target_accuracy)
        check(
            self.minutes is None or self.minutes > 0, "minutes", "a positive number", self.minutes
        )
        check(
            self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule
        )
        precisions = ("auto", *PRECISIONS)
        check(
            self.precision in precisions,
            "precision",
            f"one of {', '.join(precisions)}",
            self.precision,
        )

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done, of steps or of time."""
        share = step / self.steps
        return share if self.minutes is None else max(share, seconds / (60 * self.minutes))

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step (0 is the first)."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        rest = 1 - min(1.0, self.progress(step, seconds))
        decay = {"constant": 1.0, "linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest)}
        return self.learning_rate * warm * decay[self.schedule]
