"""Watching a decode in the terminal: a progress bar, and text whose tokens appear in place.

Both are `on_step` callbacks of `freedave.generate` and context managers that leave the terminal clean:

    with ProgressBar(256) as watch:
        freedave.generate(lm, input_ids, max_new_tokens=256, on_step=watch)
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Collection
from itertools import groupby, takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from freedave.decode.output import Commit

_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_CLEAR_TO_END = "\x1b[0J"
_FRAMES_PER_SECOND = 25


class Watcher(Protocol):
    """What both kinds of display are: called with every commit, closed at the end."""

    def __call__(self, commit: Commit) -> None: ...

    def __enter__(self) -> Watcher: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ProgressBar:
    """A tqdm bar over the tokens of one decode, with the number of forwards and tokens per forward.

    Shown only where `file` (default: standard error) is a terminal.
    """

    def __init__(self, total: int, *, description: str = "decoding", file: TextIO | None = None) -> None:
        self._bar = tqdm(
            total=total,
            desc=description,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}{postfix}]",
            file=file or sys.stderr,
            disable=None,  # tqdm's word for "where it is not a terminal"
            leave=False,
            dynamic_ncols=True,
        )

    def __call__(self, commit: Commit) -> None:
        forwards = commit.forward + 1
        self._bar.set_postfix_str(
            f"{forwards} forwards, {commit.tokens / forwards:.1f} tokens per forward", refresh=False
        )
        self._bar.update(commit.tokens - self._bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class StreamingText:
    """The text of one decode, drawn over itself after each forward: masked positions dim, new tokens bold.

    `decode` turns token ids into text. Text from the first of `eos_token_ids` on is not shown, nor what a commit says is no
    part of the answer. On leaving the context, the
    frame is removed: the caller prints the finished text, so that it is in the scroll-back once and in full.
    """

    def __init__(
        self,
        total: int,
        decode: Callable[[list[int]], str],
        *,
        eos_token_ids: Collection[int] = (),
        file: TextIO | None = None,
        frames_per_second: float = _FRAMES_PER_SECOND,
    ) -> None:
        self._decode = decode
        self._eos_token_ids = eos_token_ids
        self._file = file or sys.stdout
        self._token_ids: list[int | None] = [None] * total
        self._fresh: set[int] = set()
        self._placeholder = "·" if _can_encode("·", self._file) else "."
        self._interval = 1 / frames_per_second
        self._last_drawn = float("-inf")
        self._rows_drawn = 0

    def __call__(self, commit: Commit) -> None:
        for position, token_id in zip(commit.positions, commit.token_ids, strict=True):
            self._token_ids[position] = token_id
        del self._token_ids[commit.length :]
        self._fresh.update(commit.positions)
        now = time.monotonic()
        # A fast model commits more often than a terminal can draw; what is skipped shows in the next frame.
        if commit.finished or now - self._last_drawn >= self._interval:
            self._draw(commit)
            self._fresh.clear()
            self._last_drawn = now

    def __enter__(self) -> StreamingText:
        self._file.write(_HIDE_CURSOR)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write(self._back_to_start() + _SHOW_CURSOR)
        self._file.flush()
        self._rows_drawn = 0

    def _draw(self, commit: Commit) -> None:
        columns, lines = shutil.get_terminal_size()
        rows = self._rows(columns)
        # A frame taller than the screen could not be drawn over: keep the rows around the last committed token.
        room = max(lines - 3, 1)
        if len(rows) > room:
            end = max(room, 1 + max((i for i, row in enumerate(rows) if not row.masked_only), default=0))
            rows = rows[end - room : end]
        rate = commit.tokens / (commit.forward + 1)
        status = f"forward {commit.forward + 1}: {commit.tokens} of {commit.total} tokens, {rate:.1f} per forward"
        frame = "".join(row.text() + "\n" for row in rows) + _DIM + status[: columns - 1] + _RESET + "\n"
        self._file.write(self._back_to_start() + frame)
        self._file.flush()
        self._rows_drawn = len(rows) + 1

    def _back_to_start(self) -> str:
        return f"\x1b[{self._rows_drawn}F{_CLEAR_TO_END}" if self._rows_drawn else ""

    def _rows(self, columns: int) -> list[_Row]:
        """The text wrapped to the terminal, as we must know how many rows to go back."""
        rows = [_Row()]
        for text, style in self._segments():
            for character in text:
                if character == "\n":
                    rows.append(_Row())
                    continue
                if not (character.isprintable() or character == "\t"):
                    continue  # a control character could move the cursor
                shown = " " if character == "\t" else character
                if rows[-1].width + _columns(shown) > columns:
                    rows.append(_Row())
                rows[-1].add(shown, style)
        return rows

    def _segments(self) -> list[tuple[str, str]]:
        """Runs of text with their style."""
        token_ids = list(takewhile(lambda token_id: token_id not in self._eos_token_ids, self._token_ids))
        segments = []
        for masked, run in groupby(range(len(token_ids)), key=lambda position: token_ids[position] is None):
            positions = list(run)
            segments += [(self._placeholder * len(positions), _DIM)] if masked else self._committed(positions)
        return segments

    def _committed(self, positions: list[int]) -> list[tuple[str, str]]:
        """A run of committed tokens, new ones bold.

        A character may take several tokens, some of them new: then the whole run is decoded at once and stays plain.
        """
        pieces = []
        for fresh, run in groupby(positions, key=self._fresh.__contains__):
            pieces.append((self._text(list(run)), _BOLD if fresh else ""))
        text = self._text(positions)
        return pieces if "".join(piece for piece, _ in pieces) == text else [(text, "")]

    def _text(self, positions: list[int]) -> str:
        return self._decode([token_id for i in positions if (token_id := self._token_ids[i]) is not None])


class _Row:
    """One row of the terminal while it is filled: characters with their styles, and the columns taken."""

    def __init__(self) -> None:
        self._characters: list[tuple[str, str]] = []
        self.width = 0

    @property
    def masked_only(self) -> bool:
        return all(style == _DIM for _, style in self._characters)

    def add(self, character: str, style: str) -> None:
        self._characters.append((character, style))
        self.width += _columns(character)

    def text(self) -> str:
        parts = []
        for style, run in groupby(self._characters, key=lambda item: item[1]):
            text = "".join(character for character, _ in run)
            parts.append(f"{style}{text}{_RESET}" if style else text)
        return "".join(parts)


def can_redraw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands cursor movement."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _columns(character: str) -> int:
    """How many terminal columns a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _can_encode(text: str, file: TextIO) -> bool:
    try:
        text.encode(file.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
