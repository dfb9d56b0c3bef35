"""One HTML page that needs nothing else: pictures and tables are inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.record import Row, shape_text, time_text
from benchmarks.report import Results, of_kind

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
caption { text-align: left; font-weight: 600; padding: 4px 0 }
th, td { padding: 3px 9px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left; white-space: normal }
th { background: #f5f5f5; position: sticky; top: 0 }
img { max-width: 100%; height: auto; margin: 0.8em 0; display: block }
.failed { color: #b00020; font-weight: 600 }
.held { color: #19703a }
details { margin: 0.6em 0; overflow-x: auto }
summary { cursor: pointer; font-weight: 600 }
"""


def html(machines: dict[str, Results], pictures: dict[str, list[Path]]) -> str:
    body = [
        "<h1>freedave-kernels: measurements</h1>",
        "<p>Every provider is timed in turn in the same rounds; compare ratios, not seconds of different runs. "
        "<em>eager</em> does what the public implementation does; <em>compiled</em> is torch.compile of the best eager "
        "form; times are medians.</p>",
    ]
    for name, results in machines.items():
        body += [f"<h2>{escape(name)}</h2>", *_machine(results, pictures.get(name, []))]
    body += ["<h2>The limit on GPUs</h2>", _gpu_limits()]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>freedave-kernels: measurements</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _machine(results: Results, pictures: list[Path]) -> Iterable[str]:
    yield _environment(results)
    yield _targets(of_kind(results, "check", "target") + of_kind(results, "check", "regression"))
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        yield f"<img alt='{escape(path.stem)}' src='data:image/png;base64,{data}'>"
    for benchmark in results:
        if benchmark != "check":
            yield from _details(benchmark, results)
    yield _absent(results)


def _environment(results: Results) -> str:
    names = (
        "cpu",
        "threads",
        "cpu_isa",
        "torch",
        "python",
        "compiler",
        "git_commit",
        "git_dirty",
        "load_average",
        "quick",
    )
    rows = [[benchmark, *(rows[0].get(name) for name in names)] for benchmark, rows in results.items()]
    return _table("What was run", ["benchmark", *names], rows)


def _targets(rows: list[Row]) -> str:
    def verdict(row: Row) -> str:
        return "<span class='held'>held</span>" if row["held"] else "<span class='failed'>failed</span>"

    lines = [
        [escape(row["name"]), f"{row['found']:.2f} {row['unit']}", f"{row['at']} {row['limit']:g}", verdict(row),
         escape(row.get("machine_dependent", ""))]
        for row in rows
    ]  # fmt: skip
    return (
        _table("Targets and regressions", ["target", "found", "limit", "", "note"], lines, escaped=True)
        if lines
        else ""
    )


def _details(benchmark: str, results: Results) -> Iterable[str]:
    timings = [
        [row["op"], shape_text(row["shape"]), row["dtype"], row["provider"], time_text(row["median_us"] / 1e6),
         f"{time_text(row['lower_quartile_us'] / 1e6)} - {time_text(row['upper_quartile_us'] / 1e6)}", row["rounds"],
         _number(row["ratio"]), _number(row["gb_per_s"]), _number(row["percent_of_bandwidth"])]
        for row in of_kind(results, benchmark, "timing")
    ]  # fmt: skip
    headings = [
        "op",
        "shape",
        "dtype",
        "provider",
        "median",
        "quartiles",
        "rounds",
        "x baseline",
        "GB/s",
        "% bandwidth",
    ]
    yield _folded(f"{benchmark}: timings", headings, timings)
    counts = [
        [shape_text(row["shape"]), row["dtype"], row["provider"], row["operators"], row["synchronisations"],
         row["allocations"], f"{row['bytes'] / 1e6:.2f}"]
        for row in of_kind(results, benchmark, "counts")
    ]  # fmt: skip
    headings = ["shape", "dtype", "provider", "operator calls", "synchronisations", "allocations", "MB allocated"]
    yield _folded(f"{benchmark}: what one step makes torch do", headings, counts)
    scaled = [
        [row["op"], row["axis"], shape_text(row["shape"]), row["dtype"], row["provider"], f"{row['us_at_zero']:.1f}",
         f"{row['us_a_unit']:.3g}", f"{100 * row['relative_distance']:.1f} %", f"{row['exponent']:.2f}"]
        for row in of_kind(results, benchmark, "scaling")
    ]  # fmt: skip
    headings = ["op", "axis", "fixed", "dtype", "provider", "us at 0", "us a unit", "furthest point", "power"]
    yield _folded(f"{benchmark}: fitted lines", headings, scaled)
    decodes = [
        [row["model"], row["provider"], shape_text(row["shape"]), f"{row['median']:.2f}", f"{row['tokens_per_second']:.1f}",
         row["forwards"], f"{row['tokens_per_forward']:.2f}", _number(row["ratio"], 2),
         f"{100 * row['share_outside_forward']:.1f} %", {True: "yes", False: "NO"}.get(row["identical_to_static"], "")]
        for row in of_kind(results, benchmark, "decode")
    ]  # fmt: skip
    headings = ["model", "decoding", "shape", "seconds", "tokens/s", "forwards", "tokens/forward", "x static"]
    headings += ["outside forward", "identical"]
    yield _folded(f"{benchmark}: whole decodes", headings, decodes)
    if notes := of_kind(results, benchmark, "note"):
        yield f"<details><summary>{benchmark}: notes</summary>" + "".join(
            f"<p>{escape(row['text'])}</p>" for row in notes
        )
        yield "</details>"


def _absent(results: Results) -> str:
    rows = [
        [benchmark, row["op"], shape_text(row["shape"]), row["provider"], row["reason"]]
        for benchmark in results
        for row in of_kind(results, benchmark, "absent")
    ]
    return _folded("Not measured, and why", ["benchmark", "op", "shape", "provider", "reason"], rows)


def _gpu_limits() -> str:
    gpus = list(limits.DATA_SHEET)
    rows = [
        [
            limit.op,
            limit.shape,
            limit.dtype,
            f"{limit.num_bytes / 1e6:.3f}",
            *(f"{limit.microseconds(gpu):.2f}" for gpu in gpus),
        ]
        for limit in limits.on_gpus()
    ]
    headings = [
        "op",
        "shape",
        "dtype",
        "MB",
        *(f"{gpu}, us ({bandwidth / 1e12:g} TB/s)" for gpu, bandwidth in limits.DATA_SHEET.items()),
    ]
    text = "<p><strong>Computed, not measured</strong>: bytes that a call cannot avoid to move, at data-sheet bandwidths.</p>"
    return text + _table("Least time a call", headings, rows)


def _folded(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    return f"<details><summary>{escape(title)} ({len(rows)})</summary>{_table('', headings, rows)}</details>"


def _table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], escaped: bool = False) -> str:
    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        return f"<td{'' if len(text) < 60 else ' class=text'}>{text if escaped else escape(text)}</td>"

    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
