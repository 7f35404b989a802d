"""Cross-entropy of a vocabulary projection: the autoencoder's reconstruction loss."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    alike,
    check,
    check_device,
    check_float,
    check_ids,
    check_int,
    check_int64,
    check_shape,
    is_autocast_on,
    may_look,
)

DTYPES = _native.FLOATS

REDUCTIONS = ("mean", "sum", "none")
EXPECTED_REDUCTION = f"one of {REDUCTIONS}"

FEW_ROWS = 1024  # up to which a list of the target is looked through faster than the tensor

# up to which a CPU multiplies 16-bit types as they are (kNarrowRows of vocabulary_products.h)
NARROW_ROWS = 64

# Bytes of logits at a time, by device. Fewer rows mean that the weight and its gradient, which are
# much larger than a row of hidden states, travel more often.
WORKSPACE_BYTES = {"cpu": 192 << 20, "cuda": 1 << 30}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """-log softmax(weight hidden_r)[target_r], reduced over the rows.

    hidden: [R, H].
    weight: [V, H], V at least 1.
    target: [R] int64, token ids; rows with ignore_index count nothing.
    reduction: "mean", "sum" or "none".
    denominator: [], what "mean" divides by; None for the number of rows that are not ignored. The
        mean over nothing is NaN, as in torch.
    max_workspace_bytes: of the logits that exist at a time, at least one row of V; None for 192 MB
        on a CPU and 1 GB on a GPU. The gradients differ in rounding between budgets.
    returns: [] for "mean" and "sum", [R] for "none"; nats, float32 for 16-bit inputs; once
        differentiable in hidden and weight.
    memory: the logits exist a block of rows at a time, as max_workspace_bytes says.
        Of at most H rows (bfloat16 on a CPU: at most 64 too) the gradient of the logits, [R, V], is
        kept for the backward if it fits max_workspace_bytes. It is no larger than the gradient of
        the weight. float16 and exported programs never keep it.
        Of more rows "mean" and "sum" compute the gradients in the forward and keep them, [R, H] and
        [V, H] in float32 (float64 for float64 inputs). "none" computes them in the backward.
    Under torch.autocast hidden and weight are cast as F.linear casts them.
    raises: ValueError for other shapes, types or devices, or an unknown reduction; IndexError for a
    target outside the vocabulary in eager code on a CPU, elsewhere the kernel gives NaN for it.
    source: the loss of the official Autoencoder.forward.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_shape("weight", weight, V=None, H=hidden.shape[1])
    check(weight.shape[0] >= 1, "weight", "at least one row", weight.shape)
    check_shape("target", target, R=hidden.shape[0])
    if not alike(hidden, weight):
        check_float("hidden", hidden)
        check_float("weight", weight)
        check_device(hidden.device, weight=weight)
    check_int64("target", target)
    check_device(hidden.device, target=target)
    check(reduction in REDUCTIONS, "reduction", EXPECTED_REDUCTION, repr(reduction))
    if denominator is not None:
        expected, got = "None unless reduction is 'mean'", f"reduction {reduction!r}"
        check(reduction == "mean", "denominator", expected, got)
        check_shape("denominator", denominator)
        check_device(hidden.device, denominator=denominator)
    if max_workspace_bytes is None:
        max_workspace_bytes = WORKSPACE_BYTES.get(hidden.device.type, WORKSPACE_BYTES["cuda"])
    max_workspace_bytes = check_int("max_workspace_bytes", max_workspace_bytes, 1)
    ignore_index = check_int("ignore_index", ignore_index, -(2**63))
    count = _count(target, weight.shape[0], ignore_index) if may_look(target) else None

    hidden, weight = _one_dtype(hidden, weight)
    if not _native.use_native("linear_cross_entropy", hidden, hidden.dtype, DTYPES):
        return _native.call_reference(
            reference.linear_cross_entropy,
            hidden,
            weight,
            target,
            ignore_index,
            reduction,
            denominator,
        )
    # Rows that all count the same have their gradient ready before anything comes back, which is
    # then to be scaled. For a few of them the gradient of the logits is smaller than that.
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = need_grad and _keeps_grad_logits(hidden, weight, max_workspace_bytes)
    if keep and count and reduction != "none" and denominator is None:
        divisor = 1 if reduction == "sum" else count
        return _KeptLoss.apply(hidden, weight, target, divisor, ignore_index, max_workspace_bytes)
    ready = need_grad and not keep and reduction != "none"
    total, loss, *_ = _native.call(
        "linear_cross_entropy",
        hidden,
        weight,
        target,
        None,
        ignore_index,
        max_workspace_bytes,
        ready and hidden.requires_grad,
        ready and weight.requires_grad,
        keep,
    )
    if reduction == "none":
        return loss
    total = loss.sum() if keep else total
    if reduction == "sum":
        return total
    divisor = (target != ignore_index).sum() if denominator is None else denominator
    # of no row the loss is NaN, and its gradient 0 as torch's, not 0 * inf
    empty = (divisor == 0) & (total.detach() == 0)
    return total / divisor.masked_fill(empty, 1) + (total.detach() / divisor).where(empty, 0)


def _count(target: Tensor, vocab_size: int, ignore_index: int) -> int | None:
    """How many rows count, or None for many rows; raises IndexError for a wrong target."""
    few = len(target) <= FEW_ROWS
    ids = [id for id in target.tolist() if id != ignore_index] if few else []
    if not few or (ids and not 0 <= min(ids) <= max(ids) < vocab_size):
        check_ids("target", torch.where(target == ignore_index, 0, target), vocab_size)
    return len(ids) if few else None


def _keeps_grad_logits(hidden: Tensor, weight: Tensor, max_bytes: int) -> bool:
    """Whether the backward finds the gradient of the logits, which is less than the weight's.

    Not of float16: divided by the number of rows most of it would be 0, and hidden, multiplied by
    the scale of a GradScaler, inf. Nor in an exported program, which is for any number of rows.
    """
    if hidden.dtype == torch.float16 or torch.compiler.is_exporting():
        return False
    narrow = hidden.is_cuda or hidden.itemsize >= 4 or hidden.shape[0] <= NARROW_ROWS
    few = hidden.shape[0] <= hidden.shape[1]
    return narrow and few and hidden.shape[0] * weight.shape[0] * hidden.itemsize <= max_bytes


def _one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that the product is taken in."""
    autocast = is_autocast_on(hidden.device)
    if hidden.dtype == weight.dtype and not autocast:
        return hidden, weight
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype != torch.float64 and autocast:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)


def _fake(
    hidden,
    weight,
    target,
    scale,
    ignore_index,
    max_workspace_bytes,
    need_grad_hidden,
    need_grad_weight,
    keep_grad_logits,
):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if need_grad_hidden else (0,), dtype=wide),
        weight.new_empty(weight.shape if need_grad_weight else (0,), dtype=wide),
        hidden.new_empty(hidden.shape[0] * weight.shape[0] if keep_grad_logits else 0),
    )


def _fake_backward(grad_logits, hidden, weight, need_grad_hidden, need_grad_weight):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape if need_grad_hidden else (0,), dtype=wide),
        weight.new_empty(weight.shape if need_grad_weight else (0,)),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, target, _, *options, need_grad_hidden, need_grad_weight, ctx.kept = inputs
    total, loss, grad_hidden, grad_weight, grad_logits = output
    ctx.set_materialize_grads(False)
    ctx.options, ctx.dtype = options, hidden.dtype
    ctx.ready = need_grad_hidden or need_grad_weight
    if ctx.ready:  # the total is differentiable, with these gradients
        ctx.mark_non_differentiable(loss, grad_hidden, grad_weight, grad_logits)
        ctx.save_for_backward(grad_hidden, grad_weight)
    else:  # each row's loss is, with gradients that are yet to be computed
        ctx.mark_non_differentiable(total, grad_hidden, grad_weight, grad_logits)
        ctx.save_for_backward(hidden, weight, target, grad_logits)


def _backward(ctx, grad_total, grad_loss, *_):
    _refuse_second_derivative()
    needs, gradients = ctx.needs_input_grad[:2], (None, None)
    if ctx.ready and grad_total is not None:
        gradients = [
            _scaled(saved, grad_total, ctx.dtype) if need else None
            for saved, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
    elif not ctx.ready and grad_loss is not None:
        hidden, weight, target, grad_logits = ctx.saved_tensors
        if ctx.kept:
            scale = torch.where(target == ctx.options[0], 0, grad_loss)  # inf where none counts
            products = _from_grad_logits(grad_logits, hidden, weight, scale[:, None], needs)
        else:
            arguments = (hidden, weight, target, grad_loss, *ctx.options, *needs, False)
            products = _native.call("linear_cross_entropy", *arguments)[2:4]
        gradients = [
            wide.to(ctx.dtype) if need else None for wide, need in zip(products, needs, strict=True)
        ]
    return *gradients, None, None, None, None, None, None, None


class _KeptLoss(torch.autograd.Function):
    """Sum or mean of the losses whose gradient of the logits is kept, in eager code on a CPU.

    One node with nothing left to scale, where the op, a sum and a division make three: with few
    rows these take as long as the products.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, divisor, ignore_index, max_workspace_bytes):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = hidden.new_full(target.shape, 1 / divisor, dtype=wide)
        options = ignore_index, max_workspace_bytes, False, False, True
        total, _, _, _, grad_logits = _native.call(
            "linear_cross_entropy", hidden, weight, target, scale, *options
        )
        ctx.save_for_backward(hidden, weight, target, grad_logits)
        ctx.ignore_index = ignore_index
        return total.div_(divisor)

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_second_derivative()
        hidden, weight, target, grad_logits = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _is_one(grad_loss):  # this loss is what one descends
            products = _native.call(
                "linear_cross_entropy_backward", grad_logits, hidden, weight, *needs
            )
        else:
            scale = torch.where(target == ctx.ignore_index, 0, grad_loss)
            products = _from_grad_logits(grad_logits, hidden, weight, scale[:, None], needs)
        gradients = [
            product.to(hidden.dtype) if need else None
            for product, need in zip(products, needs, strict=True)
        ]
        return *gradients, None, None, None, None


def _is_one(scale: Tensor) -> bool:
    try:
        return may_look(scale) and scale.item() == 1
    except RuntimeError:  # under is_grads_batched: there are several
        return False


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient knows nothing of hidden
        raise RuntimeError(
            "linear_cross_entropy: the kernel's gradient cannot be differentiated again; "
            'use calm_rt.backend("reference")'
        )


def _from_grad_logits(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_r scale[r] loss[r], scale [R, 1], from those of the logits of every loss."""
    scaled = (hidden * scale).to(hidden.dtype) if needs[1] else hidden
    grad_hidden, grad_weight = _native.call(
        "linear_cross_entropy_backward", grad_logits, scaled, weight, *needs
    )
    return grad_hidden * scale if needs[0] else grad_hidden, grad_weight


def _scaled(saved: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * scale in dtype, an eighth at a time so that no second float32 gradient exists."""
    if saved.dtype == dtype:
        return saved * scale
    scaled = torch.empty_like(saved, dtype=dtype)
    for out, part in zip(scaled.chunk(8), saved.chunk(8), strict=True):
        out.copy_(part * scale)
    return scaled


_native.register("linear_cross_entropy", _fake, _backward, _setup_context)
_native.register("linear_cross_entropy_backward", _fake_backward)
