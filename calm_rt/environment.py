"""What runs where on this machine, and why: the report behind `calm-rt info`."""

import importlib
import os
import platform
from typing import Any

import torch

from . import _native, ops


def kernel_dtypes(op: str) -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes that the op's kernels take, by device type; empty for an op without kernels."""
    return getattr(importlib.import_module(f"calm_rt.ops.{op}"), "DTYPES", {})


def info() -> dict[str, Any]:
    """The environment, the build, and for each op and device "native" or the reason it is not.

    returns: {"calm_rt", "python", "torch", "platform", "threads", "cpu_isa_override", "devices",
        "backend", "build", "ops": {op: {device: "native" or "reference: reason"}}}; every value is
        a str, int, list or dict, so json.dumps takes it.
    """
    import calm_rt  # the version stands in the package, which imports this file

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "calm_rt": calm_rt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_isa_override": os.environ.get("CALM_RT_CPU_ISA", ""),
        "devices": [_device_name(device) for device in devices],
        "backend": _native.chosen_backend(),
        "build": _native.build_info() or {"missing": _native.load_error()},
        "ops": {op: {kind: _route(op, kind) for kind in ("cpu", "cuda")} for op in ops.__all__},
    }


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"cpu {platform.processor() or platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} {torch.cuda.get_device_name(device)} sm_{major}{minor}"


def _route(op: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "reference: no CUDA device here"
    dtypes = kernel_dtypes(op)
    first = dtypes.get(device, (torch.float32,))[0]  # float32, or int64 for an op on ids
    reason = _native.why_reference(op, device, first, dtypes)
    return "native" if reason is None else f"reference: {reason}"
