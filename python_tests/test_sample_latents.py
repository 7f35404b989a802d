"""The energy head: the official formula on the same noise, any batch, the simulator."""

import sys

import pytest
import torch
from test_simulator import SCHEDULES, simulator  # noqa: F401  (a fixture)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

import calm_rt
from calm_rt import inputs, official, ops, reference
from calm_rt.ops.check import seed_and_rows
from calm_rt.reference import HEAD_EPS, Stream
from calm_rt.testing import CASES, Case

LAW_CASES = [case for case in CASES if case.op == "sample_latents" and not case.benchmark]
# lines enough for sums over several ranges of them
MANY_LINES = Case("sample_latents", "R70-H16-S4", lambda: inputs.sample_latents(70, 16, 4))
SEED = torch.tensor(3)


def doubles(arguments: dict) -> dict:
    return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, arguments)


def test_splitting_the_context_off_is_the_official_formula() -> None:
    arguments = doubles(inputs.sample_latents(5, 16, 3))
    size = arguments["weights"].noise.weight.shape[1]
    noise = reference.noise(SEED, arguments["rows"], 3, size, Stream.HEAD, "uniform") - 0.5
    with calm_rt.backend("native"):
        latents = ops.sample_latents(**arguments)
    expected = official.sample_latents(**arguments, noise=noise.double())
    torch.testing.assert_close(latents, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_draws_belong_to_their_row(rows: int) -> None:
    """In another batch a row has the same noise; its products round otherwise at most."""
    arguments = inputs.sample_latents(100, 16, 3)
    with calm_rt.backend("native"):
        all_rows = ops.sample_latents(**arguments)
        for name in ("hidden", "rows"):
            arguments[name] = arguments[name][-rows:]
        few = ops.sample_latents(**arguments)
    torch.testing.assert_close(few, all_rows[:, -rows:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*LAW_CASES, MANY_LINES], ids=str)
def test_simulated_sample_latents(simulator, case, dtype: torch.dtype) -> None:  # noqa: F811
    """Draws and gradients miss no more than twice what the CPU's kernels miss, and a few eps."""
    arguments = doubles(case.make(dtype))
    hidden, weights = arguments["hidden"], arguments["weights"]
    flat = sys.modules[ops.sample_latents.__module__]._flat(weights, dtype)
    rows, num_samples = arguments["rows"], arguments["num_samples"]
    runs, grad = [], None
    for ops_of, schedule in [(torch.ops.calm_rt, 0), *((simulator, s) for s in SCHEDULES[1:])]:
        simulator.set_schedule(schedule)
        latents, *kept = ops_of.sample_latents(
            hidden, flat, SEED, rows, num_samples, HEAD_EPS, True
        )
        grad = torch.linspace(0.5, 1.5, latents.numel()).view_as(latents).to(dtype)
        grad_hidden, grad_weights = ops_of.sample_latents_backward(
            grad, hidden, flat, SEED, rows, *kept, HEAD_EPS, True
        )
        runs.append([latents, grad_hidden, *grad_weights])
    assert all(map(torch.equal, runs[1], runs[2]))
    wide = tree_map(lambda value: value.double().requires_grad_(), (hidden, weights))
    exact = reference.sample_latents(*wide, num_samples, SEED, rows)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(wide)]
    truth = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    for native, simulated, value in zip(*runs[:2], truth, strict=True):
        own = (native - value).abs().max()
        few_eps = 4 * torch.finfo(simulated.dtype).eps * (value.abs() + 1)
        assert ((simulated - value).abs() <= 2 * own + few_eps).all()


def test_seeds_and_rows_made_in_other_modes_serve_a_gradient() -> None:
    """Tensors of a seed and of row ids are kept for the next call, which may be of another mode."""
    num_rows, seeds = 37, (90417, 90418)  # of no other test

    def draw(seed: int | Tensor) -> tuple[Tensor, Tensor]:
        arguments = inputs.sample_latents(num_rows, 8, 2) | {"seed": seed, "rows": None}
        hidden = arguments["hidden"].detach().requires_grad_()
        return hidden, ops.sample_latents(**{**arguments, "hidden": hidden})

    with torch.inference_mode():
        draw(seeds[0])
    with FakeTensorMode():
        assert isinstance(draw(seeds[1])[1], FakeTensor)
    for seed in seeds:
        hidden, latents = draw(seed)
        latents.sum().backward()
        assert type(latents) is Tensor and hidden.grad.abs().sum() > 0
        assert torch.equal(latents, draw(torch.tensor(seed))[1])


def test_seeds_and_rows_made_in_a_transform_are_not_kept() -> None:
    """There torch follows every tensor that is made, for as long as the transform lasts."""
    wanted = 90419, None, 38, torch.device("cpu")  # of no other test

    def follow(x: Tensor) -> Tensor:
        return x * sum(tensor.sum() for tensor in seed_and_rows(*wanted))

    torch.func.grad(follow)(torch.ones(()))
    for tensor in seed_and_rows(*wanted):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simulated_norm_of_numbers_near_the_largest(simulator, dtype: torch.dtype) -> None:  # noqa: F811
    """The sum that a norm's mean is made of overflows; latents and gradients stay the CPU's."""
    arguments = doubles(inputs.sample_latents(3, 70, 2))  # at most other sizes torch has NaN too
    weights = arguments["weights"]
    large = torch.linspace(1e38, 3.2e38, 70, dtype=torch.float64)
    weights = weights._replace(
        noise=weights.noise._replace(bias=large), hidden=weights.hidden._replace(bias=-large)
    )
    hidden, weights = tree_map(lambda value: value.to(dtype), (arguments["hidden"], weights))
    flat = sys.modules[ops.sample_latents.__module__]._flat(weights, dtype)
    runs = []
    for ops_of in (torch.ops.calm_rt, simulator):
        given = hidden, flat, SEED, arguments["rows"]
        latents, *kept = ops_of.sample_latents(*given, 2, HEAD_EPS, True)
        grad = torch.ones_like(latents)
        grads = ops_of.sample_latents_backward(grad, *given, *kept, HEAD_EPS, True)
        runs.append([latents, grads[0], *grads[1]])
    expected = reference.sample_latents(hidden, weights, 2, SEED, arguments["rows"])
    assert expected.isfinite().all()
    few_eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(runs[1][0], expected, rtol=few_eps, atol=few_eps)
    for native, simulated in zip(*runs, strict=True):
        torch.testing.assert_close(simulated, native)
