"""The command line: `freedave demo`, `freedave generate`, `freedave evaluate`, `freedave convert`, `freedave info`.

Exit codes: 0 done; 1 a decode differed from static decoding, or the model's logits were not finite; 2 bad input;
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from freedave import LosslessnessError, NonFiniteLogitsError
from freedave.cli import convert, demo, evaluate, generate, info
from freedave_kernels import BackendUnavailableError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is reported like every other bad input: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`."""
    parser = _Parser(prog="freedave", description="Lossless parallel decoding of masked-diffusion language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="{demo,generate,evaluate,convert,info}")
    for command in (demo, generate, evaluate, convert, info):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors a user can cause are one line on standard error."""
    try:
        arguments = build_parser().parse_args(argv)
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # here, where a reader that has gone is handled
        return code
    except (LosslessnessError, NonFiniteLogitsError) as error:
        return _fail(error, code=1)
    except (ValueError, ImportError, BackendUnavailableError) as error:
        return _fail(error, code=2)
    except KeyboardInterrupt:
        print("freedave: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this, Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(error: Exception, code: int) -> int:
    print(f"freedave: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
