"""From a command line to the command that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from freedave.cli.arguments import COMMANDS
from freedave.cli.reporting import quick_interrupt, run_reported, write

# What a command needs beside torch; the decoder for all that are not named here.
EXTRAS = {"evaluate": "lm-eval"}


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is reported like every other bad input, and help is written like every output."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        if file in (None, sys.stdout):
            write(self.format_help().removesuffix("\n"))
        else:
            super().print_help(file)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. Each sets `check`, a function of the arguments that raises ValueError."""
    parser = _Parser(prog="freedave", description="Lossless parallel decoding of masked-diffusion language models.")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}"
    )
    for add_parser in COMMANDS.values():
        add_parser(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as can be without a model.

    Raises:
        ValueError: what is wrong, and where to read how it is right.
    """
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (see freedave {arguments.command} --help)")
    arguments.check(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors a user can cause are one line on standard error."""

    def run() -> int:
        arguments = parse(argv)
        return int(_command(arguments.command).run(arguments))

    return run_reported(run)


def _command(name: str) -> Any:
    """The module of a command."""
    try:
        with quick_interrupt():
            return import_module(f"freedave.cli.{name}")
    except ImportError as error:
        extra = EXTRAS.get(name, "decode")
        raise ImportError(f"{error}: `freedave {name}` needs pip install 'freedave-kernels[{extra}]'") from error
