"""Which backend serves which op on this machine, or the reason why it does not.

All kernels stand in torch's dispatcher, so that torch.compile and tracers see a call as one opaque node: those of the native
library and of `cpu/` as ``torch.ops.freedave.*``, Triton's as ``torch.ops.freedave_triton.*``. (The reference is plain
PyTorch, which they see through.)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from freedave_kernels import _library, triton
from freedave_kernels.contract import MAX_DRAFTS, MAX_LENGTH, MAX_POOL_STATES, OPS, BackendUnavailableError

Kernel = Callable[..., Any]  # takes every argument of the op's signature by position

# "cuda_emulated", the CUDA kernels executed on CPU tensors, exists where tests have built it.
BACKENDS = ("reference", "cpu", "triton", "cuda", *(("cuda_emulated",) if _library.EMULATED_PATH else ()))

# What a block of threads holds, in the order in which `window` of an op says what a call needs.
SERVED = (
    (MAX_LENGTH, f"windows of at most {MAX_LENGTH} positions"),
    (MAX_DRAFTS, f"at most {MAX_DRAFTS} drafts"),
    (MAX_POOL_STATES, f"pools of at most {MAX_POOL_STATES} states"),
)

# The backends for tensors on a device, the best one first.
BEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "reference")}

_python_ops = torch.library.Library("freedave", "FRAGMENT")
_fakes: dict[str, Kernel] = {}
_windows: dict[str, Callable[..., tuple[int, ...]]] = {}


def backends_with(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for `op`, whether or not they can run on this machine."""
    has = {*OPS[op].native, *OPS[op].python, *(("cuda_emulated",) if "cuda" in OPS[op].native else ())}
    return tuple(backend for backend in BACKENDS if backend in has)


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return triton.unavailable()
    if _library.LOAD_ERROR is not None:
        return f"the native library {_library.PATH} did not load ({_library.LOAD_ERROR}); rebuild with `pip install .`"
    if backend == "cuda_emulated" and _library.EMULATED_LOAD_ERROR is not None:
        return f"{_library.EMULATED_PATH} did not load ({_library.EMULATED_LOAD_ERROR}); rebuild it with `make simt`"
    if backend == "cuda" and torch.version.hip is not None:
        return "the CUDA kernels do not run on ROCm; use 'triton'"
    if backend == "cuda" and not CUDA_KERNELS:
        return (
            "the native library was built without CUDA kernels; rebuild it where nvcc is on PATH, with FREEDAVE_CUDA=on"
        )
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver and that torch is a CUDA build"
    return None


def expect_available(backend: str) -> None:
    reason = unavailable(backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} is not available: {reason}") from _library.LOAD_ERROR


def _has_cuda_kernels() -> bool:
    if _library.LOAD_ERROR is not None or torch.version.hip is not None:
        return False
    ops = [op for op, rooms in OPS.items() if "cuda" in rooms.native]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"freedave::{op}", "CUDA") for op in ops)


CUDA_KERNELS = _has_cuda_kernels()  # whether the native library has kernels for CUDA tensors


def add(op: str, fake: Kernel, window: Callable[..., tuple[int, ...]] | None) -> None:
    """Registers what `ops/<op>.py` knows of its kernels, whichever they are: the shapes of their results (`fake`), and, of
    those that hold a window in a block of threads, its length, the number of drafts and that of a pool's states. Both take
    what the kernels take.
    """
    rooms = OPS[op]
    _fakes[op] = fake = _on_one_device(op, fake)
    if window is not None:
        _windows[op] = window
    if not rooms.native:
        _python_ops.define(op + torch.library.infer_schema(fake, mutates_args=rooms.written))
    elif _library.LOAD_ERROR is not None:
        return
    for backend, key in (("cpu", "CPU"), ("triton", "CUDA")):
        if backend in rooms.python and key.lower() not in rooms.native:
            _python_ops.impl(op, _imported_when_called(backend, op), key)
    torch.library.register_fake(f"freedave::{op}", fake, lib=_python_ops)


def _on_one_device(op: str, fake: Kernel) -> Kernel:
    """One meta tensor among others is enough for torch to choose the fake kernel, which would make results of anything."""

    @functools.wraps(fake)
    def on_one_device(*arguments: Any, **named: Any) -> Any:
        devices = {value.device for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{op}: the tensors must be on one device, got {sorted(map(str, devices))}")
        return fake(*arguments, **named)

    return on_one_device


def _python_kernel(backend: str, op: str) -> Kernel:
    function: Kernel = getattr(importlib.import_module(f"freedave_kernels.{backend}.{op}"), op)
    return function


def _imported_when_called(backend: str, op: str) -> Kernel:
    """Importing an op imports neither Triton nor what composes it on a CPU."""
    found = functools.cache(lambda: _python_kernel(backend, op))
    return lambda *arguments: found()(*arguments)  # (the dispatcher leaves out trailing defaults)


@functools.cache
def kernel(op: str, backend: str, device_type: str) -> Kernel:
    """The function of `backend` that computes `op` for tensors on a device of this type.

    Raises:
        BackendUnavailableError: the backend cannot run here, lacks the op, or serves another device; with what to do.
    """
    expect_available(backend)
    able = backends_with(op)
    if backend not in able:
        raise BackendUnavailableError(f"backend {backend!r} has no {op}; {', '.join(map(repr, able))} have it")
    if backend == "reference":
        return _python_kernel(backend, op)
    serves, found = _on_triton(op) if backend == "triton" else _native(op, backend)
    if device_type != serves:
        raise BackendUnavailableError(
            f"backend {backend!r} serves {serves} tensors, but {op} was given a tensor on {device_type}; move it there, "
            "or use a backend for that device (available_backends() lists them)"
        )
    return found


def _on_triton(op: str) -> tuple[str, Kernel]:
    registration = importlib.import_module("freedave_kernels.triton.registration")  # imports Triton
    return registration.DEVICE, registration.register(op, _python_kernel("triton", op), _fakes[op], OPS[op].written)


def _native(op: str, backend: str) -> tuple[str, Kernel]:
    """In torch's dispatcher, `cpu/` stands beside the native library's kernels."""
    emulated = backend == "cuda_emulated"
    overload = getattr(torch.ops.freedave_emulated if emulated else torch.ops.freedave, op).default
    within = _within_limits(op, backend, overload) if backend != "cpu" and op in _windows else overload
    return "cpu" if emulated else backend, within


def _within_limits(op: str, backend: str, overload: Kernel) -> Kernel:
    window = _windows[op]

    def run(*call: Any) -> Any:
        for given, (most, served) in zip(window(*call), SERVED, strict=False):
            if given > most:
                raise BackendUnavailableError(
                    f"{OPS[op].called_by or op}: backend {backend!r} serves {served}, got {given}; use the backend "
                    "'reference' for this call"
                )
        return overload(*call)

    return run


@functools.cache
def best(op: str, device_type: str) -> str:
    """The backend that serves `op` for tensors on a device where none is forced: native kernels where they exist, else
    Triton's on a GPU, else the reference. Where the only one for a device cannot run, it is named all the same, and a call
    raises: a broken build must not turn into a slow decode.
    """
    able = [name for name in BEST_FIRST.get(device_type, ("reference",)) if name in backends_with(op)]
    return next((name for name in able if unavailable(name) is None), able[0])
