"""Integers and token ids as callers have them: Python's, NumPy's, a tensor's."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

from freedave_kernels.arguments import expect_int

LARGEST = 2**63 - 1  # of int64, in which tensors hold it


def as_int(caller: str, name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int of at least `minimum` that int64 holds; raises TypeError or ValueError naming the argument."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # `expect_int` below refuses it, and names its type
            value = operator.index(value)
    expect_int(caller, name, value, minimum)
    if value > LARGEST:
        raise ValueError(f"{caller}: {name} must be at most {LARGEST}, got {value}")
    return int(value)


def as_token_ids(token_ids: SupportsIndex | Iterable[SupportsIndex] | None) -> tuple[int, ...]:
    """One id, several or none, as a tuple; any integral numbers, those of numpy and torch too.

    Raises:
        TypeError: what is not one.
    """
    if token_ids is None:
        return ()
    if isinstance(token_ids, Iterable) and not isinstance(token_ids, str) and getattr(token_ids, "ndim", None) != 0:
        return tuple(map(as_token_id, token_ids))
    return (as_token_id(token_ids),)


def as_token_id(value: Any) -> int:
    """One id; raises TypeError for what is none, booleans included."""
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"a token id must be an integer, got {value!r} ({type(value).__name__})") from None
