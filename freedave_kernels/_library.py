"""Loads the native ops library once, and keeps the reason when it cannot be loaded.

The library registers ``torch.ops.freedave.*`` and has no Python symbols, so it is loaded by torch rather than imported.
``FREEDAVE_LIBRARY=/path/to/libfreedave_ops.so`` loads another build of it (a sanitizer build, say).
"""

from __future__ import annotations

import functools
import importlib
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


def overload(op: str) -> Callable[..., Any]:
    """What ``torch.ops.freedave.<op>`` calls, which takes as much time as a small tensor takes to make."""
    return getattr(torch.ops.freedave, op).default._op


def observers() -> tuple[Callable[[], Any], ...]:
    """A call goes through torch's dispatcher while one of these returns something true: a mode, a profiler or a tracer is
    there to see it.
    """
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._is_torch_function_mode_enabled,
        torch._C._autograd._profiler_enabled,
        torch._C._get_tracing_state,
    )


def _connect() -> Exception | None:
    """Prepares calls of `_C`'s ops. Returns what this torch lacks for them: then all calls go through its dispatcher."""
    _C = importlib.import_module("freedave_kernels._C")
    try:
        _C.connect(str(PATH), torch.Tensor, {op: overload(op) for op in OPS}, observers())
    except (AttributeError, NotImplementedError) as error:
        return error
    return None


LOAD_ERROR: Exception | None = None
DIRECT_ERROR: Exception | None = None
try:
    torch.ops.load_library(str(PATH))
    DIRECT_ERROR = _connect()
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

    CPU tensors go straight to the kernels (csrc/python_calls.cpp), everything else through torch's dispatcher, as calls of
    ``torch.ops.freedave.<name>`` do. torch.compile cannot see into either: `runs_native` keeps the two apart.
    """
    if LOAD_ERROR is None:
        return overload(name) if DIRECT_ERROR else getattr(importlib.import_module("freedave_kernels._C"), name)

    def missing(*_: Any) -> Any:
        from freedave_kernels import backends

        return backends.implementation("cpu")

    return missing


def native_check(name: str) -> Callable[..., bool]:
    """A function that says whether a call's arguments, all by position, are right: in a tenth of the time that the checks in
    Python take, which explain what is wrong. False also where it cannot tell.
    """
    if LOAD_ERROR is None and DIRECT_ERROR is None:
        return getattr(importlib.import_module("freedave_kernels._C"), f"accepts_{name}")
    return lambda *_: False


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
