"""The official code's formulas in eager PyTorch, one function a op: what `official` rows time.

Written from the paper and from what the official code computes, with the intermediate tensors that
it makes and with torch's own generator.
"""

import math
import random
from collections import Counter

import torch
from torch import Tensor

from calm_rt import reference
from calm_rt.reference import DecoderWeights, EncoderWeights, HeadWeights


def noise(
    rows: Tensor, num_draws: int, length: int, *, distribution: str = "normal", **_
) -> Tensor:
    """torch's own generator: what users call where they do not care which numbers come."""
    make = torch.randn if distribution == "normal" else torch.rand
    return make(num_draws, rows.shape[0], length, device=rows.device)


def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    num_targets: int,
    beta: float = 1.0,
    eps: Tensor | None = None,
    **_,
) -> Tensor:
    """`EnergyTransformer.energy_score`: all draws against all targets at once.

    eps: [M, R, L] normals, to repeat a result; None draws them.
    """
    if eps is None:
        eps = torch.randn(num_targets, *mean.shape, device=mean.device, dtype=mean.dtype)
    targets = mean + log_std.exp() * eps  # [M, R, L]
    draws = x.shape[0]
    among = torch.norm(x[:, None] - x[None], p=2, dim=-1).pow(beta).sum((0, 1)) / (
        draws * (draws - 1)
    )
    distances = torch.norm(x[:, None] - targets[None], p=2, dim=-1)  # of [S, M, R, L]
    toward = distances.pow(beta).mean((0, 1))
    return among - 2 * toward


def linear_argmax(hidden: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """The end of `Autoencoder.decoder` and `temperature_sampling`: all logits, then argmax.

    count: rows that are wanted, for which eager code waits.
    """
    wanted = hidden if count is None else hidden[: int(count)]
    ids = torch.nn.functional.linear(wanted, weight).argmax(-1)
    return torch.nn.functional.pad(ids, (0, len(hidden) - len(ids)), value=-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, **_) -> Tensor:
    """The loss of `Autoencoder.forward`: all logits, and once more in float32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.nn.functional.cross_entropy(logits, target)


def gated_mlp(
    x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """`AELayer.forward`, a LlamaRMSNorm and a LlamaMLP."""
    return reference.gated_mlp(x, norm_weight, gate, up, down, eps)


def encode(ids: Tensor, weights: EncoderWeights, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`Encoder.forward`: every token of every patch through the token layers."""
    return reference.encode(ids, weights, eps)


def decode(latents: Tensor, weights: DecoderWeights, *, eps: float = 1e-6) -> Tensor:
    """`Decoder.forward` and the argmax of `temperature_sampling`, with all logits."""
    return reference.decode(latents, weights, eps)


def sample_latents(
    hidden: Tensor, weights: HeadWeights, *, num_samples: int, noise: Tensor | None = None, **_
) -> Tensor:
    """`MLPGenerator.sample` on every context num_samples times over, as its callers repeat them.

    noise: [S, R, N], uniform in [-0.5, 0.5), to repeat a result; None draws it.
    """
    repeated = hidden.repeat(num_samples, 1)  # [S R, H]
    shape = 1, repeated.shape[0], weights.noise.weight.shape[1]
    if noise is None:
        noise = torch.rand(shape, dtype=hidden.dtype, device=hidden.device) - 0.5
    draws = reference.head_latents(repeated, noise.reshape(shape), weights)
    return draws.view(num_samples, hidden.shape[0], -1)


def select_patch(tokens: Tensor, *, n: int, **_) -> Tensor:
    """The end of `temperature_sampling`: each candidate to the host, a Counter, Python's random."""
    chosen = []
    for pool in tokens:
        counts = Counter(tuple(patch.tolist()) for patch in pool)
        for m in range(n, 0, -1):
            weights = {patch: math.comb(c, m) for patch, c in counts.items() if c >= m}
            if weights:
                break
        chosen += random.choices(list(weights), list(weights.values()))
    return torch.tensor(chosen, device=tokens.device)


def survivors(tokens: Tensor, kept: Tensor, *, depth: int) -> tuple[Tensor, Tensor]:
    """Not in the official code: torch's own ops on all pools, which wait for the host."""
    pools, size, _ = tokens.shape
    pool = torch.arange(pools, device=tokens.device)
    starts = torch.cat(
        [pool.repeat_interleave(size)[:, None], tokens[..., :depth].flatten(0, 1)], 1
    )
    _, kind, counts = starts.unique(dim=0, return_inverse=True, return_counts=True)
    alive = counts[kind] > 1  # [B S]
    alive[pool * size + kept] = True
    return torch.cat([alive.nonzero(), (~alive).nonzero()]).squeeze(1), alive.sum()
