"""How large the terms are that an op sums up: what law 1 allows rounding errors in proportion to.

From a case's arguments in float64, one tensor for each output and gradient, in order.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Stream


def energy_score(arguments: dict[str, Any]) -> list[Tensor]:
    """Of the score and of its gradients in x, mean and log_std."""
    x, mean, log_std = (arguments[name].detach().double() for name in ("x", "mean", "log_std"))
    draws, (targets, beta) = x.shape[0], (arguments["num_targets"], arguments["beta"])
    eps = reference.noise(
        arguments["seed"], arguments["rows"], targets, x.shape[-1], Stream.TARGET, dtype=x.dtype
    )
    delta = log_std.exp() * eps  # [M, R, L]

    def slopes(difference: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        slope = beta * distance ** (beta - 2) * difference.abs()
        return torch.where(distance > 0, slope, 0)

    score = reference.energy_score_of_targets(x, mean + delta, beta)
    among = slopes(x[:, None] - x).sum(1) * 2 / (draws * (draws - 1))
    toward = slopes(x[:, None] - (mean + delta)) * 2 / (draws * targets)  # [S, M, R, L]
    return [
        score.diversity + 2 * score.fidelity,
        among + toward.sum(1),
        toward.sum((0, 1)),
        (toward.sum(0) * delta.abs()).sum(0),
    ]


def linear_cross_entropy(arguments: dict[str, Any]) -> list[Tensor]:
    """Of the loss and of its gradients in hidden and weight.

    An error of a logit in proportion to the logit's own terms moves the loss and the softmax.
    """
    hidden, weight = (arguments[name].detach().double() for name in ("hidden", "weight"))
    target, kept = arguments["target"], (arguments["target"] != -100).double()
    logits, terms = hidden @ weight.T, hidden.abs() @ weight.abs().T  # [R, V]
    softmax = logits.softmax(-1)
    one_hot = torch.zeros_like(softmax).scatter_(1, target.clamp(min=0)[:, None], 1)
    loss = 1 + 2 * terms.amax(-1)  # [R]
    moved = softmax * (terms + (softmax * terms).sum(-1, keepdim=True))
    grad_logits = ((softmax - one_hot).abs() + moved) * kept[:, None]
    if arguments.get("reduction", "mean") == "mean":
        loss, grad_logits = (loss * kept).sum() / kept.sum(), grad_logits / kept.sum()
    elif arguments["reduction"] == "sum":
        loss = (loss * kept).sum()
    return [loss, grad_logits @ weight.abs(), grad_logits.T @ hidden.abs()]


def decode_scores(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits of every slot and the sums of their absolute terms, two [R, K, V]."""
    weights = arguments["weights"]
    hidden = reference.decode_hidden(arguments["latents"], weights, 1e-6)  # [R, K, H]
    return hidden @ weights.vocabulary.T, hidden.abs() @ weights.vocabulary.abs().T
