"""`freedave convert`: rewrite a published checkpoint in the layout of its native transformers class."""

from __future__ import annotations

import argparse

from freedave.cli.reporting import write
from freedave.models.conversion import convert_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    converted = convert_checkpoint(arguments.source, arguments.destination, revision=arguments.revision)
    files = "1 file" if len(converted.files) == 1 else f"{len(converted.files)} files"
    write(
        f"{converted.folder}: {converted.family} as {converted.native_class}, {converted.tensors} tensors, "
        f"{converted.bytes / 1e6:.1f} MB in {files}"
    )
    if converted.no_tokenizer is not None:
        write(f"without a tokenizer: {converted.no_tokenizer}")
    return 0
