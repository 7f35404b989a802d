"""The energy score of model draws against target draws that are made inside the kernel."""

from numbers import Real
from typing import Literal, overload

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    check,
    check_device,
    check_float,
    check_int,
    check_shape,
    seed_and_rows,
)

DTYPES = _native.FLOATS


@overload
def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    num_targets: int = 100,
    beta: float = 1.0,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    return_terms: Literal[False] = False,
) -> Tensor: ...


@overload
def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    num_targets: int = 100,
    beta: float = 1.0,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    return_terms: Literal[True],
) -> reference.EnergyScore: ...


@overload
def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    num_targets: int = 100,
    beta: float = 1.0,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    return_terms: bool,
) -> Tensor | reference.EnergyScore: ...


def energy_score(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    num_targets: int = 100,
    beta: float = 1.0,
    seed: int | Tensor = 0,
    rows: Tensor | None = None,
    return_terms: bool = False,
) -> Tensor | reference.EnergyScore:
    """Mean of |x_i - x_j|^beta minus twice the mean of |x_i - y_m|^beta: the loss is its -mean.

    x: [S, R, L], S >= 2 draws of the model.
    mean, log_std: [R, L], the posterior of the targets y_m = mean + exp(log_std) eps_m.
    num_targets: M, target draws a row.
    beta: exponent in (0, 2]; at 2 the score is not strictly proper, it then sees means only.
    seed: 64-bit int or [] int64 tensor.
    rows: [R] int64, logical row ids of the target draws; None for 0 .. R-1.
    returns: [R], float32 (float64 for float64 inputs), larger is better; once differentiable in x,
        mean and log_std, with gradient 0 at distance 0. With return_terms an
        EnergyScore(score, diversity, fidelity), of which only the score carries a gradient.
    memory: the gradient is computed in the forward and kept, [S, R, L] in x's type where x needs
        one. No [S, M, R, L] and no [M, R, L] exists.
    raises: ValueError for a wrong shape, dtype, device or range.
    source: paper equations 9 and 10, official `energy_score`.
    """
    check_shape("x", x, S=None, R=None, L=None)
    num_draws, num_rows, size = x.shape
    check(num_draws >= 2, "x", "at least 2 draws in its first dimension", num_draws)
    check_shape("mean", mean, R=num_rows, L=size)
    check_shape("log_std", log_std, R=num_rows, L=size)
    for name, tensor in {"x": x, "mean": mean, "log_std": log_std}.items():
        check_float(name, tensor)
    check_device(x.device, mean=mean, log_std=log_std)
    num_targets = check_int("num_targets", num_targets, 1)
    if not (isinstance(beta, Real) and 0 < beta <= 2):  # repr of a compiler's number ends its graph
        raise ValueError(f"beta: expected a number in (0, 2], got {beta!r}")
    seed, rows = seed_and_rows(seed, rows, num_rows, x.device)

    wide = torch.promote_types(
        torch.promote_types(x.dtype, mean.dtype), torch.promote_types(log_std.dtype, torch.float32)
    )
    if wide == torch.float64:
        x = x.double()
    mean, log_std = mean.to(wide), log_std.to(wide)
    if _native.use_native("energy_score", x, x.dtype, DTYPES):
        grad = torch.is_grad_enabled()
        need_grad_x, need_grad_target = (
            grad and x.requires_grad,
            grad and (mean.requires_grad or log_std.requires_grad),
        )
        outputs = _native.call(
            "energy_score",
            x,
            mean,
            log_std,
            seed,
            rows,
            num_targets,
            beta,
            need_grad_x,
            need_grad_target,
        )
        result = reference.EnergyScore(*outputs[:3])
    else:
        result = _native.call_reference(
            reference.energy_score, x, mean, log_std, num_targets, beta, seed, rows
        )
    if return_terms:
        return reference.EnergyScore(
            result.score, result.diversity.detach(), result.fidelity.detach()
        )
    return result.score


def _fake(x, mean, log_std, seed, rows, num_targets, beta, need_grad_x, need_grad_target):
    row = [mean.new_empty(x.shape[1]) for _ in range(3)]
    grad_x = x.new_empty(x.shape if need_grad_x else (0,))
    grad_target = [mean.new_empty(mean.shape if need_grad_target else (0,)) for _ in range(2)]
    return *row, grad_x, *grad_target


def _setup_context(ctx, inputs, output):
    _, diversity, fidelity, *gradients = output
    ctx.mark_non_differentiable(diversity, fidelity, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.need_grad_x, ctx.need_grad_target = inputs[-2:]


def _backward(ctx, grad_score, *_):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient knows nothing of x any more
        raise RuntimeError(
            "energy_score: the kernel's gradient cannot be differentiated again; "
            'use calm_rt.backend("reference")'
        )
    grad_x = grad_mean = grad_log_std = None
    if grad_score is not None:
        saved_x, saved_mean, saved_log_std = ctx.saved_tensors
        scale = grad_score[:, None]
        if ctx.need_grad_x and saved_x.dtype == grad_score.dtype:
            grad_x = saved_x * scale
        elif ctx.need_grad_x:  # draw by draw, so that no second [S, R, L] of float32 exists
            grad_x = torch.stack([(draw * scale).to(draw.dtype) for draw in saved_x])
        if ctx.need_grad_target:
            grad_mean, grad_log_std = saved_mean * scale, saved_log_std * scale
    return grad_x, grad_mean, grad_log_std, None, None, None, None, None, None


_native.register("energy_score", _fake, _backward, _setup_context)
