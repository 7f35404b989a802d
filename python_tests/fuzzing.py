"""What test_fuzz.py tries: shapes, strides, dtypes and values of every op, drawn by hypothesis.

A drawn `Trial` is small and prints itself: sizes, which values are extreme, and the layout. Its
arguments come from the makers of calm_rt.inputs, whose floating-point tensors are then changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from calm_rt import inputs, reference, testing
from calm_rt.reference import LinearWeights
from calm_rt.testing import Case

# below float32's normal numbers, far from 1 but with squares in range, with squares out of range
EXTREMES = (0.0, -0.0, 1e-40, 1e-30, -1e-30, 1e-19, 1e19, 1e30, -1e30)
NON_FINITE = (float("inf"), float("-inf"), float("nan"))
SCALES = (1.0, 1e-30, 1e-19, 1e-6, 1e6, 1e19, 1e30)
BETAS = (1.0, 2.0, 0.05, 0.5, 1.3)
INT64 = st.integers(-(2**63), 2**63 - 1)


@dataclass(frozen=True)
class Values:
    """How floating-point tensors are changed.

    seed: of everything here.  leaves: bit i % 4 says whether tensor i is scaled and made extreme.
    scale: a factor.  extremes: what a few elements become.
    whole: multiples of 1/2, so that sums are exact and ties are ties.  duplicates: equal rows.
    nudge: the part of themselves by which numbers move at most, drawn anew for each nudge_seed;
        equal rows stay equal.
    """

    seed: int
    leaves: int = 0
    scale: float = 1.0
    extremes: tuple[float, ...] = ()
    whole: bool = False
    duplicates: bool = False
    nudge: float = 0.0
    nudge_seed: int = 0

    def change(self, tensor: Tensor, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        values = tensor * (0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        if self.whole:
            values = values.mul(4).round().div(2)
        if self.nudge:
            moves = torch.Generator().manual_seed(self.nudge_seed + index)
            uniform = torch.rand(values.shape, generator=moves, dtype=values.dtype)
            values = values * (1 + self.nudge * (2 * uniform - 1))
        if self.duplicates and values.numel():
            rows = torch.randint(len(values), (len(values),), generator=generator)
            values = values[rows]
        if self.leaves >> index % 4 & 1:
            values = values * self.scale
            for extreme in self.extremes[: values.numel()]:
                place = torch.randint(values.numel(), (), generator=generator)
                values.view(-1)[place] = extreme
        return values


@dataclass(frozen=True)
class Trial:
    """One call: an op, the sizes for its maker, the values, the dtypes and the layout.

    mixed: tensors after the first stay in float32, as autocast leaves them.
    layout: seed of the strides of every tensor.
    """

    op: str
    maker: str
    sizes: tuple[Any, ...]
    values: Values
    dtype: torch.dtype
    mixed: bool
    layout: int
    seed: int
    gradients: bool = True

    def case(self) -> Case:
        """The trial as a case, with what testing knows of its op."""
        template = next(case for case in testing.CASES if case.op == self.op)
        scores = argmax_scores if self.op == "linear_argmax" else template.scores
        return replace(
            template,
            arguments=self.wide,
            scores=scores,
            magnitudes=template.magnitudes or MAGNITUDES.get(self.op),
            gradients=template.gradients if self.gradients else (),
        )

    def wide(self) -> dict[str, Any]:
        """The arguments in float64."""
        arguments = getattr(inputs, self.maker)(*self.sizes)
        index = iter(range(1 << 20))
        arguments = tree_map(
            lambda value: self.values.change(value, next(index)) if is_float(value) else value,
            arguments,
        )
        if "target" in arguments and self.values.leaves:
            # an ignored row has gradient 0 whatever it holds; torch's is NaN where its logits are
            arguments["target"].clamp_(min=0)
        generator = torch.Generator().manual_seed(self.seed & 0xFFFFFFFF)
        if "rows" in arguments:  # from all of int64
            low, high = torch.randint(1 << 32, (2, *arguments["rows"].shape), generator=generator)
            arguments["rows"] = low | high << 32
        if "seed" in arguments:
            arguments["seed"] = torch.tensor(self.seed)
        return arguments

    def make(self) -> dict[str, Any]:
        """The arguments in the trial's dtypes, contiguous."""
        index = iter(range(1 << 20))

        def cast(value: Any) -> Any:
            if not is_float(value):
                return value
            first = next(index) == 0
            wide = torch.promote_types(self.dtype, torch.float32)
            return value.to(wide if self.mixed and not first else self.dtype)

        return tree_map(cast, self.wide())

    def strided(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same values with strides of the trial's layout."""
        index = iter(range(1 << 20))
        return tree_map(
            lambda value: strided(value, self.layout + next(index)) if is_tensor(value) else value,
            arguments,
        )


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_float(value: Any) -> bool:
    return is_tensor(value) and value.is_floating_point()


def strided(tensor: Tensor, seed: int) -> Tensor:
    """Equal values in another order in memory, with gaps that hold NaN or ids of no token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tensor.dim(), generator=generator).tolist()
    gap = int(torch.randint(1, 4, (), generator=generator))
    poison = float("nan") if tensor.is_floating_point() else 1 << 62
    memory = tensor.new_full((*(tensor.shape[dim] for dim in order), gap), poison)
    view = memory[..., gap - 1].permute([order.index(dim) for dim in range(tensor.dim())])
    return view.copy_(tensor)


def argmax_scores(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """How far the logits are from the best and the sums of their absolute terms, two [R, V].

    In long double, as float64's own rounding parts what ties.
    """
    hidden, weight = arguments["hidden"], arguments["weight"]
    with np.errstate(all="ignore"):
        logits = hidden.numpy().astype(np.longdouble) @ weight.numpy().astype(np.longdouble).T
        best = logits.max(-1, keepdims=True)
        below = logits - np.where(np.isfinite(best), best, 0)
    return torch.from_numpy(below.astype(np.float64)), hidden.abs() @ weight.abs().T


def gated_mlp_magnitudes(arguments: dict[str, Any]) -> list[Tensor]:
    """Of the output: an error of a product in proportion to its own terms moves what follows."""
    x, norm, gate, up, down = (
        arguments[name].detach() for name in ("x", "norm_weight", "gate", "up", "down")
    )
    normal = reference.rms_norm(x, norm, arguments.get("eps", 1e-6))
    gates, ups = normal @ gate.T, normal @ up.T
    gate_terms, up_terms = normal.abs() @ gate.abs().T, normal.abs() @ up.abs().T
    products = gate_terms * ups.abs() + F.silu(gates).abs() * up_terms
    return [x.abs() + products @ down.abs().T]


def encode_magnitudes(arguments: dict[str, Any]) -> list[Tensor]:
    """Of mean and log_std: the terms of the last product."""
    weights = arguments["weights"]
    size, eye = len(weights.norm), torch.eye(len(weights.norm), dtype=weights.norm.dtype)
    last = LinearWeights(torch.cat([eye, eye]), weights.norm.new_zeros(2 * size))
    normal, _ = reference.encode(arguments["ids"], weights._replace(latent=last), 1e-6)
    terms = normal.abs() @ weights.latent.weight.abs().T + weights.latent.bias.abs()
    return list(terms.detach().chunk(2, -1))


# of products, rounded to the inputs' type in between
CHAINS = ("gated_mlp", "encode", "decode", "sample_latents")
MAGNITUDES = {"gated_mlp": gated_mlp_magnitudes, "encode": encode_magnitudes}


def size(low: int, high: int, *rare: int) -> st.SearchStrategy[int]:
    """A size up to `high`, which steps over the widths of vectors, or a rare larger one."""
    return st.integers(low, high) | st.sampled_from(rare) if rare else st.integers(low, high)


def sizes(*strategies: st.SearchStrategy) -> st.SearchStrategy[tuple]:
    return st.tuples(*strategies)


ROWS = size(0, 5)
SCREENED_ROWS = size(1, 5, 9, 17, 33)  # more than 8 are rounded to 8 bits without a screen too
MLP_SIZES = size(1, 40, 64, 70), size(1, 40, 80)  # hidden, intermediate

# By op: the makers of its arguments and the sizes that they take.
MAKERS: dict[str, dict[str, st.SearchStrategy[tuple]]] = {
    "noise": {
        "noise": sizes(
            size(0, 5), ROWS, size(0, 70, 127, 257), st.sampled_from(["normal", "uniform"])
        )
    },
    "energy_score": {
        maker: sizes(
            size(2, 9, 17), ROWS, size(0, 70, 127, 130), size(1, 9), st.sampled_from(BETAS)
        )
        for maker in ("energy_score", "near_duplicates")
    },
    "linear_argmax": {
        "linear_argmax": sizes(SCREENED_ROWS, size(0, 40, 70), size(1, 70, 2047, 2049, 4100)),
        "ties": sizes(SCREENED_ROWS, size(1, 40), size(2, 70, 300)),
    },
    "linear_cross_entropy": {
        "linear_cross_entropy": sizes(size(1, 5, 19, 70), size(1, 40, 70), size(1, 70, 2049, 4100))
    },
    "gated_mlp": {"gated_mlp": sizes(ROWS, *MLP_SIZES)},
    "encode": {
        maker: sizes(size(0, 5, 17, 70), size(1, 30), *MLP_SIZES, size(1, 9), size(1, 5))
        for maker in ("encode", "folded_encode")
    },
    "decode": {
        "decode": sizes(size(0, 5, 17, 70), size(1, 70, 2049), *MLP_SIZES, size(1, 9), size(1, 5))
    },
    # the gradient behind a norm of a few numbers is a difference of almost equal terms
    "sample_latents": {"sample_latents": sizes(ROWS, size(8, 40, 70), size(1, 5))},
    "select_patch": {
        "select_patch": sizes(
            ROWS, size(1, 70, 200), size(0, 5), st.integers(1, 9) | st.just(2**40)
        ),
        "model_pool": sizes(size(1, 5), size(1, 70), size(0, 5), st.integers(1, 9)),
    },
    "survivors": {"survivors": sizes(size(1, 5), size(1, 70, 200), size(0, 5), st.integers(0, 5))},
}


@st.composite
def values(draw: Callable) -> Values:
    return Values(
        seed=draw(st.integers(0, 2**31)),
        leaves=draw(st.integers(0, 15)),
        scale=draw(st.sampled_from(SCALES)),
        extremes=draw(st.sampled_from([EXTREMES, EXTREMES + NON_FINITE]).flatmap(some)),
        whole=draw(st.booleans()),
        duplicates=draw(st.booleans()),
    )


def some(choices: tuple[float, ...]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(st.sampled_from(choices), max_size=3).map(tuple)


@st.composite
def trials(draw: Callable, op: str, dtypes: tuple[torch.dtype, ...]) -> Trial:
    """Trials of an op whose kernels take the dtypes."""
    maker = draw(st.sampled_from(sorted(MAKERS[op])))
    floats = [dtype for dtype in dtypes if dtype.is_floating_point] or [torch.float32]
    dtype = draw(st.sampled_from(floats))
    accepts_mixed = op in ("energy_score", "linear_argmax", "linear_cross_entropy")
    drawn_sizes, drawn_values = draw(MAKERS[op][maker]), draw(values())
    if op == "energy_score" and drawn_sizes[2] == 1:  # torch takes |x|, where squares may overflow
        drawn_values = replace(drawn_values, leaves=0)
    return Trial(
        op=op,
        maker=maker,
        sizes=drawn_sizes,
        values=drawn_values,
        dtype=dtype,
        mixed=accepts_mixed and draw(st.booleans()),
        layout=draw(st.integers(0, 2**31)),
        seed=draw(INT64),
        gradients=maker != "folded_encode" and draw(st.booleans()),
    )


FOUND = {  # trials that failed once
    "steep layers": Trial(
        op="sample_latents",
        maker="sample_latents",
        sizes=(5, 34, 1),
        values=Values(seed=221460, whole=True, duplicates=True),
        dtype=torch.bfloat16,
        mixed=False,
        layout=0,
        seed=334,
        gradients=False,
    ),
    "near the largest number": Trial(
        op="sample_latents",
        maker="sample_latents",
        sizes=(4, 70, 3),
        values=Values(seed=262145, leaves=9, scale=1e6, extremes=(1e-40, 1e-40), whole=True),
        dtype=torch.bfloat16,
        mixed=False,
        layout=1283170980,
        seed=-369,
    ),
    "terms of 5e5 that cancel": Trial(
        op="sample_latents",
        maker="sample_latents",
        sizes=(1, 15, 1),
        values=Values(seed=15200, leaves=4, scale=1e6, whole=True, duplicates=True),
        dtype=torch.float32,
        mixed=False,
        layout=0,
        seed=0,
        gradients=False,
    ),
    "ties that float64 parts": Trial(
        op="linear_argmax",
        maker="ties",
        sizes=(33, 29, 46),
        values=Values(seed=19801, leaves=2, scale=1e30, whole=True, duplicates=True),
        dtype=torch.float64,
        mixed=False,
        layout=0,
        seed=0,
    ),
}
