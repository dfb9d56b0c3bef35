"""Integers as callers have them: Python's, NumPy's, a tensor's."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

from freedave_kernels.arguments import expect_int

LARGEST = 2**63 - 1  # what tensors can be told


def as_int(caller: str, name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int of at least `minimum` that int64 holds; raises TypeError or ValueError naming the argument."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # it is refused below, by its type
            value = operator.index(value)
    expect_int(caller, name, value, minimum)
    if value > LARGEST:
        raise ValueError(f"{caller}: {name} must be at most {LARGEST}, got {value}")
    return int(value)
