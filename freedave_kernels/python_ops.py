"""Ops of `torch.ops.freedave` that the native library does not have: Python on a CPU, Triton on a GPU.

They stand in the dispatcher beside the native ones, so that torch.compile takes a call as one opaque node.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

PYTHON_OPS = ("draft_attention", "keep")
# The arguments that an op writes to; all others leave theirs alone.
WRITTEN = {"keep": ("stored_key", "stored_value")}
# The backends that have them.
SERVED_BY = ("reference", "cpu", "triton")

_library = torch.library.Library("freedave", "FRAGMENT")


def define(op: str, schema: str) -> Callable[[F], F]:
    """Defines `torch.ops.freedave.<op>`; the decorated function is its shape-only kernel.

    The kernels are `freedave_kernels.cpu.<op>.<op>` and `freedave_kernels.triton.<op>.<op>`, imported when first called.
    """
    _library.define(op + schema)
    for folder, key in (("cpu", "CPU"), ("triton", "CUDA")):
        _library.impl(op, _imported(f"freedave_kernels.{folder}.{op}", op), key)

    def decorate(fake: F) -> F:
        torch.library.register_fake(f"freedave::{op}", fake, lib=_library)
        return fake

    return decorate


def _imported(module: str, op: str) -> Callable[..., Any]:
    """The function `op` of a module, which is imported by the first call. (The dispatcher leaves out trailing defaults.)"""
    functions: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not functions:
            functions.append(getattr(importlib.import_module(module), op))
        return functions[0](*arguments)

    return call
