"""Inputs for every op: the cases that the laws check, that the benchmarks time, for users to try.

A case makes its arguments in float64 on the CPU; `Case.make` casts and moves them. Law 1 needs to
know how large the terms are that an output sums up: `magnitudes` is that sum of absolute values,
for each output and gradient.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import inputs, magnitudes


@dataclass(frozen=True)
class Case:
    """One set of arguments of one op.

    op: name in calm_rt.ops.  name: the shape in words.
    arguments: makes the keyword arguments, floating-point tensors in float64.
    gradients: arguments that have a gradient.
    row_dims: the dimension of the rows, for each argument that has one.
    magnitudes: from the arguments, the sum of absolute terms of every output and gradient, in
        order.
    scores: of an op that returns ids through rounded steps, from the arguments: the score of every
        id and the sum of its absolute terms, two [..., V]. Without, ids must be exact.
    smooth: differentiable at these arguments, so that finite differences can be taken.
    benchmark: large, for timing; the others are small, for the laws.
    dtype: that the benchmark runs in.  rounds: how often it is timed.
    official_arguments: what the official formula takes where the op takes something prepared.
    prepare: makes further arguments of the op, such as the screen of a weight. It gets the others
        in the dtype and on the device of the call. The official formula takes none of them.
    """

    op: str
    name: str
    arguments: Callable[[], dict[str, Any]]
    gradients: tuple[str, ...] = ()
    row_dims: dict[str, int] = field(default_factory=dict)
    magnitudes: Callable[[dict[str, Any]], list[Tensor]] | None = None
    scores: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None = None
    smooth: bool = True
    benchmark: bool = False
    dtype: torch.dtype = torch.float32
    rounds: int = 15
    official_arguments: Callable[[], dict[str, Any]] | None = None
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def make(
        self, dtype: torch.dtype | None = None, device: str = "cpu", official: bool = False
    ) -> dict[str, Any]:
        """The arguments in a dtype on a device, with requires_grad where the op has a gradient.

        official: those of the official formula.
        """
        make = self.official_arguments if official and self.official_arguments else self.arguments
        arguments = make()
        arguments = tree_map(lambda value: move(value, dtype or self.dtype, device), arguments)
        for leaf in self.leaves(arguments):
            leaf.requires_grad_()
        if self.prepare and not official:
            arguments |= self.prepare(arguments)
        return arguments

    def leaves(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The tensors that get a gradient, in order; weights count with every tensor in them."""
        return [leaf for name in self.gradients for leaf in tree_leaves(arguments[name])]


def move(value: Any, dtype: torch.dtype, device: str) -> Any:
    """A tensor on the device, in the dtype if it is floating point; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _energy_case(
    name: str, maker: Callable = inputs.energy_score, benchmark: bool = False, **sizes: Any
) -> Case:
    return Case(
        "energy_score",
        name,
        lambda: maker(**sizes),
        gradients=("x", "mean", "log_std") if not benchmark else ("x",),
        row_dims={"x": 1, "mean": 0, "log_std": 0, "rows": 0},
        magnitudes=magnitudes.energy_score,
        smooth=maker is inputs.energy_score,  # a norm has no derivative at 0
        benchmark=benchmark,
    )


def _argmax_case(name: str, maker: Callable = inputs.linear_argmax, **options: Any) -> Case:
    timing = {key: options.pop(key) for key in ("benchmark", "dtype", "rounds") if key in options}
    screened = options.pop("screened", False)
    return Case(
        "linear_argmax",
        name,
        lambda: maker(**options),
        row_dims={"hidden": 0},
        prepare=inputs.argmax_screen if screened else None,
        **timing,
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
        lambda: inputs.linear_cross_entropy(**options),
        gradients=("hidden", "weight"),
        row_dims={"hidden": 0, "target": 0},
        magnitudes=magnitudes.linear_cross_entropy,
        benchmark=benchmark,
        dtype=dtype,
        rounds=rounds,
    )


def _patch_case(
    pools: int,
    candidates: int,
    patch: int,
    n: int,
    maker: Callable = inputs.select_patch,
    **options: Any,
) -> Case:
    return Case(
        "select_patch",
        f"B{pools}-S{candidates}-K{patch}-n{n}",
        lambda: maker(pools, candidates, patch, n),
        row_dims={"tokens": 0, "rows": 0},
        **options,
    )


def _survivors_case(pools: int, candidates: int, patch: int, depth: int, **options: Any) -> Case:
    return Case(
        "survivors",
        f"B{pools}-S{candidates}-K{patch}-depth{depth}",
        lambda: inputs.survivors(pools, candidates, patch, depth),
        row_dims={"tokens": 0, "kept": 0},
        **options,
    )


def _mlp_case(name: str, *sizes: int, **options: Any) -> Case:
    gradients = ("x", "norm_weight", "gate", "up", "down")
    make = functools.partial(inputs.gated_mlp, *sizes)
    return Case("gated_mlp", name, make, gradients, row_dims={"x": 0}, **options)


def _encode_case(name: str, maker: Callable, *sizes: int, **options: Any) -> Case:
    return Case("encode", name, lambda: maker(*sizes), row_dims={"ids": 0}, **options)


def _decode_case(name: str, *sizes: int, **options: Any) -> Case:
    return Case(
        "decode",
        name,
        lambda: inputs.decode(*sizes),
        row_dims={"latents": 0},
        scores=magnitudes.decode_scores,
        **options,
    )


def _sample_case(
    rows: int, hidden: int, samples: int, *sizes: int, trained: bool = True, **options: Any
) -> Case:
    """sizes: noise, latent, blocks."""
    return Case(
        "sample_latents",
        f"R{rows}-H{hidden}-S{samples}",
        lambda: inputs.sample_latents(rows, hidden, samples, *sizes),
        gradients=("hidden", "weights") if trained else (),
        row_dims={"hidden": 0, "rows": 0},
        **options,
    )


ENCODER_SIZES = (2048, 8192, 512, 1280, 128, 4)  # the official layers on a vocabulary that fits
DECODER_SIZES = (200, 128257, 512, 1280, 128, 4)  # the official decoder
HEAD_SIZES = (64, 128, 3)  # the official noise and latent vectors

CASES = (
    Case("noise", "normal", lambda: inputs.noise(3, 5, 70, "normal"), row_dims={"rows": 0}),
    Case("noise", "uniform", lambda: inputs.noise(2, 4, 13, "uniform"), row_dims={"rows": 0}),
    Case("noise", "short", lambda: inputs.noise(3, 11, 6, "normal"), row_dims={"rows": 0}),
    Case(
        "noise",
        "D8-R2048-L64",
        lambda: inputs.noise(8, 2048, 64, "normal"),
        row_dims={"rows": 0},
        benchmark=True,
    ),
    _energy_case("S8-R5-L128-M100", draws=8, rows=5, size=128, targets=100),
    _energy_case("S2-R3-L5-M1", draws=2, rows=3, size=5, targets=1),
    _energy_case("S5-R4-L130-M7-beta0.6", draws=5, rows=4, size=130, targets=7, beta=0.6),
    _energy_case("S3-R2-L64-M6-beta2", draws=3, rows=2, size=64, targets=6, beta=2.0),
    _energy_case("S17-R2-L300-M9-beta1.3", draws=17, rows=2, size=300, targets=9, beta=1.3),
    _energy_case(
        "duplicates", inputs.near_duplicates, draws=4, rows=3, size=32, targets=5, beta=1.0
    ),
    _energy_case(
        "duplicates-beta0.5", inputs.near_duplicates, draws=4, rows=3, size=32, targets=5, beta=0.5
    ),
    _energy_case("S8-R512-L128-M100", benchmark=True, draws=8, rows=512, size=128, targets=100),
    _argmax_case("R5-H16-V37", rows=5, size=16, vocabulary=37),
    _argmax_case("R1-H1-V1", rows=1, size=1, vocabulary=1),
    _argmax_case("R33-H70-V4099", rows=33, size=70, vocabulary=4099),
    _argmax_case(
        "first-3-R5-H16-V37", inputs.first_argmax, rows=5, size=16, vocabulary=37, count=3
    ),
    _argmax_case("ties", inputs.ties, rows=9, size=24, vocabulary=300),
    # more rows than the 64 of one band and an H that 8 divides: the warpgroups' kernel on an H200
    _argmax_case("R130-H72-V311", rows=130, size=72, vocabulary=311),
    _argmax_case(
        "first-40-R130-H72-V311", inputs.first_argmax, rows=130, size=72, vocabulary=311, count=40
    ),
    _argmax_case(  # more slices of 64 columns than its ring has stages
        "R130-H328-V311-bf16", dtype=torch.bfloat16, rows=130, size=328, vocabulary=311
    ),
    _argmax_case("R800-H512-V128257", benchmark=True, rows=800, size=512, vocabulary=128257),
    _argmax_case(
        "R800-H512-V128257-bf16",
        benchmark=True,
        dtype=torch.bfloat16,
        rows=800,
        size=512,
        vocabulary=128257,
    ),
    _argmax_case(
        "R1024-H512-V128257", benchmark=True, rounds=7, rows=1024, size=512, vocabulary=128257
    ),
    _argmax_case(
        "R1024-H512-V128257-bf16",
        benchmark=True,
        rounds=7,
        dtype=torch.bfloat16,
        rows=1024,
        size=512,
        vocabulary=128257,
    ),
    _argmax_case(
        "screened-R4-H512-V128257",
        benchmark=True,
        screened=True,
        rows=4,
        size=512,
        vocabulary=128257,
    ),
    _argmax_case(
        "screened-R200-H512-V128257",
        benchmark=True,
        screened=True,
        rows=200,
        size=512,
        vocabulary=128257,
    ),
    _cross_entropy_case("R6-H16-V37", rows=6, hidden=16, vocabulary=37),
    _cross_entropy_case("R65-H16-V37", rows=65, hidden=16, vocabulary=37),
    _cross_entropy_case("R200-H300-V70", rows=200, hidden=300, vocabulary=70),
    _cross_entropy_case(  # two chunks, each in tiles of rows
        "R300-H16-V5000",
        rows=300,
        hidden=16,
        vocabulary=5000,
        max_workspace_bytes=150 * 4 * 5000,
    ),
    _cross_entropy_case("R3-H1-V1", rows=3, hidden=1, vocabulary=1),
    _cross_entropy_case("none-R5-H70-V300", rows=5, hidden=70, vocabulary=300, reduction="none"),
    _cross_entropy_case(  # chunks of a few rows, two blocks of the vocabulary
        "sum-R70-H24-V4133",
        rows=70,
        hidden=24,
        vocabulary=4133,
        reduction="sum",
        max_workspace_bytes=15 * 4 * 4133,
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
    _mlp_case("R7-H16-I40", 7, 16, 40),
    _mlp_case("R70-H33-I21", 70, 33, 21),
    _mlp_case("R601-H33-I21", 601, 33, 21),  # several tiles, partial sums and odd rows
    _mlp_case("R2048-H512-I1280", 2048, 512, 1280, benchmark=True),
    _encode_case("R5-K4-H16", inputs.encode, 5, 31, 16, 40, 8, 4, gradients=("weights",)),
    _encode_case("R3-K1-H7", inputs.encode, 3, 5, 7, 9, 3, 1),
    _encode_case("folded-R5-K4-H16", inputs.folded_encode, 5, 31, 16, 40, 8, 4),
    _encode_case("folded-R200-K3-H13", inputs.folded_encode, 200, 50, 13, 21, 5, 3),
    _encode_case("folded-R3-K16-H9", inputs.folded_encode, 3, 7, 9, 12, 5, 16),
    _encode_case("R2048-K4-H512-V8192", inputs.encode, *ENCODER_SIZES, benchmark=True),
    _encode_case(
        "folded-R2048-K4-H512-V8192",
        inputs.folded_encode,
        *ENCODER_SIZES,
        benchmark=True,
        official_arguments=lambda: inputs.encode(*ENCODER_SIZES),
    ),
    _decode_case("R5-K4-H16", 5, 31, 16, 40, 8, 4),
    _decode_case("R150-K2-H13", 150, 301, 13, 21, 5, 2),
    _decode_case("R70-K4-H16", 70, 301, 16, 40, 8, 4),  # 280 rows of the vocabulary's product
    _decode_case("R3-K16-H9", 3, 31, 9, 12, 5, 16),
    _decode_case("R200-K4-H512-V128257", *DECODER_SIZES, benchmark=True),
    _decode_case("R200-K4-H512-V128257-bf16", *DECODER_SIZES, benchmark=True, dtype=torch.bfloat16),
    _sample_case(5, 16, 3),
    _sample_case(1, 67, 1, 3, 1, 1),
    _sample_case(3, 13, 45, 5, 7, 3),
    _sample_case(25, 13, 45, 5, 7, 1),  # several tiles, each of several draws
    _sample_case(50, 33, 2, 70, 9, 1),
    _sample_case(128, 512, 8, *HEAD_SIZES, benchmark=True, rounds=7),
    _sample_case(4, 512, 200, *HEAD_SIZES, benchmark=True, rounds=7, trained=False),
    _sample_case(1, 512, 200, *HEAD_SIZES, benchmark=True, trained=False),
    _sample_case(1, 512, 1, *HEAD_SIZES, benchmark=True, trained=False),
    _patch_case(4, 20, 2, 3),
    _patch_case(3, 1, 1, 2),
    _patch_case(2, 150, 5, 200),
    _patch_case(2, 40, 16, 3),
    _patch_case(1, 200, 4, 2, inputs.model_pool, benchmark=True),
    _patch_case(32, 200, 4, 2, inputs.model_pool, benchmark=True),
    _patch_case(1, 1000, 4, 2, inputs.model_pool, benchmark=True),
    _patch_case(32, 1000, 4, 2, inputs.model_pool, benchmark=True),
    _survivors_case(4, 20, 2, 1),
    _survivors_case(3, 1, 1, 1),
    _survivors_case(2, 150, 5, 3),
    _survivors_case(32, 200, 4, 1, benchmark=True),
    _survivors_case(32, 1000, 4, 3, benchmark=True),
)
