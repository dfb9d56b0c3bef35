"""Integers as callers have them: Python's, NumPy's, a tensor's."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

from freedave_kernels.arguments import expect_int


def as_int(caller: str, name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int of at least `minimum`; raises TypeError or ValueError naming the argument."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # it is refused below, by its type
            value = operator.index(value)
    expect_int(caller, name, value, minimum)
    return int(value)


def as_token_ids(name: str, token_ids: Any) -> tuple[int, ...]:
    """One id, several or none, as a tuple; raises TypeError for what is neither."""
    if token_ids is None:
        return ()
    several = token_ids if isinstance(token_ids, Iterable) and not _is_number(token_ids) else [token_ids]
    try:
        return tuple(as_int("", "", token_id) for token_id in several)
    except TypeError:
        shown = repr(token_ids)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise TypeError(f"{name} must be token ids, whole numbers, got {shown}") from None


def _is_number(value: Any) -> bool:
    """Whether it is one number though it looks like several, as a tensor without dimensions does."""
    return getattr(value, "ndim", None) == 0
