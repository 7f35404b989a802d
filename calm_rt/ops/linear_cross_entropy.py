"""Cross-entropy of a vocabulary projection: the autoencoder's reconstruction loss."""

from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import check, check_device, check_float, check_int64, check_shape

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: Tensor | None = None,
) -> Tensor:
    """-log softmax(weight hidden_r)[target_r], reduced over the rows.

    hidden: [R, H].
    weight: [V, H].
    target: [R] int64, token ids; rows with ignore_index count nothing.
    reduction: "mean", "sum" or "none".
    denominator: [], what "mean" divides by; None for the number of rows that are not ignored.
    returns: [] for "mean" and "sum", [R] for "none"; nats, float32 for 16-bit inputs.
    Raises ValueError for other shapes, types or devices, or an unknown reduction.
    Source: the loss of the official Autoencoder.forward.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_shape("weight", weight, V=None, H=hidden.shape[1])
    check_shape("target", target, R=hidden.shape[0])
    check_float("hidden", hidden)
    check_float("weight", weight)
    check_int64("target", target)
    check_device(hidden.device, weight=weight, target=target)
    check(reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", repr(reduction))
    if denominator is not None:
        check(
            reduction == "mean",
            "denominator",
            "None unless reduction is 'mean'",
            f"reduction {reduction!r}",
        )
        check_shape("denominator", denominator)
        check_device(hidden.device, denominator=denominator)
    _native.reference_only("linear_cross_entropy")
    return reference.linear_cross_entropy(
        hidden, weight, target, ignore_index, reduction, denominator
    )
