"""What every op does with a call: check its arguments, choose the kernel, run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from freedave_kernels import registry
from freedave_kernels.backends import forced

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def dispatched(
    op: str,
    check: Callable[..., None],
    fake: Callable[..., T],
    window: Callable[..., tuple[int, ...]] | None = None,
) -> Callable[..., T]:
    """Registers an op, and returns what `ops.<op>` calls.

    All four functions take every argument of the op's signature by position; the first is a tensor, whose device decides.
    `check` raises where an argument is wrong, naming it, what was expected and what came, from metadata only; `fake` makes
    results of the right shapes; `window` says which length, how many drafts and how many states of a pool a block of threads
    would have to hold.
    """
    registry.add(op, fake, window)

    def call(*arguments: Any) -> T:
        check(*arguments)
        first: torch.Tensor = arguments[0]
        result: T = getattr(_found, _find(op, first.device.type))(*arguments)
        return result

    return call


def _constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result, without importing the compiler (and Triton with it) to set a flag."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Kernels:
    """Those that calls have used, as attributes: so torch.compile watches the one that a function calls, not all of them."""


_found = _Kernels()


@_constant_result  # torch.compile traces neither a ContextVar nor the search for a backend
def _find(op: str, device_type: str) -> str:
    """The name in `_found` of the kernel that serves a call now."""
    backend = forced() or registry.best(op, device_type)
    name = f"{op} on {backend}"
    setattr(_found, name, registry.kernel(op, backend, device_type))
    return name
