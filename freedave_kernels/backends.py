"""Which implementation of the ops runs, and how a user forces one.

By default the tensors' device decides. ``use_backend("reference")`` or ``FREEDAVE_BACKEND=reference`` forces one; a forced
backend that cannot serve a call raises `BackendUnavailableError` and never falls back.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

from freedave_kernels import _library, triton
from freedave_kernels.limits import beyond_limits
from freedave_kernels.python_ops import PYTHON_OPS, SERVED_BY

F = TypeVar("F", bound=Callable[..., Any])

OPS = (*_library.OPS, *PYTHON_OPS)

# "cuda_emulated", the CUDA kernels executed on CPU tensors, exists where tests have built it.
BACKENDS = ("reference", "cpu", "triton", "cuda", *(("cuda_emulated",) if _library.EMULATED_PATH else ()))
# "auto" undoes FREEDAVE_BACKEND inside a `with use_backend("auto")`.
CHOICES = (*BACKENDS, "auto")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, else the reason and the remedy."""
    return {name: unavailable(name) for name in BACKENDS}


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        return triton.unavailable()
    if _library.LOAD_ERROR is not None:
        return f"the native library {_library.PATH} did not load ({_library.LOAD_ERROR}); rebuild with `pip install .`"
    if name == "cuda_emulated" and _library.EMULATED_LOAD_ERROR is not None:
        return f"{_library.EMULATED_PATH} did not load ({_library.EMULATED_LOAD_ERROR}); rebuild it with `make simt`"
    if name == "cuda" and torch.version.hip is not None:
        return "the CUDA kernels do not run on ROCm; use 'triton'"
    if name == "cuda" and not CUDA_KERNELS:
        return (
            "the native library was built without CUDA kernels; rebuild it where nvcc is on PATH, with FREEDAVE_CUDA=on"
        )
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver and that torch is a CUDA build"
    return None


def _registered(dispatch_key: str) -> bool:
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"freedave::{op}", dispatch_key) for op in _library.OPS)


# Whether the native library has kernels for CUDA tensors.
CUDA_KERNELS = _library.LOAD_ERROR is None and torch.version.hip is None and _registered("CUDA")


class Implementation:
    """One backend's functions: `implementation.draft_step(...)` takes every argument of the op's signature by position."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "reference":
            for op in OPS:
                module = importlib.import_module(f"freedave_kernels.{name}.{op}")
                setattr(self, op, getattr(module, op))
        elif name == "triton":
            registration = importlib.import_module("freedave_kernels.triton.registration")
            for op in OPS:
                setattr(self, op, self._on_device(registration.DEVICE, op, registration.register(op)))
        else:
            for op in OPS if name in SERVED_BY else _library.OPS:
                device, library = (
                    ("cpu", torch.ops.freedave_emulated) if name == "cuda_emulated" else (name, torch.ops.freedave)
                )
                setattr(self, op, self._on_device(device, op, getattr(library, op).default))

    def _on_device(self, device: str, op: str, overload: Callable[..., Any]) -> Callable[..., Any]:
        def run(first: torch.Tensor, *arguments: Any) -> Any:
            if first.device.type != device:
                raise BackendUnavailableError(
                    f"backend {self.name!r} serves {device} tensors, but {op} was given a tensor on "
                    f"{first.device}; move it there, or use a backend for that device (available_backends() lists them)"
                )
            if self.name.startswith("cuda"):
                reason = beyond_limits(op, (first, *arguments))
                if reason is not None:
                    raise BackendUnavailableError(
                        f"{op}: backend {self.name!r} serves {reason}; use the backend 'reference' for this call"
                    )
            return overload(first, *arguments)

        return run

    def __getattr__(self, op: str) -> Callable[..., Any]:  # the functions that there are were set in __init__
        if op in OPS:
            raise BackendUnavailableError(
                f"backend {self.name!r} has no {op}; {', '.join(map(repr, SERVED_BY))} have it"
            )
        raise AttributeError(op)


def _check_name(name: str, source: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(CHOICES)}, got {name!r}")


_implementations: dict[str, Implementation] = {}


def implementation(name: str) -> Implementation:
    """The functions of backend `name`; raises `BackendUnavailableError` when it cannot run here."""
    found = _implementations.get(name)
    if found is None:
        _check_name(name, "FREEDAVE_BACKEND")
        reason = unavailable(name)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reason}") from _library.LOAD_ERROR
        found = _implementations[name] = Implementation(name)
    return found


# None: the device of the tensors decides. A wrong name in the environment is reported by the first op that runs: an
# import that fails could not be caught by programs that want to show it to a person.
_DEFAULT = os.environ.get("FREEDAVE_BACKEND") or "auto"
_forced: ContextVar[str | None] = ContextVar("freedave_backend", default=None if _DEFAULT == "auto" else _DEFAULT)


def _constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result, without importing the compiler (and Triton with it) to set a flag."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_result  # Dynamo cannot trace a ContextVar
def forced() -> str | None:
    """The backend in force, or None where the device of the tensors decides."""
    return _forced.get()


def runs_native(tensor: torch.Tensor) -> bool:
    """Whether the native library serves a call with `tensor` now, directly: nothing is forced, it has kernels for the
    device, and torch.compile, which must see an overload, is not tracing the call.
    """
    return forced() is None and (tensor.is_cpu or (CUDA_KERNELS and tensor.is_cuda)) and not is_compiling()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the `with` block on backend `name` ("reference", "cpu", "triton", "cuda", or "auto").

    Raises `ValueError` for an unknown name and `BackendUnavailableError`, with reason and remedy, for a backend that
    cannot run here. The choice belongs to the current context: other threads and tasks keep theirs, and a function that
    torch.compile has compiled keeps the backend it was compiled with.
    """
    _check_name(name, "use_backend")
    if name != "auto":
        implementation(name)
    token = _forced.set(None if name == "auto" else name)
    try:
        yield
    finally:
        _forced.reset(token)


def for_device(device: torch.device, op: str | None = None) -> Implementation:
    """The best backend for tensors on `device` that has `op`: native kernels where they exist, else the reference."""
    return implementation(_best_for(device.type, op in PYTHON_OPS))


_best: dict[tuple[str, bool], str] = {}  # what a machine has does not change, and looking takes longer than a launch


@_constant_result  # it cannot trace this search either; loaded here, the implementation is found
def _best_for(device_type: str, python_op: bool) -> str:
    found = _best.get((device_type, python_op))
    if found is None:
        candidates = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "reference")}.get(device_type, ("reference",))
        candidates = tuple(name for name in candidates if name in SERVED_BY or not python_op)
        usable = [name for name in candidates if unavailable(name) is None]
        # Where there is none, the first raises, with the reason: a broken build must not turn into a slow decode.
        found = _best[device_type, python_op] = implementation([*usable, candidates[0]][0]).name
    return found


def serving(device: torch.device, op: str | None = None) -> Implementation:
    """The implementation that a call (of `op`) with tensors on `device` uses now: the forced one, else the best one."""
    name = forced()
    return for_device(device, op) if name is None else implementation(name)
