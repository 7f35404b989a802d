"""The ops: a hand-written kernel where one exists, plain PyTorch (calm_rt.reference) elsewhere."""

from .decode import decode
from .encode import encode
from .energy_score import energy_score
from .gated_mlp import gated_mlp
from .linear_argmax import linear_argmax
from .linear_cross_entropy import linear_cross_entropy
from .noise import noise
from .sample_latents import sample_latents
from .select_patch import select_patch
from .survivors import survivors

__all__ = [
    "decode",
    "encode",
    "energy_score",
    "gated_mlp",
    "linear_argmax",
    "linear_cross_entropy",
    "noise",
    "sample_latents",
    "select_patch",
    "survivors",
]
