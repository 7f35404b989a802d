"""The reference as the ops call it: a profiler shows its calls under the op's name, as a kernel's.

Not in reference.py, whose functions the formulas in official.py call too.
"""

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from calm_rt import reference


def name_reference(op: str, module: ModuleType) -> None:
    """From now on the op's module calls its function of the reference by name."""
    function = getattr(reference, op)

    @functools.wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # a range would end the graph
            return function(*arguments, **options)
        with torch.profiler.record_function(f"calm_rt::{op}"):
            return function(*arguments, **options)

    module.reference = SimpleNamespace(**{**vars(reference), op: named})
