"""`freedave evaluate`: lm-evaluation-harness with a masked-diffusion model."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser. All that follows is lm-eval's, options and --help included."""
    parser = commands.add_parser(
        "evaluate",
        help="score a checkpoint with lm-evaluation-harness, whose options it takes",
        prefix_chars="+",
        add_help=False,
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Hand over to lm-eval, with the model "freedave" known to it."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness is not installed ({error}); pip install 'freedave-kernels[lm-eval]'"
        ) from error
    from freedave.integrations import lm_eval as integration

    return integration.main(arguments.arguments)
