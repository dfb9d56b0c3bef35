"""Pictures of a decode, as PNG and as HTML."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib import image

import freedave
from freedave.picture import Trace, check_picture_path, decode_picture, first_block_of, headline, token_texts
from freedave.picture.colour import hex_of, ink_on, rgb_of, shade

PROMPT = "48392+7715="
BLOCK_LENGTH = 16


@dataclass
class Decodes:
    """One prompt, decoded statically and with FreeDave."""

    lm: freedave.DiffusionLM
    prompt_ids: list[int]
    static: freedave.DecodeOutput
    fast: freedave.DecodeOutput

    def draw(self, path: Path) -> None:
        """What a user writes."""
        decode_picture(
            path,
            [Trace.of("static decoding", self.lm, self.static), Trace.of("FreeDave", self.lm, self.fast)],
            prompt_tokens=token_texts(self.lm, self.prompt_ids),
            first_block=first_block_of(self.lm, len(self.prompt_ids), BLOCK_LENGTH),
            block_length=BLOCK_LENGTH,
        )


@pytest.fixture(scope="module")
def decodes() -> Decodes:
    lm = freedave.load_model("demo")
    prompt_ids = lm.tokenizer(PROMPT)["input_ids"]
    static, fast = (
        freedave.generate(lm, torch.tensor([prompt_ids]), 64, draft_steps=steps, block_length=BLOCK_LENGTH)
        for steps in (1, 8)
    )
    return Decodes(lm, prompt_ids, static, fast)


class Page(HTMLParser):
    """The cells, texts and table of an HTML picture, figure by figure."""

    @dataclass
    class Cell:
        classes: list[str]
        forward: int | None
        tip: str
        text: str = ""

    @dataclass
    class Figure:
        cells: list[Page.Cell] = field(default_factory=list)
        bars: list[int] = field(default_factory=list)

    def __init__(self, source: str) -> None:
        super().__init__()
        self.figures: list[Page.Figure] = []
        self.texts: dict[str, str] = {}
        self.links: list[str] = []
        self._open: list[tuple[str, Page.Cell | None]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.links += [value for name, value in values.items() if name in ("src", "href", "xlink:href", "data")]
        cell = None
        if tag == "figure":
            self.figures.append(Page.Figure())
        forward = int(values["data-forward"]) if "data-forward" in values else None
        if tag == "span" and "cell" in values.get("class", "").split():
            cell = Page.Cell(values["class"].split(), forward, values.get("data-tip", ""))
            self.figures[-1].cells.append(cell)
        if tag == "rect" and forward is not None:
            self.figures[-1].bars.append(forward)
        if tag not in ("meta", "input", "rect", "path"):
            self._open.append((tag, cell))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self._open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if tags:
            self.texts[tags[-1]] = self.texts.get(tags[-1], "") + data
        cells = [cell for _, cell in self._open if cell is not None]
        if cells and tags[-1] != "small":
            cells[-1].text += data


def trace(tokens: tuple[str, ...], *, steps: tuple[int, ...] | None = None, accepted: tuple[int, ...] = ()) -> Trace:
    """A trace that commits its tokens from left to right, one a forward unless told otherwise."""
    steps = steps or tuple(range(len(tokens)))
    return Trace("some decode", tokens, steps, steps, accepted or (1,) * len(tokens), seconds=0.5)


def draw(path: Path, *traces: Trace, prompt_tokens: tuple[str, ...] = ("a",), block_length: int = 4) -> None:
    decode_picture(path, traces, prompt_tokens=prompt_tokens, first_block=len(prompt_tokens), block_length=block_length)


def colours_of(pixels: npt.NDArray[np.float32]) -> set[str]:
    channels = (pixels[..., :3] * 255).round().astype(np.int64)
    return {f"#{colour:06x}" for colour in np.unique(channels @ [65536, 256, 1])}


def test_static_and_freedave_side_by_side(decodes: Decodes, tmp_path: Path) -> None:
    decodes.draw(tmp_path / "decode.png")
    decodes.draw(tmp_path / "decode.html")

    # Every forward of both decodes has its shade on one scale, and all of them are in the picture.
    pixels = image.imread(tmp_path / "decode.png")
    last = decodes.static.num_forwards - 1
    missing = {hex_of(shade(forward, last)) for forward in range(last + 1)} - colours_of(pixels)
    assert not missing
    assert min(pixels.shape[:2]) > 500

    page = Page((tmp_path / "decode.html").read_text(encoding="utf-8"))
    for figure, output in zip(page.figures, (decodes.static, decodes.fast), strict=True):
        committed = [forward + 1 for forward in output.forward_map[0].tolist() if forward >= 0]
        assert [cell.forward for cell in figure.cells if cell.forward is not None] == committed
        assert figure.bars == list(range(1, output.num_forwards + 1))
    assert f"{decodes.fast.num_forwards} forwards instead of {decodes.static.num_forwards} (" in page.texts["h1"]
    assert page.texts["h1"].startswith("The same ")


def test_the_last_tokens_of_the_prompt_fill_the_first_block(decodes: Decodes, tmp_path: Path) -> None:
    decodes.draw(tmp_path / "decode.html")
    page = Page((tmp_path / "decode.html").read_text(encoding="utf-8"))
    for figure in page.figures:
        assert "".join(cell.text for cell in figure.cells if "prompt" in cell.classes) == PROMPT
        assert len(figure.cells) % BLOCK_LENGTH == 0


def test_html_stands_alone(decodes: Decodes, tmp_path: Path) -> None:
    decodes.draw(tmp_path / "decode.html")
    source = (tmp_path / "decode.html").read_text(encoding="utf-8")
    assert Page(source).links == []
    for outside in ("http:", "https:", "url(", "@import", "<link"):
        assert outside not in source


def test_cells_say_token_position_forward_and_step(tmp_path: Path) -> None:
    draw(tmp_path / "a.html", trace(("x", " ", "\n", "∎"), steps=(2, 0, 1, 3)))
    cells = Page((tmp_path / "a.html").read_text(encoding="utf-8")).figures[0].cells
    assert [cell.text for cell in cells] == ["x", "␣", "↵", "∎"]
    assert [cell.tip for cell in cells] == [
        "'x' · position 1 · forward 3 · static step 3",
        "' ' · position 2 · forward 1 · static step 1",
        r"'\n' · position 3 · forward 2 · static step 2",
        "end of sequence · position 4 · forward 4 · static step 4",
    ]


def test_hostile_tokens_stay_text(tmp_path: Path) -> None:
    tokens = ("<script>alert(1)</script>", '"><b', "&amp;", "'", "$x_1$", "\x1b[2J", "漢字", "")
    draw(tmp_path / "a.html", trace(tokens), prompt_tokens=("</title><script>",))
    source = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(source)
    assert [cell.text for cell in page.figures[0].cells] == [*tokens[:5], "�[2J", "漢字", "�"]
    assert source.count("<script>") == 1  # our own
    assert "\x1b" not in source
    draw(tmp_path / "a.png", trace(tokens))  # "$" is no formula, and a missing glyph is no error
    assert image.imread(tmp_path / "a.png").size


def test_positions_after_the_end_are_empty_and_blocks_after_it_are_left_out(tmp_path: Path) -> None:
    tokens = ("x", "∎", *"∎∎∎∎∎∎∎∎∎∎")
    draw(tmp_path / "a.html", trace(tokens, steps=(0, 1, *[-1] * 10), accepted=(1, 1)))
    cells = Page((tmp_path / "a.html").read_text(encoding="utf-8")).figures[0].cells
    assert [cell.forward for cell in cells] == [1, 2, None, None]
    assert [cell.text.strip() for cell in cells] == ["x", "∎", "", ""]


def test_the_picture_says_when_decodes_differ() -> None:
    static, other = trace(("a", "b")), trace(("a", "c"))
    assert headline([static, other]).startswith("NOT the same: ")
    assert headline([static, trace(("a", "b"), steps=(1, 0))]).startswith("NOT the same: ")


@pytest.mark.parametrize(("seconds", "words"), [(0.1, "(5.0x faster)"), (2.0, "(4.0x slower)")])
def test_the_headline_does_not_call_a_slower_decode_faster(seconds: float, words: str) -> None:
    static = trace(("a", "b"))
    assert words in headline([static, Trace("other", static.tokens, static.steps, (0, 0), (2,), seconds)])


@pytest.mark.parametrize("name", ["a.png", "a.html"])
def test_one_decode_alone(name: str, tmp_path: Path) -> None:
    draw(tmp_path / name, trace(("a",)))
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("block_length", [1, 3, 32, 200])
def test_any_block_length_keeps_reading_order(block_length: int, tmp_path: Path) -> None:
    tokens = tuple(f"word{i}" for i in range(90))
    for name in ("a.html", "a.png"):
        draw(tmp_path / name, trace(tokens), block_length=block_length)
    cells = Page((tmp_path / "a.html").read_text(encoding="utf-8")).figures[0].cells
    assert [cell.text for cell in cells] == list(tokens)


def test_text_has_contrast_on_every_shade() -> None:
    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for forward in range(1000):
        colour = shade(forward, 999)
        light, dark = sorted((luminance(colour), luminance(rgb_of(ink_on(colour)))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_a_bad_path_is_an_error_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for path, message in {
        tmp_path / "a.jpg": r"must be a \.png or \.html file",
        tmp_path / "a": r"must be a \.png or \.html file",
        tmp_path / "nowhere" / "a.png": "No such file or directory",
        tmp_path / "folder.png": "Is a directory",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_picture_path(path)


def test_checking_a_path_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    check_picture_path(tmp_path / "old.html")
    check_picture_path(tmp_path / "new.html")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old.html", "old")]


def test_without_matplotlib_html_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw(tmp_path / "a.html", trace(("a",)))
    with pytest.raises(ImportError, match=r"pip install 'freedave-kernels\[decode\]'"):
        draw(tmp_path / "a.png", trace(("a",)))


def test_argument_errors(tmp_path: Path) -> None:
    one = trace(("a",))
    with pytest.raises(ValueError, match="at least one trace"):
        draw(tmp_path / "a.html")
    with pytest.raises(ValueError, match="block_length must be at least 1"):
        draw(tmp_path / "a.html", one, block_length=0)
    with pytest.raises(ValueError, match="first_block 0 is not where"):
        decode_picture(tmp_path / "a.html", [one], prompt_tokens="abcdef", first_block=0, block_length=4)
