"""Registers the Triton ops as `torch.ops.freedave_triton.*`, so that torch.compile takes each as one opaque call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from freedave_kernels.python_ops import WRITTEN
from freedave_kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"  # torch calls ROCm devices "cuda" as well

_library = torch.library.Library("freedave_triton", "DEF")


def register(op: str) -> Callable[..., Any]:
    """Registers an op, with the launcher's signature and the fake kernel that every backend shares, and returns a function
    that calls it. Plain tensors, when nothing is traced, skip torch's dispatcher, which has nothing to add.
    """
    launcher = getattr(importlib.import_module(f"freedave_kernels.triton.{op}"), op)
    fake = importlib.import_module(f"freedave_kernels.ops.{op}").fake
    _library.define(op + torch.library.infer_schema(launcher, mutates_args=WRITTEN.get(op, ())))
    _library.impl(op, launcher, DEVICE.upper())
    torch.library.register_fake(f"freedave_triton::{op}", fake, lib=_library)
    overload = getattr(torch.ops.freedave_triton, op).default

    def call(first: torch.Tensor, *arguments: Any) -> Any:
        if is_compiling() or type(first) is not torch.Tensor:
            return overload(first, *arguments)
        return launcher(first, *arguments)

    return call
