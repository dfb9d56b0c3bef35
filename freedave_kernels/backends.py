"""Which backend a user asks for.

By default the tensors' device decides. ``use_backend("reference")`` or ``FREEDAVE_BACKEND=reference`` forces one for the
process, ``with use_backend("reference"):`` for a block; a forced backend that cannot serve a call raises
`BackendUnavailableError` and never falls back.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextvars import ContextVar, Token

from freedave_kernels import registry

# "auto": the device of the tensors decides.
CHOICES = (*registry.BACKENDS, "auto")


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, else the reason and the remedy."""
    return {name: registry.unavailable(name) for name in registry.BACKENDS}


def _check_name(name: str, source: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(CHOICES)}, got {name!r}")


# A wrong name in the environment is reported by the first op that runs: an import that fails could not be caught by
# programs that want to show it to a person.
_INITIAL = os.environ.get("FREEDAVE_BACKEND") or "auto"
_default = _INITIAL  # what the last statement `use_backend(name)` says
# Of `with use_backend(name)`; None outside of such blocks.
_in_block: ContextVar[str | None] = ContextVar("freedave_backend", default=None)


def forced() -> str | None:
    """The backend in force, or None where the device of the tensors decides."""
    name = _in_block.get() or _default
    if name == "auto":
        return None
    _check_name(name, "FREEDAVE_BACKEND")
    return name


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
            registry.expect_available(name)
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
