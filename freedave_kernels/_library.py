"""Loads the native ops library once, and keeps the reason when it cannot be loaded.

The library registers ``torch.ops.freedave.*`` and has no Python symbols, so it is loaded by torch rather than imported.
``FREEDAVE_LIBRARY=/path/to/libfreedave_ops.so`` loads another build of it (a sanitizer build, say).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

PATH = Path(os.environ.get("FREEDAVE_LIBRARY") or Path(__file__).with_name("libfreedave_ops.so"))

OPS = (
    "predict_tokens",
    "partial_predictions",
    "merge_predictions",
    "rank_positions",
    "select_transfer",
    "build_drafts",
    "verify_drafts",
    "draft_step",
)


LOAD_ERROR: Exception | None = None
try:
    torch.ops.load_library(str(PATH))
except (ImportError, OSError, RuntimeError) as error:
    LOAD_ERROR = error

# Tests execute the CUDA kernels on CPU tensors, through a second library that registers ``torch.ops.freedave_emulated.*``.
EMULATED_PATH = os.environ.get("FREEDAVE_EMULATED_LIBRARY")
EMULATED_LOAD_ERROR: Exception | None = None
if EMULATED_PATH:
    try:
        torch.ops.load_library(EMULATED_PATH)
    except (OSError, RuntimeError) as error:
        EMULATED_LOAD_ERROR = error

try:
    VERSION = metadata.version("freedave-kernels")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    VERSION = "0+uninstalled"


def native_op(name: str) -> Callable[..., Any]:
    """What serves op `name` natively, all arguments by position; without the library, it raises what kept it from loading.

    It is what ``torch.ops.freedave.<name>`` calls, which takes as much time as a small tensor takes to make. torch.compile
    cannot see into it: `runs_native` keeps the two apart.
    """
    if LOAD_ERROR is None:
        return getattr(torch.ops.freedave, name).default._op

    def missing(*_: Any) -> Any:
        from freedave_kernels import backends

        return backends.implementation("cpu")

    return missing


def register_fake(name: str) -> Callable[[F], F]:
    """Registers the decorated function as the shape-only kernel of ``torch.ops.freedave.<name>`` (if that exists).

    One meta tensor among others is enough to be sent there, and would make results of anything: refused.
    """

    def register(function: F) -> F:
        @functools.wraps(function)
        def on_one_device(*arguments: Any, **named: Any) -> Any:
            devices = {value.device for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: the tensors must be on one device, got {sorted(map(str, devices))}")
            return function(*arguments, **named)

        if LOAD_ERROR is None:
            torch.library.register_fake(f"freedave::{name}")(on_one_device)
        return function

    return register
