"""Which implementation of the ops runs, and how a user forces one.

By default the tensors' device decides. ``use_backend("reference")`` or ``FREEDAVE_BACKEND=reference`` forces one for the
process, ``with use_backend("reference"):`` for a block; a forced backend that cannot serve a call raises
`BackendUnavailableError` and never falls back.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
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
# "auto": the device of the tensors decides.
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


# A wrong name in the environment is reported by the first op that runs: an import that fails could not be caught by
# programs that want to show it to a person.
_INITIAL = os.environ.get("FREEDAVE_BACKEND") or "auto"
_default = _INITIAL  # what the last statement `use_backend(name)` says
# Of `with use_backend(name)`; None outside of such blocks.
_in_block: ContextVar[str | None] = ContextVar("freedave_backend", default=None)


def _constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result, without importing the compiler (and Triton with it) to set a flag."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_result  # Dynamo cannot trace a ContextVar
def forced() -> str | None:
    """The backend in force, or None where the device of the tensors decides."""
    name = _in_block.get() or _default
    return None if name == "auto" else name


def runs_native(tensor: torch.Tensor) -> bool:
    """Whether the native library serves a call with `tensor` now, directly: nothing is forced, it has kernels for the
    device, and torch.compile, which must see an overload, is not tracing the call.
    """
    return forced() is None and (tensor.is_cpu or (CUDA_KERNELS and tensor.is_cuda)) and not is_compiling()


class use_backend:
    """Runs ops on backend `name` ("reference", "cpu", "triton", "cuda"), or where the tensors are ("auto").

    As a statement, `use_backend("reference")`, it is the default of the whole process from then on, in place of
    FREEDAVE_BACKEND: in all threads and tasks, but for those inside a block of their own. As a block,
    `with use_backend("reference"):`, it ends with the block and belongs to the current thread or task: others keep theirs.
    A function that torch.compile has compiled keeps the backend it was compiled with.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: a backend that cannot run here, with reason and remedy.

    Both are raised at once, and nothing is changed then.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "use_backend")
        if name != "auto":
            implementation(name)
        self._name = name
        self._tokens: list[Token[str | None]] = []
        with _statements_lock:
            # An object that is gone was a statement, so what came before the last of these is out of use for good.
            gone = max((place for place, (made, _) in enumerate(_statements) if made() is None), default=0)
            _set_statements([*_statements[gone:], (weakref.ref(self), name)])

    def __enter__(self) -> None:
        with _statements_lock:  # it was none: it is a block
            _set_statements([statement for statement in _statements if statement[0]() is not self])
        self._tokens.append(_in_block.set(self._name))

    def __exit__(self, *exception: object) -> None:
        _in_block.reset(self._tokens.pop())


# What looks like a statement, in order. Until its block is entered, a `with use_backend(name)` does, too, and those of
# several threads may begin in between each other: so a block takes itself out, rather than restoring what it found.
_statements: list[tuple[weakref.ref[use_backend], str]] = []
_statements_lock = threading.Lock()


def _set_statements(statements: list[tuple[weakref.ref[use_backend], str]]) -> None:
    global _statements, _default
    _statements = statements
    _default = statements[-1][1] if statements else _INITIAL


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
