"""Argument checks: one ValueError that names the argument, what is expected and what came.

They look at shapes, types and devices, and at values only where `may_look` says that this is free,
so they neither wait for a device nor break a `torch.compile` graph.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, NoReturn, SupportsIndex, overload

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from calm_rt.reference import (
    DecoderWeights,
    EncoderWeights,
    FoldedEncoderWeights,
    HeadWeights,
    LinearWeights,
    MlpWeights,
)

CPU = torch.device("cpu")
MOST_REMEMBERED = 1024  # row ids
MOST_INT = 2**63 - 1  # that an op takes


@overload
def check(condition: Literal[False], name: str, expected: object, got: object) -> NoReturn: ...


@overload
def check(condition: bool, name: str, expected: object, got: object) -> None: ...


def check(condition: bool, name: str, expected: object, got: object) -> None:
    """Raises ValueError("name: expected ..., got ...") unless the condition holds."""
    if not condition:
        got = list(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_shape(name: str, tensor: Tensor, **sizes: int | None) -> None:
    """Raises ValueError unless the tensor has the named sizes; None stands for any.

    check_shape("mean", mean, R=4, L=None) accepts [4, anything].
    """
    check_tensor(name, tensor)
    shape, wanted = tensor.shape, tuple(sizes.values())
    if shape == wanted:  # most are all given, and a comparison of tuples is cheap
        return
    if len(shape) == len(wanted):
        for have, want in zip(shape, wanted, strict=True):
            if have != want and want is not None:
                break
        else:
            return
    expected = ", ".join(
        letter if size is None else f"{letter}={size}" for letter, size in sizes.items()
    )
    raise ValueError(f"{name}: expected shape [{expected}], got {list(shape)}")


def check_tensor(name: str, value: object) -> None:
    """Raises ValueError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        got = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor, got {got}")


def check_int(name: str, value: SupportsIndex, least: int, most: int | None = None) -> int:
    """The value as an int (numpy's are taken too); raises ValueError unless it is within bounds."""
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except TypeError:
            raise ValueError(f"{name}: expected an int, got {value!r}") from None
    if value < least or value > (MOST_INT if most is None else most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        bounds = "an int of 64 bits" if most is None and value > MOST_INT else bounds
        raise ValueError(f"{name}: expected {bounds}, got {value}")
    return value


def check_number(name: str, value: float) -> None:
    """Raises ValueError unless the value is a number."""
    if not isinstance(value, float | Real):  # most are floats, which is seen faster
        raise ValueError(f"{name}: expected a number, got {value!r}")


def check_float(name: str, *tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is floating point; a group may share a name."""
    for tensor in tensors:
        check(tensor.is_floating_point(), name, "a floating-point tensor", tensor.dtype)


def check_int64(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is int64."""
    check(tensor.dtype == torch.int64, name, "an int64 tensor", tensor.dtype)


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raises ValueError unless every named tensor is on the device."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def check_weights_device(device: torch.device, weights: Iterable, name: str = "weights") -> None:
    """Raises ValueError unless every tensor of nested tuples and lists is on the device."""
    fields = getattr(weights, "_fields", None)
    for place, part in enumerate(weights):
        if isinstance(part, Tensor):
            if part.device != device:
                check_device(device, **{f"{name}.{fields[place]}" if fields else name: part})
        elif part is not None:
            check_weights_device(device, part, f"{name}.{fields[place]}" if fields else name)


def is_autocast_on(device: torch.device) -> bool:
    """Whether torch.autocast is in force there; torch raises for devices that have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def alike(*tensors: Tensor) -> bool:
    """Whether all have one floating-point type and device, as most do: then checks of each can be
    left out, which take 30 us together where the caches are full of weights."""
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != device:
            return False
    return dtype.is_floating_point


def check_patches(name: str, ids: Tensor, patch_size: int) -> None:
    """Raises ValueError unless ids is [B, a multiple of patch_size] int64."""
    check_tensor(name, ids)
    shape = list(ids.shape)
    whole = len(shape) == 2 and shape[1] % patch_size == 0
    check(whole, name, f"whole patches, shape [B, P x {patch_size}]", shape)
    check_int64(name, ids)


def check_linear(
    name: str, weights: LinearWeights, outputs: int | None, inputs: int | None
) -> None:
    """Raises ValueError unless the map takes `inputs` to `outputs` features; None is any."""
    weight, bias = weights
    if bias is not None and weight.shape == (outputs, inputs) and bias.shape == (outputs,):
        return  # spares making names
    check_shape(f"{name}.weight", weight, out=outputs, **{"in": inputs})
    check_shape(f"{name}.bias", bias, out=weight.shape[0])


def check_mlp(name: str, weights: MlpWeights, hidden_size: int) -> None:
    """Raises ValueError unless the weights are those of a gated MLP on `hidden_size` features."""
    check_shape(f"{name}.norm", weights.norm, H=hidden_size)
    check_shape(f"{name}.gate", weights.gate, I=None, H=hidden_size)
    check_shape(f"{name}.up", weights.up, I=weights.gate.shape[0], H=hidden_size)
    check_shape(f"{name}.down", weights.down, H=hidden_size, I=weights.gate.shape[0])


def check_types(
    like: str, tensor: Tensor, weights: EncoderWeights | FoldedEncoderWeights | DecoderWeights
) -> None:
    """Raises ValueError unless the tensor, called `like`, is of a floating-point type and matrices
    and biases are of the same, which under autocast they need not be. Norms may be of another."""
    dtype = tensor.dtype
    if not dtype.is_floating_point:
        check_float(like, tensor)
    for part in weights:  # written out, as every call looks at them all
        fits = True
        if isinstance(part, LinearWeights):
            fits = part[0].dtype == dtype and part[1].dtype == dtype
        elif isinstance(part, list | tuple):
            for _, gate, up, down in part:
                if gate.dtype != dtype or up.dtype != dtype or down.dtype != dtype:
                    fits = False
        if not fits:
            _check_matrices(like, tensor, weights)
    if isinstance(weights, DecoderWeights) and weights.vocabulary.dtype != dtype:
        _check_matrices(like, tensor, weights)


def _check_matrices(like: str, tensor: Tensor, weights: Any) -> None:
    """The same as `check_types`, one by one."""
    for name, part in zip(weights._fields, weights, strict=True):
        matrices = []
        if isinstance(part, LinearWeights):
            matrices = [*part]
        elif name == "vocabulary":
            matrices = [part]
        elif name.endswith("_layers"):
            matrices = [matrix for layer in part for matrix in layer[1:]]
        for matrix in matrices:
            fits = matrix.dtype == tensor.dtype or _casts(tensor, matrix)
            check(fits, f"weights.{name}", f"the type of {like}, {tensor.dtype}", matrix.dtype)


def _casts(*tensors: Tensor) -> bool:
    """Whether autocast brings these to one type."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return not wide and is_autocast_on(tensors[0].device)


def _check_kind(weights: object, *kinds: type) -> None:
    """Raises ValueError unless the weights are of one of these classes."""
    if not isinstance(weights, kinds):
        expected = f"{' or '.join(kind.__name__ for kind in kinds)} (a module's weights())"
        check(False, "weights", expected, type(weights).__name__)


def check_encoder(weights: EncoderWeights | FoldedEncoderWeights, patch_size: int) -> None:
    """Raises ValueError unless these are an encoder's weights for `patch_size` tokens."""
    _check_kind(weights, EncoderWeights, FoldedEncoderWeights)
    check(patch_size >= 1, "ids", "at least one token a patch", patch_size)
    if isinstance(weights, FoldedEncoderWeights):
        check_shape("weights.tables", weights.tables, K=patch_size, V=None, H=None)
        hidden_size = weights.tables.shape[2]
    else:
        check_shape("weights.embedding", weights.embedding, V=None, H=None)
        hidden_size = weights.embedding.shape[1]
        check_linear("weights.squeeze", weights.squeeze, hidden_size, patch_size * hidden_size)
        for layer in weights.token_layers:
            check_mlp("weights.token_layers", layer, hidden_size)
    for layer in weights.patch_layers:
        check_mlp("weights.patch_layers", layer, hidden_size)
    check_shape("weights.norm", weights.norm, H=hidden_size)
    check_linear("weights.latent", weights.latent, None, hidden_size)
    outputs = weights.latent.weight.shape[0]
    check(outputs % 2 == 0, "weights.latent", "as many means as log_stds", f"{outputs} outputs")


def check_decoder(weights: DecoderWeights, latent_size: int) -> None:
    """Raises ValueError unless these are a decoder's weights for `latent_size` numbers."""
    _check_kind(weights, DecoderWeights)
    check_shape("weights.vocabulary", weights.vocabulary, V=None, H=None)
    some = weights.vocabulary.numel() > 0
    check(some, "weights.vocabulary", "V and H of 1 or more", list(weights.vocabulary.shape))
    hidden_size = weights.vocabulary.shape[1]
    check_linear("weights.latent", weights.latent, hidden_size, latent_size)
    for layer in weights.patch_layers:
        check_mlp("weights.patch_layers", layer, hidden_size)
    check_linear("weights.expand", weights.expand, None, hidden_size)
    whole = weights.expand.weight.shape[0] % hidden_size == 0
    check(whole, "weights.expand", f"K x H={hidden_size} outputs", weights.expand.weight.shape[0])
    for layer in weights.token_layers:
        check_mlp("weights.token_layers", layer, hidden_size)
    check_shape("weights.norm", weights.norm, H=hidden_size)


def check_head(weights: HeadWeights, hidden_size: int) -> None:
    """Raises ValueError unless these are an energy head's weights for `hidden_size` features."""
    _check_kind(weights, HeadWeights)
    check_linear("weights.noise", weights.noise, hidden_size, None)
    check_linear("weights.hidden", weights.hidden, hidden_size, hidden_size)
    for name in ("noise_norm", "hidden_norm", "final_norm"):
        norm = getattr(weights, name)
        check_shape(f"weights.{name}.weight", norm.weight, H=hidden_size)
        check_shape(f"weights.{name}.bias", norm.bias, H=hidden_size)
    for block in weights.blocks:
        check_shape("weights.blocks.norm.weight", block.norm.weight, H=hidden_size)
        check_shape("weights.blocks.norm.bias", block.norm.bias, H=hidden_size)
        check_linear("weights.blocks.first", block.first, hidden_size, 2 * hidden_size)
        check_linear("weights.blocks.second", block.second, hidden_size, hidden_size)
        check_linear("weights.blocks.third", block.third, 2 * hidden_size, hidden_size)
        check_linear("weights.blocks.down", block.down, hidden_size, hidden_size)
    check_linear("weights.final_first", weights.final_first, hidden_size, hidden_size)
    check_linear("weights.final_second", weights.final_second, None, hidden_size)


def check_seed(seed: int | Tensor) -> int:
    """The seed, which may be a [] tensor too, as an int; raises ValueError beyond 64 bits."""
    return check_int("seed", seed, -(2**63), MOST_INT)


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as a [] int64 tensor.

    seed: a Python int of 64 bits, or a [] int64 tensor on the device. Under `torch.compile` and in
        CUDA graphs pass a tensor: an int would be compiled in.
    """
    if isinstance(seed, Tensor):
        if not _is_int64(seed, (), device):
            check_shape("seed", seed)
            check_int64("seed", seed)
            check_device(device, seed=seed)
        return seed
    if not isinstance(seed, int):
        try:
            seed = operator.index(seed)
        except TypeError:
            expected = "an int or a [] int64 tensor"
            raise ValueError(f"seed: expected {expected}, got {seed!r}") from None
    if not torch.compiler.is_compiling():
        check(-(2**63) <= seed < 2**63, "seed", "an int of 64 bits, -2^63 to 2^63 - 1", seed)
    return _remembered(_seed_tensor, seed, device)


def seed_and_rows(
    seed: int | Tensor, rows: Tensor | None, num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The two arguments of randomness as tensors.

    seed: see as_seed.
    rows: [R] int64, logical row ids, on the device; None for 0 .. R-1.
    returns: [] int64, [R] int64.
    """
    if rows is None:
        few = not torch.compiler.is_compiling() and num_rows <= MOST_REMEMBERED
        rows = _remembered(_first_rows, num_rows, device) if few else _first_rows(num_rows, device)
    elif not isinstance(rows, Tensor) or not _is_int64(rows, (num_rows,), device):
        check_shape("rows", rows, R=num_rows)
        check_int64("rows", rows)
        check_device(device, rows=rows)
    return as_seed(seed, device), rows


def _remembered(make: Callable, value: int, device: torch.device) -> Tensor:
    """make(value, device), the same tensor as in an earlier call where nothing can tell: making
    one takes a microsecond, of 3 to 9 that an op of few rows takes."""
    if device != CPU or torch.compiler.is_compiling():
        return make(value, device)
    # a mode may make a fake tensor, and a transform of torch.func one that it follows
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack():
        return make(value, device)
    return _on_host(make, value)


@functools.lru_cache(maxsize=64)
def _on_host(make: Callable, value: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor of that mode could not be saved for a backward
        return make(value, CPU)


def _seed_tensor(seed: int, device: torch.device) -> Tensor:
    return torch.full((), seed, dtype=torch.int64, device=device)


def _first_rows(num_rows: int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, device=device)


def _is_int64(tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether the three checks of a tensor pass, at a third of what they take (1 us)."""
    return tensor.dtype == torch.int64 and tensor.shape == shape and tensor.device == device


def may_look(tensor: Tensor) -> bool:
    """Whether values can be read for free: no wait for a device, no break of a compiled graph."""
    on_host = type(tensor) is Tensor and tensor.device.type == "cpu"  # a fake tensor has no values
    if not on_host or torch.compiler.is_compiling():
        return False
    transformed = peek_interpreter_stack() is not None  # vmap has several
    return tensor.numel() > 0 and not transformed


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises IndexError for an id outside the vocabulary; looks only where that is free.

    Elsewhere `reference.embed` and the kernels make NaN of such an id.
    """
    if not may_look(ids):
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise IndexError(f"{name}: expected token ids in [0, {vocab_size}), got {wrong}")
