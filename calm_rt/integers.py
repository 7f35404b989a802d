"""Whole numbers as arguments: integers of any library, and an error by name for all else."""

import operator
from typing import Any

from calm_rt.ops.check import check


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int.

    most: the largest; None for any.
    raises: ValueError for what is no integer, 2.0 and "2" included, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an int, got {value!r}") from None
    expected = f"at least {least}" if most is None else f"{least} to {most}"
    check(least <= number and (most is None or number <= most), name, expected, number)
    return number
