"""The compiled extension: is it there, which ops does it hold, and may a call use it."""

import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

BACKENDS = ("auto", "native", "reference")
FLOATS = {  # the dtypes that the kernels of most ops take, by device type
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_CAPABILITY = (8, 0)  # of the GPUs that the kernels are compiled for

_backend = "auto"
_load_error: str | None = None
_has_cuda = False  # whether the extension holds CUDA kernels; compiled code cannot ask an op
_registered: set[str] = set()  # ops that the extension holds
_differentiable: set[str] = set()  # those of them that have a gradient


class NativeUnavailable(RuntimeError):
    """A call under backend("native") would have fallen back to the reference."""


def _load() -> str | None:
    """Load calm_rt._C; return why that was impossible, or None."""
    spec = importlib.util.find_spec("calm_rt._C")
    if spec is None:
        return "the extension calm_rt._C is not built (a C++ compiler at installation builds it)"
    try:
        import calm_rt._C  # noqa: F401
    except ImportError as error:
        reason = (
            f"the extension calm_rt._C, built against torch {_built_against(spec.origin)}, "
            f"does not load in torch {torch.__version__}: {error}"
        )
        warnings.warn(f"calm_rt: {reason}; reinstall calm_rt. Using the reference.", stacklevel=2)
        return reason
    return None


def _built_against(library: str) -> str:
    """The torch version that stands in the build info inside a library that cannot be loaded."""
    match = re.search(rb"built_against_torch=(\S+)", Path(library).read_bytes())
    return match[1].decode() if match else "of an unknown version"


def loaded() -> bool:
    return _load_error is None


def load_error() -> str | None:
    """Why the extension could not be loaded; None where it was."""
    return _load_error


def chosen_backend() -> str:
    return _backend


def register(
    op: str,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Give the extension's op its fake kernel and its gradient; nothing where it has no such op."""
    if not loaded() or not hasattr(torch.ops.calm_rt, op):
        return
    torch.library.register_fake(f"calm_rt::{op}", fake)
    if backward is not None:
        torch.library.register_autograd(f"calm_rt::{op}", backward, setup_context=setup_context)
        _differentiable.add(op)
    _registered.add(op)


def build_info() -> dict[str, str]:
    """What the extension was built from and with; empty without it."""
    if not loaded():
        return {}
    lines = torch.ops.calm_rt.build_info().splitlines()
    return dict(line.split("=", 1) for line in lines)


def _check_environment() -> None:
    """Warn where a variable asks for what this processor or this build does not have."""
    expected = {
        "CALM_RT_CPU_ISA": ("isa", "portable, avx2, avx512 or amx, one that this processor has"),
        "CALM_RT_CPU_PRODUCTS": ("products", "own, few or library"),
        "CALM_RT_CUDA_ARGMAX": ("cuda_argmax", "own or library"),
    }
    for name, (key, allowed) in expected.items():
        wanted, used = os.environ.get(name), build_info().get(key)
        if wanted and used and wanted != used:
            warnings.warn(
                f"calm_rt: {name}: expected {allowed}, got {wanted!r}. Using {used}.", stacklevel=2
            )


def why_reference(
    op: str, device: str, dtype: torch.dtype, dtypes: dict[str, tuple], index: int = 0
) -> str | None:
    """Why `op` on this device and dtype runs the reference; None where it runs a kernel.

    dtypes: the dtypes that the op's kernels take, by device type.
    index: of the device among those of its type.
    """
    if _backend == "reference":
        return 'backend("reference") is chosen'
    if _load_error is not None:
        return _load_error
    if op not in _registered:
        return f"the extension is older than this package and lacks {op}; reinstall calm_rt"
    if device not in dtypes:
        return f"{op} has no kernel for {device} tensors"
    if device == "cuda":
        if not _has_cuda:
            return "the extension was built without CUDA (CALM_RT_CUDA=ON builds it with nvcc)"
        too_old = _why_too_old(index)
        if too_old is not None:
            return too_old
    if dtype not in dtypes[device]:
        return f"{op} has no kernel for {dtype} on {device}"
    return None


def _why_transformed(op: str) -> str | None:
    """Why a kernel and its gradient are not enough here; None where they are."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return f"{op} has no kernel for tangents (forward-mode differentiation)"
    if peek_interpreter_stack() is not None:
        return f"{op} has no kernel for torch.func's transforms"
    return None


def _why_too_old(index: int) -> str | None:
    """Why the kernels do not run on this GPU; None where they do."""
    capability = _capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    have, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"the GPU has compute capability {have}, and the kernels need {need} or newer"


# What torch.compiler.assume_constant_result sets: dynamo calls the function instead of tracing it,
# which would end the graph. The decorator itself imports dynamo, for a second.
_why_too_old._dynamo_marked_constant = True


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def use_native(op: str, tensor: Tensor, dtype: torch.dtype, dtypes: dict[str, tuple]) -> bool:
    """Whether `op` runs its kernel on the tensor's device; backend("native") raises where not."""
    device = "cpu" if tensor.is_cpu else tensor.device.type  # asking for the type takes 0.4 us
    index = tensor.device.index or 0 if device == "cuda" else 0
    reason = why_reference(op, device, dtype, dtypes, index) or _why_transformed(op)
    if reason is not None and _backend == "native":
        raise NativeUnavailable(f'{op}: backend("native") is chosen, but {reason}')
    return reason is None


def call(op: str, *arguments: Any) -> Any:
    """What the extension's op returns.

    Where nothing asks for gradients a kernel that has one is called below torch's autograd layer,
    which would look through all arguments in Python (up to 0.1 ms) to come to the same.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.calm_rt, op).default(*arguments)
    if op not in _differentiable or torch.is_grad_enabled():
        return _dispatched(op)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _dispatched(op)(*arguments)


def call_reference(function: Callable, *arguments: Any) -> Any:
    """What the op's reference returns; a profiler shows it under the op's name, as the kernel."""
    if torch.compiler.is_compiling():  # a range would end the graph
        return function(*arguments)
    with torch.profiler.record_function(f"calm_rt::{function.__name__}"):
        return function(*arguments)


@functools.cache
def _dispatched(op: str) -> Callable:
    """torch's dispatcher for this op, without the Python around it (0.8 us a call)."""
    return getattr(torch.ops.calm_rt, op).default._op


class backend:
    """How ops run: "auto" (kernels where they exist), "native" (never fall back), "reference".

    As a statement, `calm_rt.backend("native")`, it stays in force; in a `with` it ends there. All
    threads of the process share it.
    raises: ValueError for another name.
    """

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
        self._name = name
        self._choose()

    def _choose(self) -> None:
        global _backend
        self._previous, _backend, self._in_force = _backend, self._name, True

    def __enter__(self) -> "backend":
        if not self._in_force:  # a second time
            self._choose()
        return self

    def __exit__(self, *_: Any) -> None:
        global _backend
        _backend, self._in_force = self._previous, False


_load_error = _load()
_has_cuda = _load_error is None and torch.ops.calm_rt.has_cuda()
_check_environment()
