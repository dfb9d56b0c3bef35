"""`freedave convert`: rewrite a published checkpoint in the layout of its native transformers class."""

from __future__ import annotations

import argparse
from typing import Any

from freedave.models.conversion import convert_checkpoint


def add_parser(commands: Any) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "convert",
        help="rewrite a published checkpoint in transformers' native layout",
        description="Rewrite a published checkpoint (LLaDA, Dream, SDAR, TraDo, LLaDA2) in the layout of its native "
        "transformers class, which loads without remote code. Nothing is downloaded or overwritten.",
        epilog="example: freedave convert GSAI-ML/LLaDA-8B-Instruct llada-native",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, or a model in the Hugging Face cache")
    parser.add_argument("destination", metavar="DST", help="a new folder, or an empty one")
    parser.add_argument("--revision", help="of a model in the Hugging Face cache (default: main)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    converted = convert_checkpoint(arguments.source, arguments.destination, revision=arguments.revision)
    files = "1 file" if len(converted.files) == 1 else f"{len(converted.files)} files"
    print(
        f"{converted.folder}: {converted.family} as {converted.native_class}, {converted.tensors} tensors, "
        f"{converted.bytes / 1e6:.1f} MB in {files}"
    )
    if converted.no_tokenizer is not None:
        print(f"without a tokenizer: {converted.no_tokenizer}")
    return 0
