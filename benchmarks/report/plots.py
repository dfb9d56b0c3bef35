"""Pictures of one machine's results: each a question that a reader has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import Row, shape_text, time_text
from benchmarks.report import Results, of_kind

COLOURS = {
    "cpu": "#1f5fbf",
    "cuda": "#1f5fbf",
    "triton": "#2a9d6f",
    "cpu, nested": "#7fa8e0",
    "compiled": "#e08a1e",
    "eager": "#777777",
    "read": "#222222",
    "static": "#777777",
    "freedave": "#1f5fbf",
    "nested": "#e08a1e",
    "ahead 1": "#2a9d6f",
}
NAMES = {
    "freedave": "FreeDave, recycled drafts",
    "nested": "FreeDave, nested drafts (as published)",
    "ahead 1": "FreeDave, recycled, lookahead 1",
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 110,
    "svg.hashsalt": "benchmarks",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes every picture that the results have rows for."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture(results)
            if figure is None:
                continue
            path = folder / f"{name}.png"
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            paths.append(path)
    return paths


def bandwidth(results: Results) -> Figure | None:
    """Bytes a second of predict_tokens against the number of masked rows, with what reading alone reaches."""
    rows = [row for row in _op(results, "predict_tokens") if row["shape"].get("rows") == row["shape"].get("masked")]
    if not rows:
        return None
    vocab = 151936 if any(row["shape"]["V"] == 151936 for row in rows) else rows[0]["shape"]["V"]
    rows = [row for row in rows if row["shape"]["V"] == vocab]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 3.4), sharey=True, squeeze=False)
    for place, dtype in zip(axes[0], dtypes, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for provider, mine in _by_provider(of_dtype):
            sizes = [row["shape"]["masked"] for row in mine]
            _line(place, sizes, [row["gb_per_s"] for row in mine], provider)
        limits = {row["shape"]["masked"]: row["bandwidth_gb_per_s"] for row in of_dtype if row["bandwidth_gb_per_s"]}
        place.plot(
            list(limits), list(limits.values()), "--", color=COLOURS["read"], label="read bandwidth, same rounds"
        )
        place.set(xscale="log", yscale="log", xlabel="masked rows", title=dtype)
        _ticks(place, sorted({row["shape"]["masked"] for row in of_dtype}))
    axes[0][0].set_ylabel("logits, GB/s")
    _legend_below(figure, axes[0][0])
    figure.suptitle(f"predict_tokens, V={vocab}: bytes of the logits a second (higher is better)", y=1.03)
    return figure


def speedup(results: Results) -> Figure | None:
    """predict_tokens over eager on every vocabulary and number of rows."""
    rows = [row for row in _op(results, "predict_tokens") if "V" in row["shape"] and row["provider"] != "eager"]
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 3.4), sharey=True, squeeze=False)
    for place, dtype in zip(axes[0], dtypes, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype and not row["provider"].startswith("read")]
        cases = list(dict.fromkeys((row["shape"]["rows"], row["shape"]["masked"]) for row in of_dtype))
        vocabularies = list(dict.fromkeys(row["shape"]["V"] for row in of_dtype))
        for index, vocab in enumerate(vocabularies):
            for provider, marker in (("cpu", "o"), ("cuda", "o"), ("triton", "s"), ("compiled", "x")):
                mine = [row for row in of_dtype if row["shape"]["V"] == vocab and row["provider"] == provider]
                if mine:
                    shift = (index - (len(vocabularies) - 1) / 2) * 0.17
                    places = [cases.index((row["shape"]["rows"], row["shape"]["masked"])) + shift for row in mine]
                    shade = 0.35 + 0.65 * (index + 1) / len(vocabularies)
                    label = (
                        f"{provider}, V={vocab}" if provider != "compiled" or index == len(vocabularies) - 1 else None
                    )
                    label = "compiled, same order of V" if label and provider == "compiled" else label
                    values = [row["ratio"] for row in mine]
                    place.plot(places, values, marker, color=COLOURS[provider], alpha=shade, label=label, markersize=5)
        place.axhline(1, color=COLOURS["eager"], linewidth=1)
        names = [f"{masked}" if masked == rows else f"{masked} of {rows}" for rows, masked in cases]
        place.set_xticks(range(len(cases)), names)
        place.set(yscale="log", xlabel="masked rows", title=dtype)
        place.yaxis.set_major_formatter("{x:g}x")
    axes[0][0].set_ylabel("times eager")
    _legend_below(figure, axes[0][0], columns=3)
    figure.suptitle("predict_tokens: times faster than eager (grey line: eager)", y=1.03)
    return figure


def drafting(results: Results) -> Figure | None:
    """Time of draft_step against K, by batch, at the window L=32."""
    rows = [row for row in _op(results, "draft_step") if "K" in row["shape"]]
    lengths = {row["shape"]["L"] for row in rows}
    if not rows:
        return None
    length = 32 if 32 in lengths else max(lengths)
    rows = [row for row in rows if row["shape"]["L"] == length]
    batches = sorted({row["shape"]["B"] for row in rows})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(3.4 * len(batches), 3.3), sharey=True, squeeze=False)
    for place, batch in zip(axes[0], batches, strict=True):
        for provider, mine in _by_provider([row for row in rows if row["shape"]["B"] == batch]):
            _line(place, [row["shape"]["K"] for row in mine], [row["median_us"] for row in mine], provider)
        place.set(xscale="log", yscale="log", xlabel="drafts K", title=f"B={batch}")
        _ticks(place, sorted({row["shape"]["K"] for row in rows}))
    axes[0][0].set_ylabel("us a call")
    _legend_below(figure, axes[0][0])
    figure.suptitle(f"draft_step, window L={length}: time a call from Python (lower is better)", y=1.03)
    return figure


def step(results: Results) -> Figure | None:
    """Everything between two forwards, by provider."""
    rows = _op(results, "step")
    rows = [row for row in rows if row["shape"].get("V")]
    if not rows:
        return None
    cases = list(dict.fromkeys((shape_text(row["shape"]), row["dtype"]) for row in rows))
    providers = [provider for provider, _ in _by_provider(rows)]
    figure, place = pyplot.subplots(figsize=(7.6, 0.5 * len(cases) + 1.2))
    for provider in providers:
        mine = [row for row in rows if row["provider"] == provider]
        places = [cases.index((shape_text(row["shape"]), row["dtype"])) for row in mine]
        colour = COLOURS.get(provider, "#999999")
        place.plot([row["median_us"] / 1e3 for row in mine], places, "o", color=colour, label=provider, markersize=7)
        for row, y in zip(mine, places, strict=True):
            ratio = "" if provider == "eager" or row["ratio"] is None else f" ({row['ratio']:.3g}x)"
            text = f"{time_text(row['median_us'] / 1e6)}{ratio}"
            # Neighbouring points write on different sides of their line.
            side = 0.3 if provider == "compiled" else -0.3
            place.text(row["median_us"] / 1e3, y + side, text, ha="center", va="center", fontsize=7, color=colour)
    place.set_yticks(range(len(cases)), [f"{shape}  {dtype}" for shape, dtype in cases])
    place.set_ylim(len(cases) - 0.4, -0.6)
    place.set(xscale="log", xlabel="milliseconds a step (lower is better)")
    place.margins(x=0.1)
    place.legend(loc="upper left", bbox_to_anchor=(0, -0.9 / (0.5 * len(cases) + 1.2)), ncols=len(providers))
    place.set_title("Everything between two forwards (in brackets: times eager)", loc="left")
    return figure


def scaling(results: Results) -> Figure | None:
    """Points and fitted lines along every axis."""
    rows = of_kind(results, "scaling", "scaling")
    if not rows:
        return None
    panels = list(dict.fromkeys((row["op"], row["axis"], row["dtype"]) for row in rows))
    columns = 4 if len(panels) > 4 else len(panels)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.3 * columns, 3.1 * lines), squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    for place, (op, axis, dtype) in zip(axes.flat, panels, strict=False):
        for row in (row for row in rows if (row["op"], row["axis"], row["dtype"]) == (op, axis, dtype)):
            sizes = [point["size"] for point in row["points"]]
            values = [point["best_us"] for point in row["points"]]
            colour = COLOURS[row["provider"]]
            place.plot(
                sizes, values, "o", color=colour, markersize=4, label=f"{row['provider']}: power {row['exponent']:.2f}"
            )
            fitted = [row["us_at_zero"] + row["us_a_unit"] * size for size in sizes]
            if min(fitted) > 0:
                place.plot(sizes, fitted, "-", color=colour, linewidth=1)
            else:  # a line that crosses zero cannot be drawn on logarithmic axes
                place.plot(sizes, values, ":", color=colour, linewidth=1)
        fixed = next(
            shape_text(row["shape"]) for row in rows if (row["op"], row["axis"], row["dtype"]) == (op, axis, dtype)
        )
        place.set(xscale="log", yscale="log", xlabel=f"{'masked rows' if axis == 'masked' else axis}   ({fixed})")
        place.set_title(f"{op} {dtype}".strip())
        low, high = place.get_ylim()
        place.set_ylim(low, high * 4)  # room for the legend
        _ticks(place, sizes)
        if axis == "V":  # five long names on a logarithmic axis
            place.tick_params(axis="x", rotation=45)
        place.legend(loc="upper left", fontsize=8)
    for line in axes:
        line[0].set_ylabel("us a call")
    figure.suptitle("Time against size (best of the rounds), with the fitted line (dotted: points joined)")
    figure.tight_layout()
    return figure


def decode(results: Results) -> Figure | None:
    """Tokens a forward and speed of the embedded model, against K, block length and batch."""
    rows = [row for row in of_kind(results, "decode", "decode") if row["model"] == "embedded"]
    if not rows:
        return None
    questions: list[tuple[str, str, Callable[[dict[str, int]], bool]]] = [
        ("K", "drafts K  (B=1, block 16)", lambda shape: shape["B"] == 1 and shape["block"] == 16),
        ("block", "block length  (B=1)", lambda shape: shape["B"] == 1),
        ("B", "batch B  (block 16)", lambda shape: shape["block"] == 16),
    ]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.8), sharey="row")
    for column, (dimension, label, belongs) in enumerate(questions):
        mine = [row for row in rows if belongs(row["shape"])]
        if dimension != "K":  # against another dimension, one line a number of drafts
            drawn = {("static", 1), ("freedave", 8), ("freedave", 16)} | (
                {("ahead 1", 8)} if dimension == "B" else set()
            )
            mine = [row for row in mine if (row["provider"], row["shape"]["K"]) in drawn]
        _decode_panels(axes[0][column], axes[1][column], mine, dimension)
        axes[1][column].set_xlabel(label)
    axes[0][0].set_ylabel("tokens a forward")
    axes[1][0].set_ylabel("tokens a second")
    for place in axes[:, 0]:  # rows share their axis; a limit set before all is drawn would cut the rest off
        place.set_ylim(bottom=0)
    handles: dict[str, Any] = {}
    for place in axes.flat:
        handles |= dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)
    figure.suptitle("Whole decodes of the embedded model (higher is better)")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _decode_panels(above: Axes, below: Axes, rows: list[Row], dimension: str) -> None:
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        name = NAMES.get(row["provider"], str(row["provider"]))
        style = "-o"
        if dimension != "K" and row["shape"]["K"] > 1:
            name, style = f"{name}, K={row['shape']['K']}", "-o" if row["shape"]["K"] == 8 else "--s"
        series.setdefault((name, style), []).append(row)
    for (name, style), mine in series.items():
        mine = sorted(mine, key=lambda row: row["shape"][dimension])
        colour = COLOURS[mine[0]["provider"]]
        sizes = [row["shape"][dimension] for row in mine]
        for place, value in ((above, "tokens_per_forward"), (below, "tokens_per_second")):
            values = [row[value] for row in mine]
            if dimension == "K" and mine[0]["provider"] == "static":
                place.axhline(values[0], color=colour, label=name)
            else:
                place.plot(sizes, values, style, color=colour, markersize=4, label=name)
    sizes = sorted({row["shape"][dimension] for row in rows})
    for place in (above, below):
        place.set_xscale("log")
        _ticks(place, sizes)


PICTURES: dict[str, Callable[[Results], Figure | None]] = {
    "predict-tokens-bandwidth": bandwidth,
    "predict-tokens-speedup": speedup,
    "draft-step": drafting,
    "step": step,
    "scaling": scaling,
    "decode": decode,
}


def _op(results: Results, op: str) -> list[Row]:
    """The timings of an op where it is the subject."""
    rows = [row for row in of_kind(results, "step" if op == "step" else "ops", "timing") if row["op"] == op]
    return [row for row in rows if "tiny" not in row["shape"]]  # what a call costs is no point of these curves


def _by_provider(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    providers: dict[str, list[Row]] = {}
    for row in rows:
        if not row["provider"].startswith("read"):
            providers.setdefault(row["provider"], []).append(row)
    return list(providers.items())


def _line(place: Axes, sizes: Sequence[float], values: Sequence[float], provider: str) -> None:
    place.plot(sizes, values, "-o", color=COLOURS.get(provider, "#999999"), markersize=4, label=provider)


def _ticks(place: Axes, sizes: Sequence[float]) -> None:
    """The measured sizes as ticks, and no others."""
    names = [f"{size // 1000}k" if size >= 10000 else f"{size}" for size in sizes]
    place.set_xticks(sizes, names)
    place.minorticks_off()


def _legend_below(figure: Figure, place: Axes, columns: int = 4) -> None:
    handles: Any
    handles, labels = place.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)
