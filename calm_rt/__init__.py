"""Accelerated runtime for Continuous Autoregressive Language Models (CALM, arXiv 2510.27688).

`import calm_rt` brings the ops, which need torch only; the rest of the public surface is imported
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops, reference
from ._native import NativeUnavailable, backend
from .environment import info

if TYPE_CHECKING:  # what __getattr__ gives
    from . import nn
    from .checkpoint import load, save
    from .data import load_tokenizer
    from .evaluation import brier_lm
    from .generation import Generator
    from .patching import patch, unpatch
    from .sequence import GenerationError

__version__ = "0.1.0"

_LAZY = {
    "GenerationError": "sequence",
    "Generator": "generation",
    "brier_lm": "evaluation",
    "load": "checkpoint",
    "load_tokenizer": "data",
    "nn": "nn",
    "patch": "patching",
    "save": "checkpoint",
    "unpatch": "patching",
}

__all__ = [  # a literal, which type checkers read
    "GenerationError",
    "Generator",
    "NativeUnavailable",
    "backend",
    "brier_lm",
    "info",
    "load",
    "load_tokenizer",
    "nn",
    "ops",
    "patch",
    "reference",
    "save",
    "unpatch",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value
