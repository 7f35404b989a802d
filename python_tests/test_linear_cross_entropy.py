"""linear_cross_entropy beyond the laws: torch's conventions, wrong targets, budgets, devices."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_simulator import simulator  # noqa: F401
from torch import Tensor

import calm_rt
from calm_rt import ops, reference
from calm_rt.testing import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
LAW_CASES = [case for case in CASES if case.op == "linear_cross_entropy" and not case.benchmark]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def no_fallback():
    with calm_rt.backend("native"):
        yield


def arguments(rows: int = 7, hidden: int = 12, vocabulary: int = 300) -> tuple[Tensor, ...]:
    """hidden and weight with gradients, and a target with two rows that count nothing."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, generator=generator, requires_grad=True)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[1] = target[-1] = -100
    return x, weight, target


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 5, 10**9])
def test_ignored_rows_count_nothing(reduction: str, ignore_index: int) -> None:
    x, weight, target = arguments()
    target[target == -100] = ignore_index
    options = dict(ignore_index=ignore_index, reduction=reduction)
    loss = ops.linear_cross_entropy(x, weight, target, **options)
    expected = F.cross_entropy(F.linear(x, weight), target, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(expected, x, weight))
    assert not gradients(ops.linear_cross_entropy(x, weight, target, **options), x)[0][1].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, torch.inf])
def test_what_follows_the_loss_scales_its_gradients(reduction: str, factor: float) -> None:
    x, weight, target = arguments()
    ours, theirs = (
        gradients(factor * function(x, weight, target, reduction=reduction), x, weight)
        for function in (ops.linear_cross_entropy, reference.linear_cross_entropy)
    )
    if factor != torch.inf:
        torch.testing.assert_close(ours, theirs)
    assert not ours[0][1].any()  # a row that counts nothing


def test_batched_gradients_are_those_one_by_one() -> None:
    x, weight, target = arguments()
    loss = ops.linear_cross_entropy(x, weight, target)
    factors = torch.tensor([1.0, 3.0])
    (batched,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)
    for factor, gradient in zip(factors, batched, strict=True):
        (expected,) = torch.autograd.grad(loss, x, factor, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_mean_over_nothing_is_nan_as_in_torch() -> None:
    x, weight, target = arguments()
    target.fill_(-100)
    assert ops.linear_cross_entropy(x, weight, target).isnan()
    assert ops.linear_cross_entropy(x, weight, target, reduction="sum") == 0
    assert ops.linear_cross_entropy(x[:0], weight, target[:0]).isnan()


def test_denominator_replaces_the_count_and_has_a_gradient() -> None:
    x, weight, target = arguments()
    denominator = torch.tensor(3.5, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, target, denominator=denominator)
    expected = reference.linear_cross_entropy(x, weight, target, denominator=denominator)
    torch.testing.assert_close(loss, expected)
    leaves = (x, weight, denominator)
    torch.testing.assert_close(gradients(loss, *leaves), gradients(expected, *leaves))
    with pytest.raises(ValueError, match="denominator: expected None unless"):
        ops.linear_cross_entropy(x, weight, target, denominator=denominator, reduction="sum")


def test_a_denominator_of_zero_leaves_no_finite_gradient() -> None:
    x, weight, target = arguments()
    loss = ops.linear_cross_entropy(x, weight, target, denominator=torch.tensor(0.0))
    assert loss.isinf()
    grad_x, grad_weight = gradients(loss, x, weight)
    assert not grad_x[target >= 0].isfinite().any() and not grad_weight.isfinite().any()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", [300, -1, 2**62])
def test_wrong_target_is_named(backend: str, wrong: int) -> None:
    x, weight, target = arguments()
    target[2] = wrong
    with (
        calm_rt.backend(backend),
        pytest.raises(IndexError, match=rf"target: .*\[0, 300\).*{wrong}"),
    ):
        ops.linear_cross_entropy(x, weight, target)


@pytest.mark.parametrize("wrong", [300, -1, 2**62, -(2**62)])
def test_wrong_target_is_nan_where_nobody_looks(wrong: int) -> None:
    x, weight, target = arguments()
    target[2] = wrong
    compiled = torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(x, weight, target, reduction="none")
    assert loss.isnan().tolist() == [row == 2 for row in range(len(target))]
    assert gradients(compiled(x, weight, target), x)[0].isnan().any(-1).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_logits_give_what_torch_gives(value: float) -> None:
    x, weight, target = arguments(hidden=1)
    with torch.no_grad():
        x.fill_(1)
        weight[:, 0] = torch.linspace(-3, 3, len(weight))
        weight[7, 0] = value
    target[0], target[2] = 7, 8
    loss = ops.linear_cross_entropy(x, weight, target, reduction="none")
    expected = reference.linear_cross_entropy(x, weight, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    x, weight, target = arguments()
    loss = ops.linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_nobody_asked_for_change_nothing(reduction: str, wanted: str) -> None:
    x, weight, target = arguments()
    whole = ops.linear_cross_entropy(x, weight, target, reduction=reduction)
    expected = dict(zip(("hidden", "weight"), gradients(whole, x, weight), strict=True))
    leaves = {"hidden": x.detach(), "weight": weight.detach()}
    if wanted != "neither":
        leaves[wanted].requires_grad_()
    loss = ops.linear_cross_entropy(**leaves, target=target, reduction=reduction)
    assert torch.equal(loss, whole) and loss.requires_grad == (wanted != "neither")
    if loss.requires_grad:
        assert torch.equal(gradients(loss, leaves[wanted])[0], expected[wanted])


@pytest.mark.parametrize("budget", [1, 300 * 4 * 3, 2**40])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_budgets_differ_in_rounding_only(reduction: str, budget: int) -> None:
    x, weight, target = (tensor.detach().double() for tensor in arguments(rows=23))
    x, weight, target = x.requires_grad_(), weight.requires_grad_(), target.long()
    options = dict(reduction=reduction, max_workspace_bytes=budget)
    loss = ops.linear_cross_entropy(x, weight, target, **options)
    expected = F.cross_entropy(F.linear(x, weight), target, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x, weight), gradients(expected, x, weight))


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least 1, got 0"):
        ops.linear_cross_entropy(*arguments(), max_workspace_bytes=0)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(inference) -> None:
    x, weight, target = arguments()
    expected = ops.linear_cross_entropy(x, weight, target)
    with inference():
        assert torch.equal(ops.linear_cross_entropy(x.clone(), weight.clone(), target), expected)


def test_autocast_takes_the_product_in_its_type() -> None:
    x, weight, target = arguments()
    narrow = [tensor.bfloat16() for tensor in (x, weight)]
    expected = ops.linear_cross_entropy(*narrow, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert [g.dtype for g in gradients(loss, x, weight)] == [torch.float32] * 2


def test_two_types_meet_in_the_wider() -> None:
    x, weight, target = arguments()
    mixed = ops.linear_cross_entropy(x.bfloat16(), weight, target)
    assert torch.equal(mixed, ops.linear_cross_entropy(x.bfloat16().float(), weight, target))


# ---- the CUDA kernel in the simulator ----


def simulated(simulator, case: Case, dtype: torch.dtype) -> list[Tensor]:  # noqa: F811
    """loss [R] and the gradients of its sum."""
    values = case.make(dtype)
    leaves = [values[name].detach() for name in ("hidden", "weight")]
    budget = values.get("max_workspace_bytes", 2**30)
    return simulator.linear_cross_entropy(
        *leaves, values["target"], None, -100, budget, True, True, False
    )[1:4]


def simulated_in_two(simulator, case: Case, dtype: torch.dtype) -> list[Tensor]:  # noqa: F811
    """The same with the gradients in a call of their own."""
    values = case.make(dtype)
    leaves = [values[name].detach() for name in ("hidden", "weight")]
    arguments = (*leaves, values["target"], None, -100, 2**30, False, False, True)
    _, loss, _, _, grad_logits = simulator.linear_cross_entropy(*arguments)
    return [
        loss,
        *simulator.linear_cross_entropy_backward(grad_logits, *leaves, True, True),
    ]


def row_losses(case: Case, dtype: torch.dtype, start: torch.dtype) -> list[Tensor]:
    """The same by the reference, from values rounded to `start`."""
    values = case.make(start)
    leaves = [values[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight")]
    loss = reference.linear_cross_entropy(*leaves, values["target"], reduction="none")
    return [loss.detach().double(), *(g.double() for g in gradients(loss, *leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [simulated, simulated_in_two])
@pytest.mark.parametrize("case", LAW_CASES, ids=str)
def test_simulated_error_at_most_twice_the_reference(
    simulator,  # noqa: F811
    case: Case,
    run: Callable,
    dtype: torch.dtype,
) -> None:
    truth, own = row_losses(case, torch.float64, dtype), row_losses(case, dtype, dtype)
    values = {**case.make(dtype), "reduction": "none"}
    simulator.set_schedule(1)
    ours = run(simulator, case, dtype)
    for output, exact, expected, size in zip(
        ours, truth, own, case.magnitudes(values), strict=True
    ):
        error = (output.double() - exact).abs()
        allowed = 2 * (expected - exact).abs().max() + 4 * EPS * size
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what is allowed"


def test_simulated_wrong_target_is_nan(simulator) -> None:  # noqa: F811
    x, weight, target = (tensor.detach() for tensor in arguments())
    target[2] = 2**62
    _, loss, grad, *_ = simulator.linear_cross_entropy(
        x, weight, target, None, -100, 2**30, True, False, False
    )
    assert loss.isnan().tolist() == [row == 2 for row in range(len(target))]
    assert grad.isnan().any(-1).nonzero().tolist() == [[2]]
