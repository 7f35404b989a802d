"""Modules that compute what their class does and no more: an op takes the weights of no other."""

from torch import Tensor, nn

from calm_rt.ops.check import check
from calm_rt.reference import LinearWeights


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is `kind`'s forward on its weight and no more.

    Adapters and quantisation put another class in its place, others a forward of its own, a bias,
    or hooks; an op, which takes weights only, would pass them over.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    own = any(hooks) or "forward" in vars(module) or getattr(module, "bias", None) is not None
    return type(module) is kind and not own


def weight_of(module: nn.Module, kind: type[nn.Module]) -> Tensor:
    """The module's weight, for an op that stands in for `kind`'s forward.

    Parametrizations (torch.nn.utils.parametrizations) keep that forward, so they may change it.
    raises: ValueError where the module computes something else with it.
    """
    own = type(module).forward is not kind.forward or "forward" in vars(module)
    hooks = module._forward_hooks or module._forward_pre_hooks
    if own or hooks:
        expected = f"{kind.__name__} modules that compute as torch's, for ops take their weights"
        got = f"{type(module).__name__}{' with hooks' if hooks else ''}"
        check(False, "model", f"{expected} (no adapter, quantisation, hook or own forward)", got)
    return module.weight


def weights_of(module: nn.Linear | nn.LayerNorm) -> LinearWeights:
    """Weight and bias of a module that has both.  raises: as `weight_of`, and without a bias."""
    kind = nn.LayerNorm if isinstance(module, nn.LayerNorm) else nn.Linear
    weight = weight_of(module, kind)
    check(module.bias is not None, "model", f"a bias in every {kind.__name__}", "none")
    return LinearWeights(weight, module.bias)
