"""The ops in Triton: one file each, same name. Importing this package does not import triton; importing an op does."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def unavailable() -> str | None:
    """Why these kernels cannot run on this machine, or None if they can."""
    if not _installed():
        return "triton is not installed; pip install triton==3.9.0 (CUDA and ROCm builds of torch bring their own)"
    if not interpreting() and not torch.cuda.is_available():
        return (
            "torch sees no GPU; check the driver and that torch is a CUDA or ROCm build (to try the kernels on CPU tensors, "
            "very slowly: set TRITON_INTERPRET=1 before triton is imported)"
        )
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: as `triton.jit` will read the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
