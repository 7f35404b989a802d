"""What energy_score promises beyond the laws: its edges, and that a row's draws are its own."""

import pytest
import torch
from test_simulator import energy_score, simulator  # noqa: F401  (a fixture)

import calm_rt
from calm_rt import ops
from calm_rt.testing import CASES

CASE = next(case for case in CASES if case.op == "energy_score")


def score(arguments: dict, **changes) -> torch.Tensor:
    with calm_rt.backend("native"):
        return ops.energy_score(**{**arguments, **changes})


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_equal_draws_have_finite_gradients(beta: float) -> None:
    arguments = CASE.make()
    x = arguments["x"].detach()[:1].expand_as(arguments["x"]).clone().requires_grad_()
    # no spread at all: every target is the mean, and the first row's draws stand exactly there
    with torch.no_grad():
        x[:, 0] = arguments["mean"][0]
    log_std = torch.full_like(arguments["log_std"], -200.0)
    result = score(arguments, x=x, log_std=log_std, beta=beta, return_terms=True)
    (gradient,) = torch.autograd.grad(result.score.sum(), x)
    assert (result.diversity == 0).all() and result.fidelity[0] == 0
    assert (gradient[:, 0] == 0).all() and torch.isfinite(gradient).all()
    assert (gradient[:, 1:] != 0).any()


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_draws_that_nearly_meet_have_finite_gradients(simulator, beta: float) -> None:  # noqa: F811
    """d^(beta - 2) is beyond float32 where the distance is 1e-22."""
    x = torch.tensor([0.0, 1e-22])[:, None, None].repeat(1, 3, 4).requires_grad_()
    others = {"mean": torch.ones(3, 4), "log_std": torch.zeros(3, 4), "num_targets": 2}
    arguments = {"x": x, **others, "beta": beta, "seed": torch.tensor(0), "rows": torch.arange(3)}
    (gradient,) = torch.autograd.grad(score(arguments).sum(), x)
    for of_kernel in (gradient, energy_score(simulator, arguments)[3]):
        assert of_kernel.isfinite().all() and (of_kernel[1] > 1e15).all()
        assert (of_kernel[0] < -1e15).all()


@pytest.mark.parametrize("name", ["x", "mean", "log_std"])
def test_nan_stays_in_its_row(name: str) -> None:
    arguments = CASE.make()
    clean = score(arguments)
    dirty = {
        key: value.detach().clone() for key, value in arguments.items() if key in CASE.gradients
    }
    dirty[name].view(-1, *arguments["mean"].shape)[-1, 2, 5] = float("nan")
    result = score(arguments, **dirty)
    assert torch.isnan(result[2])
    others = torch.arange(len(result)) != 2
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("value", [1e30, float("inf")])
def test_overflow_is_that_of_the_reference(value: float) -> None:
    arguments = CASE.make()
    x = arguments["x"].detach().clone()
    x[0, 1, 3] = value
    native = score(arguments, x=x)
    with calm_rt.backend("reference"):
        reference = ops.energy_score(**{**arguments, "x": x})
    assert torch.equal(torch.isfinite(native), torch.isfinite(reference))
    assert torch.equal(torch.isnan(native), torch.isnan(reference))


@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_extreme_log_std_is_that_of_the_reference(value: float) -> None:
    arguments = CASE.make()
    log_std = torch.full_like(arguments["log_std"], value)
    native = score(arguments, log_std=log_std)
    with calm_rt.backend("reference"):
        reference = ops.energy_score(**{**arguments, "log_std": log_std})
    assert torch.equal(torch.isfinite(native), torch.isfinite(reference))
    finite = torch.isfinite(native)
    torch.testing.assert_close(native[finite], reference[finite])


def test_a_row_depends_on_its_id_not_on_its_place() -> None:
    arguments = CASE.make()
    whole = score(arguments)
    for row in range(len(whole)):
        alone = {name: arguments[name].narrow(dim, row, 1) for name, dim in CASE.row_dims.items()}
        assert torch.equal(score(arguments, **alone), whole[row : row + 1])


def test_seed_and_stream_matter() -> None:
    arguments = CASE.make()
    assert not torch.equal(score(arguments, seed=1), score(arguments, seed=2))


def test_second_derivative_is_refused() -> None:
    arguments = CASE.make()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(score(arguments).sum(), arguments["x"], create_graph=True)


def test_terms_add_up_and_carry_no_gradient() -> None:
    terms = score(CASE.make(), return_terms=True)
    torch.testing.assert_close(terms.score.detach(), terms.diversity - 2 * terms.fidelity)
    assert terms.score.requires_grad and not terms.diversity.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=0.0), "beta: expected a number in"),
        (dict(beta=2.5), "beta: expected a number in"),
        (dict(beta=float("nan")), "beta: expected a number in"),
        (dict(num_targets=0), "num_targets: expected at least 1"),
        (dict(seed=1.5), "seed: expected an int"),
        (dict(seed=2**63), "seed: expected an int of 64 bits"),
        (dict(x=torch.zeros(1, 5, 128)), "x: expected at least 2 draws"),
        (dict(rows=torch.zeros(3, dtype=torch.int64)), "rows: expected shape"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.energy_score(**{**CASE.make(), **change})
