"""Accelerated runtime for Continuous Autoregressive Language Models (CALM, arXiv 2510.27688)."""

from . import ops, reference
from ._native import NativeUnavailable, backend
from .environment import info

__version__ = "0.1.0"
__all__ = ["NativeUnavailable", "backend", "info", "ops", "reference"]
