"""Registers the Triton ops as `torch.ops.freedave_triton.*`, so that torch.compile takes each as one opaque call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from freedave_kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"  # torch calls ROCm devices "cuda" as well

_library = torch.library.Library("freedave_triton", "DEF")
_overloads: dict[str, Callable[..., Any]] = {}
_lock = threading.Lock()  # an op can be defined once, and threads may ask for it at the same time


def register(
    op: str, launcher: Callable[..., Any], fake: Callable[..., Any], written: tuple[str, ...]
) -> Callable[..., Any]:
    """The op, with the launcher's signature and the fake kernel that every backend shares; `written`: what it writes to."""
    with _lock:
        if op not in _overloads:
            _library.define(op + torch.library.infer_schema(launcher, mutates_args=written))
            _library.impl(op, launcher, DEVICE.upper())
            torch.library.register_fake(f"freedave_triton::{op}", fake, lib=_library)
            _overloads[op] = getattr(torch.ops.freedave_triton, op).default
        return _overloads[op]
