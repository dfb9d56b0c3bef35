"""Pictures of a decode: which forward committed each token, as a heat map over the text.

Several decodes of one prompt stand side by side on one colour scale of forwards, so that the cost is visible before
any number is read: static decoding runs through the whole scale, FreeDave stops early in it. Below each stand the
tokens that each of its forwards committed. `decode_picture` writes PNG (needs matplotlib) or one self-contained HTML
file (needs nothing).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from freedave.picture.content import Picture, Trace, first_block_of, headline, token_texts
from freedave.picture.page import html_page
from freedave.picture.png import import_matplotlib, write_png

__all__ = ["SUFFIXES", "Trace", "check_picture_path", "decode_picture", "first_block_of", "headline", "token_texts"]

SUFFIXES = (".png", ".html")


def check_picture_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a picture can be written to `path`; meant for before a long decode, not after it."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a picture must be a .png or .html file, got {str(target)!r}")
    if target.suffix.lower() == ".png":
        import_matplotlib()
    existed = target.exists()
    try:
        # Permission bits do not tell (root, read-only file systems): only opening the file does.
        with target.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write the picture {str(target)!r}: {error.strerror}") from error
    if not existed:
        target.unlink()


def decode_picture(
    path: str | os.PathLike[str],
    traces: Sequence[Trace],
    *,
    prompt_tokens: Sequence[str],
    first_block: int,
    block_length: int,
    title: str = "",
) -> None:
    """Write a picture of one or more decodes of one prompt to `path` (.png or .html).

    The first trace is the one that the others are compared with (static decoding). `first_block` is the position,
    prompt included, at which the block of the first generated token begins (see `first_block_of`); where that is inside
    the prompt, the first row begins with the prompt's last tokens, in grey. Raises ValueError for another
    suffix or a file that cannot be written, ImportError with the remedy when a PNG is asked for without matplotlib.
    """
    if not traces:
        raise ValueError("a picture needs at least one trace")
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    if not len(prompt_tokens) - block_length < first_block <= len(prompt_tokens):
        raise ValueError(
            f"first_block {first_block} is not where the block of the first generated token can begin: the prompt has "
            f"{len(prompt_tokens)} tokens, a block {block_length}"
        )
    check_picture_path(path)
    target, picture = Path(path), Picture(tuple(traces), tuple(prompt_tokens), first_block, block_length, title)
    if target.suffix.lower() == ".png":
        write_png(target, picture)
    else:
        target.write_text(html_page(picture), encoding="utf-8")
