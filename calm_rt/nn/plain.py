"""Modules that compute what their class does and no more: an op takes the weights of no other."""

from typing import TypeVar

from torch import Tensor, nn

from calm_rt.ops.check import check
from calm_rt.reference import LinearWeights

WHOLE = (
    "whole weights where ops take them: under FSDP2 fully_shard the layers of the backbone and then"
    " the module whose forward is the loss (examples/fsdp2.py), no other part, and fold before that"
)


Module = TypeVar("Module", bound=nn.Module)


def uncompiled(module: Module) -> Module:
    """What torch.compile wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward, or its backward more than that's."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def change_of(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a call of the module does beside `kind`'s forward, None for nothing.

    Parametrizations (torch.nn.utils.parametrizations) keep that forward, so they are no change.
    """
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return type(module).__name__
    return f"{type(module).__name__} with hooks" if has_hooks(module) else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is `kind`'s forward on its weight and no more.

    Adapters and quantisation put another class in its place, others a forward of its own, a bias,
    or hooks; an op, which takes weights only, would pass them over.
    """
    biased = getattr(module, "bias", None) is not None
    return type(module) is kind and not biased and not change_of(module, kind)


def check_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """raises: ValueError where the module computes something else than `kind`'s forward."""
    change = change_of(module, kind)
    if change:
        check_whole(*module.parameters())  # it may be FSDP2 that changed it
        expected = f"{kind.__name__} modules that compute as they do in torch or calm_rt, for ops"
        expected += " take their weights (no adapter, quantisation, hook or own forward)"
        check(False, "model", expected, change)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which is not imported for that: it takes a second, and some builds
    of torch have none."""
    return hasattr(tensor, "device_mesh")


def check_whole(*weights: Tensor) -> None:
    """raises: ValueError where a weight is spread over processes (fully_shard, FSDP2)."""
    for weight in weights:
        if is_sharded(weight):
            check(False, "model", WHOLE, "a DTensor")


def weight_of(module: nn.Module, kind: type[nn.Module]) -> Tensor:
    """The module's weight, for an op that stands in for `kind`'s forward.

    raises: ValueError where the module computes something else with it, or has not all of it.
    """
    check_plain(module, kind)
    weight = module.weight
    if type(weight) is not nn.Parameter:  # most are, and many are asked for
        check_whole(weight)
    return weight


def weights_of(module: nn.Linear | nn.LayerNorm) -> LinearWeights:
    """Weight and bias of a module that has both.  raises: as `weight_of`, and without a bias."""
    kind = nn.LayerNorm if isinstance(module, nn.LayerNorm) else nn.Linear
    weight = weight_of(module, kind)
    check(module.bias is not None, "model", f"a bias in every {kind.__name__}", "none")
    return LinearWeights(weight, module.bias)


def weights_between_silu(chain: nn.Sequential, count: int) -> list[LinearWeights]:
    """Those of so many linear layers with SiLU between them.  raises: as `weights_of`."""
    check_plain(chain, nn.Sequential)
    expected = f"{count} linear layers with SiLU between them"
    check(len(chain) == 2 * count - 1, "model", expected, f"{len(chain)} modules")
    for module in chain[1::2]:
        check_plain(module, nn.SiLU)
    return [weights_of(module) for module in chain[::2]]
