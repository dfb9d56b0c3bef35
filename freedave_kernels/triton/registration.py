"""Registers the Triton ops as `torch.ops.freedave_triton.*`, so that torch.compile takes each as one opaque call."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from freedave_kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"  # torch calls ROCm devices "cuda" as well

_library = torch.library.Library("freedave_triton", "DEF")


def register(op: str) -> Any:
    """The overload of a newly registered op: the launcher's signature, the fake kernel that every backend shares."""
    launcher = getattr(importlib.import_module(f"freedave_kernels.triton.{op}"), op)
    fake = importlib.import_module(f"freedave_kernels.ops.{op}").fake
    _library.define(op + torch.library.infer_schema(launcher, mutates_args=()))
    _library.impl(op, launcher, DEVICE.upper())
    torch.library.register_fake(f"freedave_triton::{op}", fake, lib=_library)
    return getattr(torch.ops.freedave_triton, op).default
