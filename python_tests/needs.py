"""What a test needs beyond the package: elsewhere it is skipped, but where CUDA must have been
compiled (in CI, or under CALM_RT_CUDA=ON) nothing may be missing."""

import os

import pytest


def need(there: object, reason: str) -> None:
    """Ends a test that lacks something: skipped, or failed where it has to run.

    reason: what is missing, and how to get it.
    """
    __tracebackhide__ = True
    if there:
        return
    if os.environ.get("CI") or os.environ.get("CALM_RT_CUDA") == "ON":
        pytest.fail(reason)
    pytest.skip(reason)
