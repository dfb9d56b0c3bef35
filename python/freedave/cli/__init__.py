"""The command line: `freedave demo`, `freedave generate`, `freedave evaluate`, `freedave convert`, `freedave info`.

Importing torch and transformers takes seconds, in which a user may well press Ctrl-C; so it happens in `main`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with _quick_interrupt():
        from freedave.cli.command_line import run_command
    return run_command(argv)


@contextmanager
def _quick_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once.

    Libraries that are interrupted while they are imported turn KeyboardInterrupt into errors of their own. Nothing is
    open yet that would have to be closed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # the caller of `main` has its own way with it
        return

    def leave(*_: object) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"freedave: interrupted\n")
        os._exit(130)

    try:
        signal.signal(signal.SIGINT, leave)
    except ValueError:  # only the main thread may, and only it is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
