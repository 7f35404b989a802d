"""Which row of a matrix has the largest product with a vector: the most probable token."""

import torch
from torch import Tensor

from calm_rt import _native, reference
from calm_rt.ops.check import (
    alike,
    check,
    check_device,
    check_float,
    check_int64,
    check_shape,
    check_tensor,
)

DTYPES = _native.FLOATS
SCREENED = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 32768  # kLongestScreened of csrc/kernels/linear_argmax.h


def linear_argmax(
    hidden: Tensor, weight: Tensor, screen: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """id[r] = argmax_v <hidden_r, weight_v>, ties to the lowest id.

    hidden: [R, H].
    weight: [V, H], V at least 1.
    screen: what `screen_vocabulary` made of this weight, which then need not be read; the ids are
        the same with it and without. None to round the weight in passing.
    count: [] int64 on hidden's device: only the first so many rows are wanted, the others get
        -1, without a look by the host. Kernels spare them, but for the library's products on a GPU
        (H no multiple of 8). None for all.
    returns: [R] int64; no gradient. The kernel's scores are sums in double of products that are
        exact but for float64, on every device; the reference's are rounded to the inputs' type.
    memory: no [R, V] logits; on the CPU no score at all, [R, H] of 8-bit numbers; on a GPU one
        bound for each 64 entries where H is a multiple of 8, otherwise a block of scores.
    raises: ValueError for other shapes, types or devices.
    source: the argmax in the official CALM.temperature_sampling.
    """
    check_shape("hidden", hidden, R=None, H=None)
    check_shape("weight", weight, V=None, H=hidden.shape[1])
    check(weight.shape[0] >= 1, "weight", "at least one row", weight.shape)
    if not alike(hidden, weight):
        check_float("hidden", hidden)
        check_float("weight", weight)
        check_device(hidden.device, weight=weight)
    if screen is not None:
        check_screen("screen", screen)
    if count is not None:
        check_shape("count", count)
        check_int64("count", count)
        check_device(hidden.device, count=count)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    if not _native.use_native("linear_argmax", hidden, dtype, DTYPES):
        ids = _native.call_reference(reference.linear_argmax, hidden, weight)
        if count is None:
            return ids
        return torch.where(torch.arange(len(ids), device=ids.device) < count, ids, -1)
    return _native.call("linear_argmax", hidden, weight, usable_screen(screen, dtype), count)


def screen_vocabulary(weight: Tensor) -> Tensor | None:
    """The weight of `linear_argmax` rounded to whole numbers once, for a weight that stays.

    A call with few rows takes the time of reading the weight; with its screen, a quarter of that
    in float32. Make it anew when the weight changes: it is not looked at again.

    weight: [V, H] on the CPU.
    returns: [panels, bytes] int8, in the layout of this processor (not to be saved), V x H bytes
        (twice as many without AVX-512 VNNI); None where no kernel takes one: for float64, above
        H = 32,768, on a GPU, in compiled code and without the extension.
    raises: ValueError for another shape or type.
    """
    check_shape("weight", weight, V=None, H=None)
    check(weight.shape[0] >= 1, "weight", "at least one row", list(weight.shape))
    check_float("weight", weight)
    taken = weight.device.type == "cpu" and weight.dtype in SCREENED and weight.shape[1] <= LONGEST
    taken = taken and not torch.compiler.is_compiling()  # as of Decoder, which then uses none
    if not taken or not _native.use_native("linear_argmax", weight, weight.dtype, DTYPES):
        return None
    return _native.call("screen_vocabulary", weight.detach())


def check_screen(name: str, screen: Tensor) -> None:
    """Raises ValueError unless `screen_vocabulary` may have made it; the kernel compares sizes."""
    check_tensor(name, screen)
    fits = screen.ndim == 2 and screen.dtype == torch.int8 and screen.device.type == "cpu"
    expected = "what screen_vocabulary makes of the weight, [panels, bytes] int8 on the CPU"
    check(fits, name, expected, f"{list(screen.shape)} {screen.dtype} on {screen.device}")


def usable_screen(screen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The screen, where rows of this type can be screened."""
    return screen if dtype in SCREENED else None


def _fake(hidden, weight, screen, count=None):
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


_native.register("linear_argmax", _fake)
