"""Arguments for the cases of `testing`: one maker a op, keyword arguments in float64 on the CPU.

Values are drawn from fixed seeds, so a case is the same everywhere.
"""

from typing import Any

import torch
from torch import Tensor

from .ops.linear_argmax import screen_vocabulary
from .reference import (
    DecoderWeights,
    EncoderWeights,
    FoldedEncoderWeights,
    HeadBlock,
    HeadWeights,
    LinearWeights,
    MlpWeights,
    Stream,
)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * scale
    )


def ids(seed: int, bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, outputs: int, inputs: int) -> LinearWeights:
    return LinearWeights(
        normal(seed, outputs, inputs, scale=inputs**-0.5), normal(seed + 1, outputs, scale=0.1)
    )


def layer_norm(seed: int, size: int) -> LinearWeights:
    return LinearWeights(1 + normal(seed, size, scale=0.1), normal(seed + 1, size, scale=0.1))


def mlp(seed: int, hidden: int, intermediate: int) -> MlpWeights:
    return MlpWeights(
        1 + normal(seed, hidden, scale=0.1),
        normal(seed + 1, intermediate, hidden, scale=hidden**-0.5),
        normal(seed + 2, intermediate, hidden, scale=hidden**-0.5),
        normal(seed + 3, hidden, intermediate, scale=intermediate**-0.5),
    )


def noise(draws: int, rows: int, length: int, distribution: str) -> dict[str, Any]:
    ids = torch.arange(rows) * 3 + (1 << 40) - 2  # both halves of the row id are in use
    return dict(
        rows=ids,
        num_draws=draws,
        length=length,
        seed=torch.tensor(-7),
        stream=Stream.HEAD,
        distribution=distribution,
    )


def energy_score(
    draws: int, rows: int, size: int, targets: int, beta: float = 1.0
) -> dict[str, Any]:
    return dict(
        x=normal(1, draws, rows, size),
        mean=normal(2, rows, size),
        log_std=normal(3, rows, size, scale=0.3) - 1,
        num_targets=targets,
        beta=beta,
        seed=torch.tensor(2**40 + 11),
        rows=torch.arange(rows) * 5 + 2**33,
    )


def near_duplicates(draws: int, rows: int, size: int, targets: int, beta: float) -> dict[str, Any]:
    arguments = energy_score(draws, rows, size, targets, beta)
    arguments["x"] = arguments["x"][:1] + normal(4, draws, rows, size, scale=1e-3)
    arguments["x"][1] = arguments["x"][0]  # distance 0
    return arguments


def encoder(
    vocabulary: int, hidden: int, intermediate: int, latent: int, patch: int
) -> EncoderWeights:
    return EncoderWeights(
        normal(10, vocabulary, hidden),
        [mlp(20, hidden, intermediate)],
        linear(30, hidden, patch * hidden),
        [mlp(40, hidden, intermediate)],
        1 + normal(50, hidden, scale=0.1),
        linear(60, 2 * latent, hidden),
    )


def decoder(
    vocabulary: int, hidden: int, intermediate: int, latent: int, patch: int
) -> DecoderWeights:
    return DecoderWeights(
        linear(10, hidden, latent),
        [mlp(20, hidden, intermediate)],
        linear(30, patch * hidden, hidden),
        [mlp(40, hidden, intermediate)],
        1 + normal(50, hidden, scale=0.1),
        normal(60, vocabulary, hidden),
    )


def encode(rows: int, vocabulary: int, *sizes: int) -> dict[str, Any]:
    """sizes: hidden, intermediate, latent, patch."""
    return dict(ids=ids(1, vocabulary, rows, sizes[-1]), weights=encoder(vocabulary, *sizes))


def folded_encode(rows: int, vocabulary: int, *sizes: int) -> dict[str, Any]:
    """As `encode`, with tables in place of all that comes before the squeeze's sum."""
    arguments = encode(rows, vocabulary, *sizes)
    _, _, _, *rest = arguments["weights"]
    tables = normal(70, sizes[-1], vocabulary, sizes[0])
    return {**arguments, "weights": FoldedEncoderWeights(tables, *rest)}


def decode(rows: int, *sizes: int) -> dict[str, Any]:
    """sizes: vocabulary, hidden, intermediate, latent, patch."""
    return dict(latents=normal(1, rows, sizes[-2]), weights=decoder(*sizes))


def head(hidden: int, noise: int, latent: int, blocks: int) -> HeadWeights:
    return HeadWeights(
        linear(10, hidden, noise),
        layer_norm(20, hidden),
        linear(30, hidden, hidden),
        layer_norm(40, hidden),
        [
            HeadBlock(
                layer_norm(100 * block, hidden),
                linear(100 * block + 10, hidden, 2 * hidden),
                linear(100 * block + 20, hidden, hidden),
                linear(100 * block + 30, 2 * hidden, hidden),
                linear(100 * block + 40, hidden, hidden),
            )
            for block in range(1, blocks + 1)
        ],
        layer_norm(50, hidden),
        linear(60, hidden, hidden),
        linear(70, latent, hidden),
    )


def linear_argmax(rows: int, size: int, vocabulary: int) -> dict[str, Any]:
    return dict(hidden=normal(1, rows, size), weight=normal(2, vocabulary, size))


def first_argmax(rows: int, size: int, vocabulary: int, count: int) -> dict[str, Any]:
    return linear_argmax(rows, size, vocabulary) | dict(count=torch.tensor(count))


def argmax_screen(arguments: dict[str, Any]) -> dict[str, Any]:
    return dict(screen=screen_vocabulary(arguments["weight"]))


def ties(rows: int, size: int, vocabulary: int) -> dict[str, Any]:
    """Every row of the weight twice, a row of zeros, and whole numbers, so that ties are exact."""
    arguments = linear_argmax(rows, size, vocabulary)
    half = arguments["weight"][: vocabulary // 2].mul(4).round()
    arguments["weight"] = torch.cat([half, half.flip(0)])
    arguments["hidden"] = arguments["hidden"].mul(4).round()
    arguments["hidden"][0] = 0
    return arguments


def gated_mlp(rows: int, hidden: int, intermediate: int) -> dict[str, Any]:
    norm, gate, up, down = mlp(2, hidden, intermediate)
    return dict(x=normal(1, rows, hidden), norm_weight=norm, gate=gate, up=up, down=down)


def linear_cross_entropy(rows: int, hidden: int, vocabulary: int, **options: Any) -> dict[str, Any]:
    target = ids(3, vocabulary, rows)
    target[1:2] = -100
    return dict(
        hidden=normal(1, rows, hidden, scale=2.0),
        weight=normal(2, vocabulary, hidden, scale=hidden**-0.5),
        target=target,
        **options,
    )


def select_patch(pools: int, candidates: int, patch: int, n: int) -> dict[str, Any]:
    return dict(
        tokens=ids(1, 3, pools, candidates, patch),
        n=n,
        seed=torch.tensor(5),
        rows=torch.arange(pools) * 7 + (1 << 35),
    )


def survivors(pools: int, candidates: int, patch: int, depth: int) -> dict[str, Any]:
    tokens = model_pool(pools, candidates, patch, 2)["tokens"]
    return dict(tokens=tokens, kept=torch.arange(pools) % candidates, depth=min(depth, patch))


def model_pool(pools: int, candidates: int, patch: int, n: int) -> dict[str, Any]:
    """A pool as a model draws it: the k-th patch with probability in proportion to 1 / k."""
    kinds = ids(2, 128257, pools, candidates, patch)
    popularity = (1 / torch.arange(1, candidates + 1)).expand(pools, -1)
    drawn = torch.multinomial(
        popularity, candidates, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    tokens = kinds[torch.arange(pools)[:, None], drawn]
    return {**select_patch(pools, candidates, patch, n), "tokens": tokens}


def sample_latents(
    rows: int, hidden: int, samples: int, noise: int = 8, latent: int = 6, blocks: int = 2
) -> dict[str, Any]:
    return dict(
        hidden=normal(1, rows, hidden),
        weights=head(hidden, noise, latent, blocks),
        num_samples=samples,
        seed=torch.tensor(3),
        rows=torch.arange(rows) * 5 + (1 << 34),
    )
