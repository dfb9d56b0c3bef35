"""The picture as PNG, by matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freedave.picture.colour import MASKED, PROMPT_INK, ink_on, rgb_of, shade
from freedave.picture.content import DISCREET, LEGEND, Picture, Trace, cost, headline, label, plural


def import_matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "a .png picture needs matplotlib: pip install 'freedave-kernels[decode]' (a .html picture needs nothing)"
        ) from error
    return matplotlib


@dataclass(frozen=True)
class _Cell:
    """Where a position is drawn, in units of one single-character cell."""

    position: int
    x: float
    row: int
    width: float


def _layout(picture: Picture, row_width: float) -> list[_Cell]:
    """Cells in reading order. Rows break between blocks where they can; all traces share one layout."""
    block_gap = 0.25
    cells: list[_Cell] = []
    x, row = 0.0, 0
    for block in picture.blocks():
        labels = [[label(picture.token(trace, i)) for trace in picture.traces] for i in block]
        widths = [max(1.0, 0.38 * max(map(len, label)) + 0.4) for label in labels]
        if x and x + block_gap + sum(widths) > row_width:
            x, row = 0.0, row + 1
        elif x:
            x += block_gap
        for position, width in zip(block, widths, strict=True):
            if x and x + width > row_width + 0.01:
                x, row = 0.0, row + 1
            cells.append(_Cell(position, x, row, width))
            x += width
    return cells


def write_png(path: Path, picture: Picture) -> None:
    matplotlib = import_matplotlib()
    traces, last = picture.traces, picture.last_forward
    drawn = sum(map(len, picture.blocks()))
    cells = _layout(picture, row_width=17.0 if drawn <= 256 else 34.0)
    rows = cells[-1].row + 1
    # At least 12 cells to a row, so that a decode of three tokens is not drawn in giant letters.
    row_width = max(12.0, max(cell.x + cell.width for cell in cells))

    # All sizes in inches, then divided by the size of the figure: text must not change size with the number of rows.
    panel, gap, margin = 5.6, 0.45, 0.4
    unit = panel / row_width
    grid, bars = rows * unit, 1.15
    width = 2 * margin + len(traces) * panel + (len(traces) - 1) * gap
    header, caption, between, footer = 1.0, 0.42, 0.5, 1.0
    height = header + caption + grid + between + bars + footer
    # A Figure without pyplot draws with Agg: no display, no global state.
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150, facecolor="white")
    figure.patch.set_facecolor("white")

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, parse_math=False, **style)

    def axes(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    write(margin, 0.42, headline(traces), 13.5, weight="bold", va="baseline", color="#111111")
    write(margin, 0.72, picture.about, 9, va="baseline", color="#555555")

    for index, trace in enumerate(traces):
        x, y = margin + index * (panel + gap), header
        write(x, y + 0.22, trace.name, 11, weight="bold", va="baseline", color="#111111")
        write(x + panel, y + 0.22, cost(trace), 9, va="baseline", ha="right", color="#333333")
        y += caption
        _draw_grid(axes(x, y, panel, grid), picture, trace, cells, (row_width, rows), unit)
        y += grid + between
        _draw_bars(axes(x, y, panel, bars), trace, last, picture.most_accepted)

    legend = 4.5
    _draw_scale(axes(margin + legend, height - 0.4, min(panel, width - 2 * margin - legend - 0.1), 0.13), last)
    write(margin, height - 0.29, LEGEND, 8, va="baseline", color="#333333")
    with warnings.catch_warnings():
        # Scripts that matplotlib's own font lacks are drawn as boxes; a warning for each character would not help.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def _draw_grid(
    axis: Any, picture: Picture, trace: Trace, cells: Sequence[_Cell], size: tuple[float, int], unit: float
) -> None:
    from matplotlib.patches import Rectangle

    axis.set_xlim(0, size[0])
    axis.set_ylim(size[1], 0)
    axis.axis("off")
    points = unit * 72  # height of a cell
    for cell in cells:
        forward = trace.forwards[cell.position] if cell.position >= 0 else -1
        colour = rgb_of(MASKED) if forward < 0 else shade(forward, picture.last_forward)
        corner = (cell.x + 0.03, cell.row + 0.03)
        axis.add_patch(Rectangle(corner, cell.width - 0.06, 0.94, facecolor=colour, linewidth=0))
        if forward < 0 and cell.position >= 0:
            continue
        text = label(picture.token(trace, cell.position))
        middle = cell.x + cell.width / 2
        style = {"ha": "center", "parse_math": False, "color": ink_on(colour) if forward >= 0 else PROMPT_INK}
        quiet = {"alpha": 0.55 if set(text) <= DISCREET else 1.0, "family": "monospace"}
        axis.text(middle, cell.row + 0.40, text, fontsize=0.50 * points, va="center", **style, **quiet)
        if forward >= 0:
            axis.text(middle, cell.row + 0.91, str(forward + 1), fontsize=0.25 * points, alpha=0.85, **style)


def _draw_bars(axis: Any, trace: Trace, last: int, tallest: int) -> None:
    numbers = range(1, trace.num_forwards + 1)
    axis.bar(numbers, trace.accepted, width=0.86, color=[shade(i - 1, last) for i in numbers])
    if trace.num_forwards < 0.7 * (last + 1):
        finished = f"finished after {plural(trace.num_forwards, 'forward')}"
        axis.text(trace.num_forwards + 1.5, tallest / 2, finished, fontsize=8.5, color="#333333", va="center")
    axis.set_xlim(0.3, last + 1.7)
    axis.set_ylim(0, tallest * 1.08)
    axis.tick_params(labelsize=7.5, colors="#333333", length=2.5)
    axis.set_xlabel("forward", fontsize=8, color="#333333", labelpad=1)
    axis.set_title("static steps accepted by each forward", fontsize=8.5, color="#333333", loc="left", pad=4)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_yticks(sorted({0, (tallest + 1) // 2, tallest}))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#999999")


def _draw_scale(axis: Any, last: int) -> None:
    axis.imshow([[shade(i, 255) for i in range(256)]], aspect="auto", extent=(0, 1, 0, 1))
    axis.set_yticks([])
    axis.set_xticks([0, 1], ["1", str(last + 1)])
    axis.tick_params(labelsize=8, colors="#333333", length=0, pad=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
