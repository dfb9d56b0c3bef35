"""The colour scale of forwards, shared by both formats of a picture."""

from __future__ import annotations

from collections.abc import Sequence

# viridis at 17 even steps, light first. Perceptually uniform, so equal numbers of forwards look equally far apart;
# a table of our own, so that HTML needs no matplotlib and both formats show the same colours.
# fmt: off
SCALE = (
    "#fde725", "#d8e219", "#addc30", "#84d44b", "#5ec962", "#3fbc73", "#28ae80", "#1fa088", "#21918c",
    "#26828e", "#2c728e", "#33638d", "#3b528b", "#424086", "#472d7b", "#48186a", "#440154",
)
# fmt: on
MASKED = "#f1f1f3"
PROMPT_INK = "#666666"


def shade(forward: int, last: int) -> tuple[float, float, float]:
    """The colour of forward number `forward` (0-based) on the scale that ends at `last`, RGB in [0, 1]."""
    place = min(forward / max(last, 1), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    a, b = (rgb_of(SCALE[low + i]) for i in (0, 1))
    return tuple(x + (y - x) * (place - low) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def rgb_of(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def hex_of(rgb: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def ink_on(rgb: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with `rgb` (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (L + .05) / .05 > 1.05 / (L + .05), solved for L.
    return "#000000" if luminance > 0.179 else "#ffffff"
