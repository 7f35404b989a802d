"""Tensors that begin beside a whole pack of 16 bytes: the CUDA kernels give the same results.

Sizes here are whole packs, so that addresses alone decide how a kernel reads. The simulator stops
at an access that the device could not make. Products of matrices are the host's library's there,
whose sums may depend on addresses: an op that takes them is held to the rounding of its type.
"""

import sys
from typing import Any

import pytest
import torch
from test_simulator import DTYPES, simulator  # noqa: F401
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from calm_rt import inputs, ops, testing
from calm_rt.reference import HEAD_EPS, Stream

EPS = 1e-6
SEED = torch.tensor(5)
ROW_IDS = torch.arange(70) * 7 + (1 << 35)


def made(maker: str, dtype: torch.dtype, *sizes: int) -> list:
    """The values of a maker's arguments in `dtype`, that require no gradient."""
    arguments = getattr(inputs, maker)(*sizes)
    return list(tree_map(lambda value: testing.move(value, dtype, "cpu"), arguments).values())


def flat(op: str, *arguments: Any) -> list:
    """The weights as the schema of the op lists them."""
    return sys.modules[getattr(ops, op).__module__]._flat(*arguments)


def noise(dtype: torch.dtype) -> tuple:
    return SEED, ROW_IDS[:5], 2, 16, Stream.HEAD, True, False


def energy_score(dtype: torch.dtype) -> tuple:
    x, mean, log_std = (inputs.normal(seed, 3, 2, 24).float() for seed in (1, 2, 3))
    return x.to(dtype), mean[0], log_std[0] - 1, SEED, ROW_IDS[:2], 3, 1.0, True, True


def energy_score_of_long_rows(dtype: torch.dtype) -> tuple:
    x, mean, log_std = (inputs.normal(seed, 3, 1, 264).float() for seed in (1, 2, 3))
    return x.to(dtype), mean[0], log_std[0] - 1, SEED, ROW_IDS[:1], 3, 1.0, True, True


def linear_argmax(dtype: torch.dtype) -> tuple:
    hidden, weight = made("linear_argmax", dtype, 70, 72, 311)
    return hidden, weight, None, torch.tensor(67)


def linear_cross_entropy(dtype: torch.dtype) -> tuple:
    hidden, weight, target = made("linear_cross_entropy", dtype, 5, 16, 48)
    scale = torch.linspace(0.5, 1.5, 5)
    return hidden, weight, target, scale, -100, 1 << 30, True, True, True


def linear_cross_entropy_backward(dtype: torch.dtype) -> tuple:
    hidden, weight, _ = made("linear_cross_entropy", dtype, 5, 16, 48)
    return inputs.normal(4, 5 * 48).to(dtype), hidden, weight, True, True


def gated_mlp(dtype: torch.dtype) -> tuple:
    x, norm, *matrices = made("gated_mlp", dtype, 70, 32, 24)
    return x, norm.float(), *matrices, EPS, True


def gated_mlp_backward(dtype: torch.dtype) -> tuple:
    *given, eps, _ = gated_mlp(dtype)
    grads = (inputs.normal(seed, 70, 32).to(dtype) for seed in (7, 8))
    products = (inputs.normal(seed, 70, 24).to(dtype) for seed in (9, 10))
    return *grads, *given, *products, eps, True


def encode(dtype: torch.dtype) -> tuple:
    ids, weights = made("encode", dtype, 5, 30, 16, 24, 8, 4)
    return ids, *flat("encode", weights), EPS


def encode_folded(dtype: torch.dtype) -> tuple:
    ids, weights = made("folded_encode", dtype, 5, 30, 16, 24, 8, 4)
    return ids, *flat("encode", weights), EPS


def decode(dtype: torch.dtype) -> tuple:
    latents, weights = made("decode", dtype, 20, 130, 16, 24, 8, 4)
    return latents, *flat("decode", weights), EPS


def sample_latents(dtype: torch.dtype) -> tuple:
    hidden, weights, samples, _, rows = made("sample_latents", dtype, 70, 16, 2)
    return hidden, flat("sample_latents", weights, dtype), SEED, rows, samples, HEAD_EPS, True


def sample_latents_backward(dtype: torch.dtype) -> tuple:
    hidden, weights, seed, rows, samples, eps, _ = sample_latents(dtype)
    kept = torch.ops.calm_rt_simulator.sample_latents(*sample_latents(dtype))[1:]
    grad = inputs.normal(9, samples, len(hidden), 6).to(dtype)
    return grad, hidden, weights, seed, rows, *kept, eps, True


def select_patch(dtype: torch.dtype) -> tuple:
    tokens, n, _, rows = inputs.select_patch(3, 40, 2, 2).values()
    return tokens, SEED, rows, n


def survivors(dtype: torch.dtype) -> tuple:
    return tuple(inputs.survivors(3, 40, 2, 1).values())


OWN_SUMS = ("noise", "energy_score", "linear_argmax", "select_patch", "survivors")
OF_IDS = (noise, select_patch, survivors)  # of one element type
OF_NUMBERS = (
    energy_score,
    energy_score_of_long_rows,
    linear_argmax,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    gated_mlp,
    gated_mlp_backward,
    encode,
    encode_folded,
    decode,
    sample_latents,
    sample_latents_backward,
)
CALLS = [(maker, torch.float32, 80) for maker in OF_IDS]
CALLS += [(maker, dtype, 80) for maker in OF_NUMBERS for dtype in DTYPES]
CALLS += [(maker, dtype, 90) for maker in (linear_argmax, decode) for dtype in DTYPES]


def schema(maker: Any) -> str:
    return maker.__name__.removesuffix("_of_long_rows").removesuffix("_folded")


def test_every_kernel_is_tried(simulator) -> None:  # noqa: F811
    names = torch._C._dispatch_get_all_op_names()
    there = {name.split("::")[1] for name in names if name.startswith("calm_rt_simulator::")}
    there -= {"set_schedule", "set_capability"}
    assert {schema(maker) for maker, *_ in CALLS} == there


def misaligned(value: Any) -> Any:
    """Equal, one element behind where an allocation begins."""
    if not isinstance(value, Tensor):
        return value
    moved = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    assert value.data_ptr() % 32 == 0 and moved.data_ptr() % 16 == value.element_size() % 16
    return moved


def outputs_of(simulator, maker: Any, arguments: Any) -> list[Tensor]:  # noqa: F811
    return tree_flatten(getattr(simulator, schema(maker))(*arguments))[0]


@pytest.mark.parametrize(
    "maker, dtype, capability",
    CALLS,
    ids=lambda value: getattr(value, "__name__", str(value).removeprefix("torch.")),
)
def test_misaligned_tensors_change_nothing(
    simulator,  # noqa: F811
    maker: Any,
    dtype: torch.dtype,
    capability: int,
) -> None:
    """All of them, and each alone, whose neighbours would let a kernel read packs."""
    leaves, structure = tree_flatten(maker(dtype))
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    moved = [misaligned(leaf) for leaf in leaves]
    alone = [
        [*leaves[:i], moved[i], *leaves[i + 1 :]]
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    ]
    simulator.set_schedule(1)
    simulator.set_capability(capability)
    try:
        expected = outputs_of(simulator, maker, tree_unflatten(leaves, structure))
        for given in [moved, *alone]:
            outputs = outputs_of(simulator, maker, tree_unflatten(given, structure))
            bound = {"rtol": 0, "atol": 0} if schema(maker) in OWN_SUMS else {}
            torch.testing.assert_close(outputs, expected, equal_nan=True, **bound)
    finally:
        simulator.set_capability(80)
