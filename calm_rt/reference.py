"""Every op in plain differentiable PyTorch: the specification of the kernels, and the fallback.

Sizes: R rows (batch x patches), K tokens a patch, S model draws, M target draws, H hidden,
I intermediate, L latent, N noise, V vocabulary.
Arithmetic is in float32 for 16-bit inputs and in the inputs' own type otherwise.
"""

import enum
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stream(enum.IntEnum):
    """Which use of randomness a number belongs to; the table of csrc/common/philox.h."""

    TARGET = 0  # target draws of the energy score
    HEAD = 1  # input noise of the generative head
    CHOICE = 2  # choice of a patch from a pool
    ACCEPTANCE = 3  # acceptance tests of rejection sampling
    TOKEN_MASK = 4  # masked input tokens of the autoencoder
    LATENT = 5  # posterior draw of the autoencoder
    DROPOUT = 6  # dropout on the latent vector
    ORDER = 7  # order of the training blocks
    PROBE = 8  # noise put on latents to measure robustness
    TUPLE = 9  # tuples of draws that are tried before a pool is drawn


# ---- random numbers: Philox4x32-10, Salmon et al. 2011 ----


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 of four counter words under a 64-bit key.

    counter: four broadcastable int64 tensors holding 32-bit words.
    seed: [] int64, the key.
    returns: four int64 tensors holding 32-bit words.
    """
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, so the shifted words are exact
        c0, c1, c2, c3 = (
            ((p1 >> 32) & word) ^ c1 ^ k0,
            p1 & word,
            ((p0 >> 32) & word) ^ c3 ^ k1,
            p0 & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


def _noise_words(
    seed: Tensor, rows: Tensor, num_draws: int, length: int, stream: int
) -> list[Tensor]:
    """Four [num_draws, R, ceil(length / 4)] of random words; element l has word l % 4 of l // 4."""
    groups = torch.arange((length + 3) // 4, device=rows.device) | (int(stream) << 24)
    draws = torch.arange(num_draws, device=rows.device)[:, None, None]
    low, high = rows & 0xFFFFFFFF, (rows >> 32) & 0xFFFFFFFF
    return philox([groups, draws, low[None, :, None], high[None, :, None]], seed)


def noise(
    seed: Tensor,
    rows: Tensor,
    num_draws: int,
    length: int,
    stream: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random numbers that depend on (seed, row id, draw, position, stream) only.

    seed: [] int64.  rows: [R] int64, logical row ids.
    returns: [num_draws, R, length]; "uniform" exact steps of 2^-24 in [0, 1), "normal" Box-Muller.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    words = _noise_words(seed, rows, num_draws, length, stream)
    u0, u1, u2, u3 = ((w >> 8).to(wide) * 2.0**-24 for w in words)
    if distribution == "normal":
        r0, r1 = (torch.sqrt(-2 * torch.log(u + 2.0**-24)) for u in (u0, u2))
        a0, a1 = 2 * math.pi * u1, 2 * math.pi * u3
        values = [r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)]
    else:
        values = [u.clamp(max=1 - torch.finfo(dtype).eps / 2) for u in (u0, u1, u2, u3)]  # below 1
    return torch.stack(values, -1).flatten(-2)[..., :length].to(dtype)


# ---- energy score: paper equations 9 and 10 ----


class EnergyScore(NamedTuple):
    score: Tensor  # [R] diversity - 2 fidelity; larger is better
    diversity: Tensor  # [R] mean over pairs i != j of |x_i - x_j|^beta
    fidelity: Tensor  # [R] mean over i, m of |x_i - y_m|^beta


def _distance_power(difference: Tensor, beta: float) -> Tensor:
    """|difference|^beta over the last dimension, with gradient 0 where the difference is 0."""
    distance = torch.linalg.vector_norm(difference, dim=-1)
    if beta == 1:
        return distance
    zero = distance == 0
    return torch.where(zero, 0, torch.where(zero, 1, distance) ** beta)


def energy_score_of_targets(x: Tensor, targets: Tensor, beta: float = 1.0) -> EnergyScore:
    """The energy score against given target draws.

    x: [S, R, L], model draws.  targets: [M, R, L].
    returns: EnergyScore of [R] tensors.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, targets.dtype), torch.float32)
    x, targets = x.to(wide), targets.to(wide)
    i, j = torch.triu_indices(x.shape[0], x.shape[0], offset=1, device=x.device)
    diversity = _distance_power(x[i] - x[j], beta).mean(0)
    fidelity = _distance_power(x[:, None] - targets, beta).mean((0, 1))
    return EnergyScore(diversity - 2 * fidelity, diversity, fidelity)


def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    num_targets: int,
    beta: float,
    seed: Tensor,
    rows: Tensor,
) -> EnergyScore:
    """score = mean over pairs of |x_i - x_j|^beta - 2 mean of |x_i - y_m|^beta, y_m = mean +
    exp(log_std) eps_m.

    x: [S, R, L].  mean, log_std: [R, L], of the autoencoder.  seed: [] int64.  rows: [R] int64.
    returns: EnergyScore of [R] tensors.
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    eps = noise(seed, rows, num_targets, x.shape[-1], Stream.TARGET, dtype=wide)
    return energy_score_of_targets(x, mean.to(wide) + log_std.to(wide).exp() * eps, beta)


# ---- vocabulary ----


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """id[r] = argmax_v <hidden_r, weight_v>, ties to the lowest id.

    hidden: [R, H].  weight: [V, H].
    returns: [R] int64.
    """
    return F.linear(hidden, weight).argmax(-1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of softmax(weight hidden) against target.

    hidden: [R, H].  weight: [V, H].  target: [R] int64.
    denominator: [], what "mean" divides by; None for the number of targets that are not ignored.
    returns: [] for "mean" and "sum", [R] for "none".
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if reduction == "mean" and denominator is not None:
        total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        return total / denominator
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


# ---- autoencoder: paper section 2, official modeling_autoencoder.py ----


class MlpWeights(NamedTuple):
    norm: Tensor  # [H]
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I]


class LinearWeights(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]


class EncoderWeights(NamedTuple):
    embedding: Tensor  # [V, H]
    token_layers: list[MlpWeights]
    squeeze: LinearWeights  # K H -> H
    patch_layers: list[MlpWeights]
    norm: Tensor  # [H]
    latent: LinearWeights  # H -> 2 L


class FoldedEncoderWeights(NamedTuple):
    """A frozen encoder's: what the squeeze takes of a token in a slot stands ready in a table."""

    tables: Tensor  # [K, V, H], the squeeze's bias in the first
    patch_layers: list[MlpWeights]
    norm: Tensor  # [H]
    latent: LinearWeights  # H -> 2 L


class DecoderWeights(NamedTuple):
    latent: LinearWeights  # L -> H
    patch_layers: list[MlpWeights]
    expand: LinearWeights  # H -> K H
    token_layers: list[MlpWeights]
    norm: Tensor  # [H]
    vocabulary: Tensor  # [V, H]
    screen: Tensor | None = None  # of the vocabulary, for ops.linear_argmax; changes no result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 for 16-bit inputs.

    x: [..., H].  weight: [H].
    returns: [..., H] in x's type.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normal.to(x.dtype)).to(x.dtype)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """The rows of a table, NaN for an id outside it where nobody looks at ids before.

    There torch's own ends in an assertion on the device, behind which it takes no more calls.
    ids: [...] int64.  table: [V, H].
    returns: [..., H].
    """
    if not (ids.is_cuda or torch.compiler.is_compiling()):
        return F.embedding(ids, table)
    known = (ids >= 0) & (ids < table.shape[0])
    return torch.where(known[..., None], F.embedding(torch.where(known, ids, 0), table), math.nan)


def gated_mlp(
    x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """x + down(silu(gate n) * up n), n = rms_norm(x).

    x: [..., H].  norm_weight: [H].  gate, up: [I, H].  down: [H, I].
    returns: [..., H].
    """
    normal = rms_norm(x, norm_weight, eps)
    return x + F.linear(F.silu(F.linear(normal, gate)) * F.linear(normal, up), down)


def encode(
    ids: Tensor, weights: EncoderWeights | FoldedEncoderWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """Posterior mean and log standard deviation of each patch.

    ids: [R, K] int64.
    returns: two [R, L].
    """
    if isinstance(weights, FoldedEncoderWeights):
        slots = zip(ids.T, weights.tables, strict=True)
        hidden = torch.stack([embed(of_slot, table) for of_slot, table in slots], 1).sum(1)
    else:
        hidden = embed(ids, weights.embedding)  # [R, K, H]
        for layer in weights.token_layers:
            hidden = gated_mlp(hidden, *layer, eps)
        hidden = F.linear(hidden.flatten(-2), *weights.squeeze)
    for layer in weights.patch_layers:
        hidden = gated_mlp(hidden, *layer, eps)
    mean, log_std = F.linear(rms_norm(hidden, weights.norm, eps), *weights.latent).chunk(2, -1)
    return mean, log_std


def decode_hidden(latents: Tensor, weights: DecoderWeights, eps: float) -> Tensor:
    """The decoder before its vocabulary projection.

    latents: [R, L].
    returns: [R, K, H].
    """
    hidden = F.linear(latents, *weights.latent)
    for layer in weights.patch_layers:
        hidden = gated_mlp(hidden, *layer, eps)
    hidden = F.linear(hidden, *weights.expand).unflatten(-1, (-1, weights.norm.shape[0]))
    for layer in weights.token_layers:
        hidden = gated_mlp(hidden, *layer, eps)
    return rms_norm(hidden, weights.norm, eps)


def decode(latents: Tensor, weights: DecoderWeights, eps: float) -> Tensor:
    """The most probable token of every slot.

    latents: [R, L].
    returns: [R, K] int64.
    """
    hidden = decode_hidden(latents, weights, eps)
    return linear_argmax(hidden.flatten(0, -2), weights.vocabulary).view(hidden.shape[:-1])


# ---- energy head: paper section 3.3, official MLPGenerator ----

HEAD_EPS = 1e-6  # of every LayerNorm in the head, as in the official code


class HeadBlock(NamedTuple):
    norm: LinearWeights  # layer norm, [H] and [H]
    first: LinearWeights  # 2 H -> H, inputs in the order [x | context]
    second: LinearWeights  # H -> H
    third: LinearWeights  # H -> 2 H, gate then up
    down: LinearWeights  # H -> H


class HeadWeights(NamedTuple):
    noise: LinearWeights  # N -> H
    noise_norm: LinearWeights
    hidden: LinearWeights  # H -> H
    hidden_norm: LinearWeights
    blocks: list[HeadBlock]
    final_norm: LinearWeights
    final_first: LinearWeights  # H -> H
    final_second: LinearWeights  # H -> L


def _layer_norm(x: Tensor, weights: LinearWeights) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, HEAD_EPS)


def head_latents(hidden: Tensor, noise: Tensor, weights: HeadWeights) -> Tensor:
    """The energy head on given noise.

    hidden: [R, H], one context a row.  noise: [S, R, N], uniform in [-0.5, 0.5).
    returns: [S, R, L].
    """
    x = _layer_norm(F.linear(noise, *weights.noise), weights.noise_norm)
    context = _layer_norm(F.linear(hidden, *weights.hidden), weights.hidden_norm).expand_as(x)
    for block in weights.blocks:
        h = F.silu(F.linear(torch.cat([_layer_norm(x, block.norm), context], -1), *block.first))
        gate, up = F.linear(F.silu(F.linear(h, *block.second)), *block.third).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, *block.down)
    h = F.silu(F.linear(_layer_norm(x, weights.final_norm), *weights.final_first))
    return F.linear(h, *weights.final_second)


def sample_latents(
    hidden: Tensor, weights: HeadWeights, num_samples: int, seed: Tensor, rows: Tensor
) -> Tensor:
    """num_samples draws of the next latent vector for every context.

    hidden: [R, H].  seed: [] int64.  rows: [R] int64.
    returns: [S, R, L].
    """
    size = weights.noise.weight.shape[1]
    uniform = noise(seed, rows, num_samples, size, Stream.HEAD, "uniform")
    return head_latents(hidden, (uniform - 0.5).to(hidden.dtype), weights)


# ---- choice of a patch below temperature 1: paper algorithm 2 ----


def select_patch(tokens: Tensor, n: int, seed: Tensor, rows: Tensor) -> Tensor:
    """Algorithm 2 at temperature 1 / n on a pool of candidate patches.

    The patches that occur at least m times compete with weight C(count, m), for the largest m <= n
    that any patch reaches; candidates stand in the order of their first occurrence, and one uniform
    number decides.

    tokens: [B, S, K] int64, the pool of each context.  seed: [] int64.  rows: [B] int64.
    returns: [B] int64, the index in the pool of the chosen patch's first occurrence.
    """
    equal = (tokens[:, :, None] == tokens[:, None, :]).all(-1)  # [B, S, S]
    counts = equal.sum(-1)
    first = equal.int().argmax(-1) == torch.arange(tokens.shape[1], device=tokens.device)
    most = counts.amax(-1, keepdim=True)
    level = most.clamp(max=n)
    # C(count, level) / C(most, level) as a product of ratios, 0 where count < level
    steps = torch.arange(n, device=tokens.device)
    left, of = counts[..., None] - steps, most[..., None] - steps
    ratio = left.clamp(min=0) / of.clamp(min=1).double()
    weights = torch.where(steps < level[..., None], ratio, 1).prod(-1) * first
    total = weights.cumsum(-1)
    u = noise(seed, rows, 1, 1, Stream.CHOICE, "uniform", torch.float64)[0]  # [B, 1]
    chosen = torch.searchsorted(total, u * total[:, -1:], right=True).squeeze(-1)
    return chosen.clamp(max=tokens.shape[1] - 1)


def survivors(tokens: Tensor, kept: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The candidates whose first `depth` tokens another of their pool has, or that are kept, first.

    tokens: [B, S, K] int64.  kept: [B] int64, a candidate of each pool, or none's number.
    returns: [B S] int64, all candidates b S + s; [] int64, how many come first.
    """
    known = tokens[..., :depth]
    shared = (known[:, :, None] == known[:, None]).all(-1).sum(-1) > 1  # [B, S]
    alive = shared | (torch.arange(tokens.shape[1], device=tokens.device) == kept[:, None])
    return (~alive).flatten().argsort(stable=True), alive.sum()
