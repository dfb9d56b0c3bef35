"""How every command writes and fails: the one place that knows standard output, standard error and exit codes.

Exit codes: 0 done; 1 a decode differed from static decoding, or the model's logits were not finite; 2 bad input, something
is not installed, or what came out could not be written; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def write(text: str) -> None:
    """Text and a newline to standard output, at once; what its encoding lacks is escaped.

    Raises:
        BrokenPipeError: the reader has gone.
        OSError: it could not be written; says why.
    """
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def write_json(value: Any, **options: Any) -> None:
    """One JSON object on one line of standard output; `options` as of `json_text`, raises as `write` does."""
    write(json_text(value, sys.stdout.encoding or "ascii", **options))


def json_text(value: Any, encoding: str, **options: Any) -> str:
    """JSON that `encoding` can write: escaped only where it lacks a character, as every encoding does in names of files
    that are no text. `options` are those of `json.dumps`.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def show_remarks() -> None:
    """What the decoder remarks while it runs (a shape is compiled, which takes a moment) goes to standard error."""
    logger = logging.getLogger("freedave")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("freedave: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@contextmanager
def reported_warnings() -> Iterator[None]:
    """Warnings are one line on standard error, as errors are: where in the code they come from says nothing to a user."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        _complain(f"warning: {_one_line(message)}", code=0)

    shown = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def run_reported(run: Callable[[], int]) -> int:
    """Run a command and return its exit code; warnings, and errors a user can cause, are one line on standard error."""
    if sys.stderr is None:  # closed by the caller; print would take standard output for it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    if sys.stdout is None:
        return _complain("error: standard output is closed", code=2)
    try:
        with reported_warnings():
            code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except BrokenPipeError:  # the reader (`| head`) has gone
        return 0
    except Exception as error:
        code = _exit_code(error)
        if code == 0:
            raise  # a defect of ours
        return _complain(f"error: {_one_line(error)}", code)
    finally:
        _let_go_of_unwritable_output()


def _exit_code(error: Exception) -> int:
    """0 for what is no error of the user's."""
    if isinstance(error, (ValueError, ImportError, OSError)):
        return 2
    # Both import torch, and neither error can have been raised where it had not been imported.
    from freedave.decode.output import LosslessnessError, NonFiniteLogitsError
    from freedave_kernels import BackendUnavailableError

    if isinstance(error, (LosslessnessError, NonFiniteLogitsError)):
        return 1
    return 2 if isinstance(error, BackendUnavailableError) else 0


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _complain(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # standard error may be full, or its reader gone
        print(f"freedave: {message}", file=sys.stderr, flush=True)
    return code


def _let_go_of_unwritable_output() -> None:
    """What is left in standard output's buffer and cannot be written would make Python complain again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def quick_interrupt() -> Iterator[None]:
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
