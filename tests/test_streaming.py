"""What a decode looks like in the terminal while it runs."""

from __future__ import annotations

import io
import re
import time

import pytest
import torch

import freedave
from freedave import Commit
from freedave.cli.streaming import ProgressBar, StreamingText, can_redraw

BOLD, DIM = "\x1b[1m", "\x1b[2m"


class Terminal(io.StringIO):
    """A terminal: keeps what was written, and what its screen shows now."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.screens: list[list[str]] = []  # after each flush
        self.cursor_visible = True
        self._rows = [""]
        self._row = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[\??\d*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
            self._obey(part)
        return super().write(text)

    def flush(self) -> None:
        self.screens.append(self.screen())

    def screen(self) -> list[str]:
        """The rows shown, without empty ones at the end."""
        rows = list(self._rows)
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def _obey(self, part: str) -> None:
        if part == "\n":
            self._row += 1
            self._rows += [""] * (self._row + 1 - len(self._rows))
        elif part == "\r":
            pass  # tqdm starts its bar with it
        elif part.endswith("F"):
            self._row -= int(part[2:-1])
            assert self._row >= 0, "went back beyond the first row"
        elif part == "\x1b[0J":
            self._rows[self._row :] = [""]
        elif part in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor_visible = part.endswith("h")
        elif not part.startswith("\x1b"):
            self._rows[self._row] += part


@pytest.fixture(autouse=True)
def _size_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "24")


def commit(
    positions: list[int],
    token_ids: list[int],
    *,
    forward: int = 0,
    tokens: int = 1,
    total: int = 8,
    length: int | None = None,
) -> Commit:
    return Commit(
        forward=forward,
        steps=len(positions),
        positions=positions,
        token_ids=token_ids,
        step_of=list(range(len(positions))),
        tokens=tokens,
        total=total,
        finished=tokens == total,
        length=total if length is None else length,
        final=0,
    )


def letters(token_ids: list[int]) -> str:
    """A tokenizer whose tokens are characters."""
    return "".join(map(chr, token_ids))


def streaming(terminal: Terminal, total: int = 8, eos_token_ids: tuple[int, ...] = ()) -> StreamingText:
    return StreamingText(total, letters, eos_token_ids=eos_token_ids, file=terminal, frames_per_second=1e9)


def test_tokens_appear_in_place() -> None:
    lm = freedave.load_model("demo")
    input_ids = torch.tensor([lm.tokenizer("48392+7715=")["input_ids"]])
    terminal = Terminal()
    commits: list[Commit] = []

    with StreamingText(64, lm.tokenizer.decode, file=terminal, frames_per_second=1e9) as watch:

        def on_step(commit: Commit) -> None:
            commits.append(commit)
            watch(commit)

        out = freedave.generate(lm, input_ids, max_new_tokens=64, draft_steps=8, on_step=on_step, eos_token_id=None)

    # Each frame shows what was committed so far at its final place, and a placeholder everywhere else.
    shown = ["·"] * 64
    assert len(commits) == out.num_forwards == len(terminal.screens) - 1
    for step, screen in zip(commits, terminal.screens, strict=False):
        for position, token_id in zip(step.positions, step.token_ids, strict=True):
            shown[position] = lm.tokenizer.decode([token_id])
        del shown[step.length :]
        assert "".join(screen[:-1])[: len("".join(shown))] == "".join(shown)
        assert screen[-1].startswith(f"forward {step.forward + 1}: {step.tokens} of 64 tokens, ")
    # The caller prints the text; the frame itself is gone, and the cursor is back.
    assert terminal.screen() == []
    assert terminal.cursor_visible


def test_new_tokens_are_bold_and_masked_positions_dim() -> None:
    terminal = Terminal()
    with streaming(terminal, total=4) as watch:
        watch(commit([1], [ord("b")], total=4))
        watch(commit([0, 3], [ord("a"), ord("d")], forward=1, tokens=3, total=4))
    assert f"{DIM}·\x1b[0m{BOLD}b\x1b[0m{DIM}··\x1b[0m\n" in terminal.getvalue()
    assert f"{BOLD}a\x1b[0mb{DIM}·\x1b[0m{BOLD}d\x1b[0m\n" in terminal.getvalue()


def test_text_from_the_end_of_the_sequence_on_is_not_shown() -> None:
    terminal = Terminal()
    with streaming(terminal, eos_token_ids=(9, 0)) as watch:
        watch(commit([0, 3, 5], [ord("a"), 0, 0], tokens=3))
    assert terminal.screens[0][0] == "a··"


def test_what_is_no_part_of_the_answer_disappears() -> None:
    terminal = Terminal()
    with streaming(terminal, total=4) as watch:
        watch(commit([0, 2], [ord("a"), ord("c")], total=4))
        assert terminal.screen()[0] == "a·c·"
        watch(commit([1], [ord("b")], total=4, length=2, tokens=2))
        assert terminal.screen()[0] == "ab"


def test_a_character_of_several_tokens_is_decoded_from_all_of_them() -> None:
    terminal = Terminal()
    first, second = "é".encode()
    watch = StreamingText(2, lambda ids: bytes(ids).decode(errors="replace"), file=terminal, frames_per_second=1e9)
    with watch:
        watch(commit([0], [first], total=2))
        watch(commit([1], [second], forward=1, tokens=2, total=2))
    assert [screen[0] for screen in terminal.screens[:2]] == ["�·", "é"]


def test_long_lines_and_newlines_are_counted_as_rows() -> None:
    terminal = Terminal()
    text = "x" * 50 + "\n" + "漢" * 30  # 40 columns hold 20 wide characters
    with streaming(terminal, total=len(text)) as watch:
        for forward in range(3):  # drawing over itself must not creep up or down
            watch(commit(list(range(len(text))), list(map(ord, text)), forward=forward, total=len(text)))
    rows = ["x" * 40, "x" * 10, "漢" * 20, "漢" * 10]
    assert [screen[:-1] for screen in terminal.screens[:3]] == [rows] * 3


def test_a_text_taller_than_the_screen_shows_where_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "8")
    terminal = Terminal()
    with streaming(terminal, total=400) as watch:  # ten rows
        watch(commit([0], [ord("a")], total=400))
        watch(commit([250], [ord("z")], forward=1, tokens=2, total=400))
    assert [len(screen) for screen in terminal.screens[:2]] == [6, 6]
    assert terminal.screens[0][0][0] == "a"
    assert "z" in terminal.screens[1][4]


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    terminal = Terminal()
    with streaming(terminal) as watch:
        watch(commit([0, 1, 2], [ord("a"), 0x1B, ord("b")], tokens=3))
    assert terminal.screens[0][0] == "ab·····"


def test_frames_are_limited_but_the_last_one_is_always_drawn() -> None:
    terminal = Terminal()
    with StreamingText(3, letters, file=terminal, frames_per_second=1e-9) as watch:
        for forward, character in enumerate("abc"):
            watch(commit([forward], [ord(character)], forward=forward, tokens=forward + 1, total=3))
    assert [screen[0] for screen in terminal.screens[:-1]] == ["a··", "abc"]


def test_an_error_while_decoding_leaves_a_clean_terminal() -> None:
    terminal = Terminal()

    def interrupted() -> None:
        with streaming(terminal) as watch:
            watch(commit([0], [ord("a")]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.screens[0][0] == "a·······"
    assert terminal.screen() == []
    assert terminal.cursor_visible


def test_the_placeholder_fits_the_encoding() -> None:
    terminal = Terminal()
    terminal.encoding = "ascii"
    with streaming(terminal, total=3) as watch:
        watch(commit([0], [ord("a")], total=3))
    assert terminal.screens[0][0] == "a.."


def test_progress_bar_shows_tokens_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # older versions of tqdm cut the numbers off where the terminal is narrow
    terminal = Terminal()
    with ProgressBar(8, file=terminal) as bar:
        bar(commit([0, 1, 2], [1, 2, 3], tokens=3))
        time.sleep(0.2)  # tqdm draws ten times a second
        bar(commit([3, 4, 5, 6, 7], [1] * 5, forward=1, tokens=8))
    assert "8/8" in terminal.getvalue()
    assert "2 forwards, 4.0 tokens per forward" in terminal.getvalue()


def test_progress_bar_is_silent_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with ProgressBar(8, file=file) as bar:
        bar(commit([0], [1]))
    assert file.getvalue() == ""


@pytest.mark.parametrize(("term", "expected"), [("xterm-256color", True), ("dumb", False), (None, False)])
def test_only_a_terminal_that_can_move_its_cursor_is_redrawn(
    term: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert can_redraw(Terminal()) is expected
    assert not can_redraw(io.StringIO())
