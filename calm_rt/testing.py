"""Inputs for every op: the cases that the laws check, that the benchmarks time, for users to try.

A case makes its arguments in float64 on the CPU; `Case.make` casts and moves them. Law 1 needs to
know how large the terms are that an output sums up: `magnitudes` is that sum of absolute values,
for each output and gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import magnitudes
from .reference import (
    DecoderWeights,
    EncoderWeights,
    HeadBlock,
    HeadWeights,
    LinearWeights,
    MlpWeights,
    Stream,
)


@dataclass(frozen=True)
class Case:
    """One set of arguments of one op.

    op: name in calm_rt.ops.  name: the shape in words.
    arguments: makes the keyword arguments, floating-point tensors in float64.
    gradients: arguments that have a gradient.
    row_dims: the dimension of the rows, for each argument that has one.
    magnitudes: from the arguments, the sum of absolute terms of every output and gradient, in
        order.
    smooth: differentiable at these arguments, so that finite differences can be taken.
    benchmark: large, for timing; the others are small, for the laws.
    dtype: that the benchmark runs in.  rounds: how often it is timed.
    """

    op: str
    name: str
    arguments: Callable[[], dict[str, Any]]
    gradients: tuple[str, ...] = ()
    row_dims: dict[str, int] = field(default_factory=dict)
    magnitudes: Callable[[dict[str, Any]], list[Tensor]] | None = None
    smooth: bool = True
    benchmark: bool = False
    dtype: torch.dtype = torch.float32
    rounds: int = 15

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Any]:
        """The arguments in a dtype on a device, with requires_grad where the op has a gradient."""
        arguments = self.arguments()
        arguments = tree_map(lambda value: move(value, dtype or self.dtype, device), arguments)
        for name in self.gradients:
            arguments[name].requires_grad_()
        return arguments


def move(value: Any, dtype: torch.dtype, device: str) -> Any:
    """A tensor on the device, in the dtype if it is floating point; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * scale
    )


def _ids(seed: int, bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(seed))


def _linear(seed: int, outputs: int, inputs: int) -> LinearWeights:
    return LinearWeights(
        _normal(seed, outputs, inputs, scale=inputs**-0.5), _normal(seed + 1, outputs, scale=0.1)
    )


def _layer_norm(seed: int, size: int) -> LinearWeights:
    return LinearWeights(1 + _normal(seed, size, scale=0.1), _normal(seed + 1, size, scale=0.1))


def _mlp(seed: int, hidden: int, intermediate: int) -> MlpWeights:
    return MlpWeights(
        1 + _normal(seed, hidden, scale=0.1),
        _normal(seed + 1, intermediate, hidden, scale=hidden**-0.5),
        _normal(seed + 2, intermediate, hidden, scale=hidden**-0.5),
        _normal(seed + 3, hidden, intermediate, scale=intermediate**-0.5),
    )


# ---- one maker a op; the sizes stand in CASES ----


def _noise(draws: int, rows: int, length: int, distribution: str) -> dict[str, Any]:
    ids = torch.arange(rows) * 3 + (1 << 40) - 2  # both halves of the row id are in use
    return dict(
        rows=ids,
        num_draws=draws,
        length=length,
        seed=torch.tensor(-7),
        stream=Stream.HEAD,
        distribution=distribution,
    )


def _energy_score(
    draws: int, rows: int, size: int, targets: int, beta: float = 1.0
) -> dict[str, Any]:
    return dict(
        x=_normal(1, draws, rows, size),
        mean=_normal(2, rows, size),
        log_std=_normal(3, rows, size, scale=0.3) - 1,
        num_targets=targets,
        beta=beta,
        seed=torch.tensor(2**40 + 11),
        rows=torch.arange(rows) * 5 + 2**33,
    )


def _near_duplicates(draws: int, rows: int, size: int, targets: int, beta: float) -> dict[str, Any]:
    arguments = _energy_score(draws, rows, size, targets, beta)
    arguments["x"] = arguments["x"][:1] + _normal(4, draws, rows, size, scale=1e-3)
    arguments["x"][1] = arguments["x"][0]  # distance 0
    return arguments


def _encoder(
    vocabulary: int, hidden: int, intermediate: int, latent: int, patch: int
) -> EncoderWeights:
    return EncoderWeights(
        _normal(10, vocabulary, hidden),
        [_mlp(20, hidden, intermediate)],
        _linear(30, hidden, patch * hidden),
        [_mlp(40, hidden, intermediate)],
        1 + _normal(50, hidden, scale=0.1),
        _linear(60, 2 * latent, hidden),
    )


def _decoder(
    vocabulary: int, hidden: int, intermediate: int, latent: int, patch: int
) -> DecoderWeights:
    return DecoderWeights(
        _linear(10, hidden, latent),
        [_mlp(20, hidden, intermediate)],
        _linear(30, patch * hidden, hidden),
        [_mlp(40, hidden, intermediate)],
        1 + _normal(50, hidden, scale=0.1),
        _normal(60, vocabulary, hidden),
    )


def _head(hidden: int, noise: int, latent: int, blocks: int) -> HeadWeights:
    return HeadWeights(
        _linear(10, hidden, noise),
        _layer_norm(20, hidden),
        _linear(30, hidden, hidden),
        _layer_norm(40, hidden),
        [
            HeadBlock(
                _layer_norm(100 * block, hidden),
                _linear(100 * block + 10, hidden, 2 * hidden),
                _linear(100 * block + 20, hidden, hidden),
                _linear(100 * block + 30, 2 * hidden, hidden),
                _linear(100 * block + 40, hidden, hidden),
            )
            for block in range(1, blocks + 1)
        ],
        _layer_norm(50, hidden),
        _linear(60, hidden, hidden),
        _linear(70, latent, hidden),
    )


def _energy_case(
    name: str, maker: Callable = _energy_score, benchmark: bool = False, **sizes: Any
) -> Case:
    return Case(
        "energy_score",
        name,
        lambda: maker(**sizes),
        gradients=("x", "mean", "log_std") if not benchmark else ("x",),
        row_dims={"x": 1, "mean": 0, "log_std": 0, "rows": 0},
        magnitudes=magnitudes.energy_score,
        smooth=maker is _energy_score,  # a norm has no derivative at 0
        benchmark=benchmark,
    )


def _linear_argmax(rows: int, size: int, vocabulary: int) -> dict[str, Any]:
    return dict(hidden=_normal(1, rows, size), weight=_normal(2, vocabulary, size))


def _ties(rows: int, size: int, vocabulary: int) -> dict[str, Any]:
    """Every row of the weight twice, a row of zeros, and whole numbers, so that ties are exact."""
    arguments = _linear_argmax(rows, size, vocabulary)
    half = arguments["weight"][: vocabulary // 2].mul(4).round()
    arguments["weight"] = torch.cat([half, half.flip(0)])
    arguments["hidden"] = arguments["hidden"].mul(4).round()
    arguments["hidden"][0] = 0
    return arguments


def _argmax_case(name: str, maker: Callable = _linear_argmax, **options: Any) -> Case:
    benchmark, dtype = options.pop("benchmark", False), options.pop("dtype", torch.float32)
    return Case(
        "linear_argmax",
        name,
        lambda: maker(**options),
        row_dims={"hidden": 0},
        benchmark=benchmark,
        dtype=dtype,
    )


def _gated_mlp(rows: int, hidden: int, intermediate: int) -> dict[str, Any]:
    norm, gate, up, down = _mlp(2, hidden, intermediate)
    return dict(x=_normal(1, rows, hidden), norm_weight=norm, gate=gate, up=up, down=down)


def _linear_cross_entropy(
    rows: int, hidden: int, vocabulary: int, **options: Any
) -> dict[str, Any]:
    target = _ids(3, vocabulary, rows)
    target[1:2] = -100
    return dict(
        hidden=_normal(1, rows, hidden, scale=2.0),
        weight=_normal(2, vocabulary, hidden, scale=hidden**-0.5),
        target=target,
        **options,
    )


def _cross_entropy_case(
    name: str,
    benchmark: bool = False,
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    **options: Any,
) -> Case:
    return Case(
        "linear_cross_entropy",
        name,
        lambda: _linear_cross_entropy(**options),
        gradients=("hidden", "weight"),
        row_dims={"hidden": 0, "target": 0},
        magnitudes=magnitudes.linear_cross_entropy,
        benchmark=benchmark,
        dtype=dtype,
        rounds=rounds,
    )


def _select_patch(pools: int, candidates: int, patch: int, n: int) -> dict[str, Any]:
    return dict(
        tokens=_ids(1, 3, pools, candidates, patch),
        n=n,
        seed=torch.tensor(5),
        rows=torch.arange(pools) * 7 + (1 << 35),
    )


def _model_pool(pools: int, candidates: int, patch: int, n: int) -> dict[str, Any]:
    """A pool as a model draws it: the k-th patch with probability in proportion to 1 / k."""
    kinds = _ids(2, 128257, pools, candidates, patch)
    popularity = (1 / torch.arange(1, candidates + 1)).expand(pools, -1)
    drawn = torch.multinomial(
        popularity, candidates, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    tokens = kinds[torch.arange(pools)[:, None], drawn]
    return {**_select_patch(pools, candidates, patch, n), "tokens": tokens}


def _patch_case(
    pools: int, candidates: int, patch: int, n: int, maker: Callable = _select_patch, **options: Any
) -> Case:
    return Case(
        "select_patch",
        f"B{pools}-S{candidates}-K{patch}-n{n}",
        lambda: maker(pools, candidates, patch, n),
        row_dims={"tokens": 0, "rows": 0},
        **options,
    )


def _sample_latents(rows: int, hidden: int, samples: int) -> dict[str, Any]:
    return dict(
        hidden=_normal(1, rows, hidden),
        weights=_head(hidden, 8, 6, 2),
        num_samples=samples,
        seed=torch.tensor(3),
    )


CASES = (
    Case("noise", "normal", lambda: _noise(3, 5, 70, "normal"), row_dims={"rows": 0}),
    Case("noise", "uniform", lambda: _noise(2, 4, 13, "uniform"), row_dims={"rows": 0}),
    Case(
        "noise",
        "D8-R2048-L64",
        lambda: _noise(8, 2048, 64, "normal"),
        row_dims={"rows": 0},
        benchmark=True,
    ),
    _energy_case("S8-R5-L128-M100", draws=8, rows=5, size=128, targets=100),
    _energy_case("S2-R3-L5-M1", draws=2, rows=3, size=5, targets=1),
    _energy_case("S5-R4-L130-M7-beta0.6", draws=5, rows=4, size=130, targets=7, beta=0.6),
    _energy_case("S3-R2-L64-M6-beta2", draws=3, rows=2, size=64, targets=6, beta=2.0),
    _energy_case("S17-R2-L300-M9-beta1.3", draws=17, rows=2, size=300, targets=9, beta=1.3),
    _energy_case("duplicates", _near_duplicates, draws=4, rows=3, size=32, targets=5, beta=1.0),
    _energy_case(
        "duplicates-beta0.5", _near_duplicates, draws=4, rows=3, size=32, targets=5, beta=0.5
    ),
    _energy_case("S8-R512-L128-M100", benchmark=True, draws=8, rows=512, size=128, targets=100),
    _argmax_case("R5-H16-V37", rows=5, size=16, vocabulary=37),
    _argmax_case("R1-H1-V1", rows=1, size=1, vocabulary=1),
    _argmax_case("R33-H70-V4099", rows=33, size=70, vocabulary=4099),
    _argmax_case("ties", _ties, rows=9, size=24, vocabulary=300),
    _argmax_case("R800-H512-V128257", benchmark=True, rows=800, size=512, vocabulary=128257),
    _argmax_case(
        "R800-H512-V128257-bf16",
        benchmark=True,
        dtype=torch.bfloat16,
        rows=800,
        size=512,
        vocabulary=128257,
    ),
    _cross_entropy_case("R6-H16-V37", rows=6, hidden=16, vocabulary=37),
    _cross_entropy_case("R3-H1-V1", rows=3, hidden=1, vocabulary=1),
    _cross_entropy_case("none-R5-H70-V300", rows=5, hidden=70, vocabulary=300, reduction="none"),
    _cross_entropy_case(  # chunks of a few rows, two blocks of the vocabulary
        "sum-R23-H24-V4133",
        rows=23,
        hidden=24,
        vocabulary=4133,
        reduction="sum",
        max_workspace_bytes=5 * 4 * 4133,
    ),
    _cross_entropy_case("R2048-H128-V1024", benchmark=True, rows=2048, hidden=128, vocabulary=1024),
    _cross_entropy_case(
        "R4096-H512-V128257-bf16",
        benchmark=True,
        dtype=torch.bfloat16,
        rounds=3,
        rows=4096,
        hidden=512,
        vocabulary=128257,
    ),
    Case(
        "gated_mlp",
        "R7-H16-I40",
        lambda: _gated_mlp(7, 16, 40),
        gradients=("x", "norm_weight", "gate", "up", "down"),
        row_dims={"x": 0},
    ),
    Case(
        "encode",
        "R5-K4-H16",
        lambda: dict(ids=_ids(1, 31, 5, 4), weights=_encoder(31, 16, 40, 8, 4)),
        row_dims={"ids": 0},
    ),
    Case(
        "decode",
        "R5-K4-H16",
        lambda: dict(latents=_normal(1, 5, 8), weights=_decoder(31, 16, 40, 8, 4)),
        row_dims={"latents": 0},
    ),
    Case(
        "sample_latents",
        "R5-H16-S3",
        lambda: _sample_latents(5, 16, 3),
        gradients=("hidden",),
        row_dims={"hidden": 0},
    ),
    _patch_case(4, 20, 2, 3),
    _patch_case(3, 1, 1, 2),
    _patch_case(2, 150, 5, 200),
    _patch_case(1, 200, 4, 2, _model_pool, benchmark=True),
    _patch_case(32, 200, 4, 2, _model_pool, benchmark=True),
    _patch_case(1, 1000, 4, 2, _model_pool, benchmark=True),
    _patch_case(32, 1000, 4, 2, _model_pool, benchmark=True),
)
