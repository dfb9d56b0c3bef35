"""The table of measurements on one GPU in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.record import Row, shape_text
from benchmarks.report import Results

# The key-value heads and windows of SDAR-8B's and LLaDA-8B's steps; their record has more shapes of `draft_attention`.
ATTENDING = {8: (20, "SDAR-8B's heads"), 32: (32, "LLaDA-8B's heads")}


class Line(NamedTuple):
    """`part`: the one of `benchmarks gpu` that measured it."""

    what: str
    target: str
    found: str
    part: str


def on_a_gpu(results: Results) -> bool:
    return any(benchmark.split("-")[0] in ("gpu", "tune") for benchmark in results)


def table(name: str, results: Results) -> str:
    lines = []
    for benchmark, rows in results.items():
        commit = (rows[0]["git_commit"] or "unknown")[:10] + (", with changes" if rows[0]["git_dirty"] else "")
        machine = next((row for row in rows if row.get("text") == "machine"), {})
        bandwidth = next((row["gb_per_s"] for row in rows if "gb_per_s" in row and row["kind"] == "note"), 0)
        found = [
            f"| {line.what} | {line.target} | {line.found} | `benchmarks gpu --only {line.part}` |"
            for source in SOURCES
            for line in source(rows)
        ]
        if not found:  # the tiles that were tried have no line of their own
            continue
        lines += [
            f"{machine.get('gpu', name)}, CUDA {machine.get('cuda')}, driver {machine.get('driver')}, torch "
            f"{rows[0]['torch']}; a large copy moves {bandwidth:.0f} GB/s; at commit {commit}; all of it in "
            f"`benchmarks/results/{name}/{benchmark}.jsonl`:",
            "",
            "| what | target | measured | command |",
            "|---|---|---|---|",
            *found,
            "",
        ]
    return "\n".join(lines)


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _judged(text: str, held: bool | None) -> str:
    return f"**{text}, missed**" if held is False else text


def _steps(rows: list[Row]) -> Iterator[Line]:
    kernels = {row["case"]: row["kernels"] for row in _of_kind(rows, "kernels")}
    for row in _of_kind(rows, "decode_step"):
        found = _judged(f"{row['ms']:.2f} ms", row["held"])
        found += f", of which {100 * row['host_share']:.1f} % the host's; "
        found += f"reading the weights once {row['limit_ms']:.2f} ms; {row['tokens']} tokens"
        if row["case"] in kernels:
            found += f", {kernels[row['case']]} kernels"
        found += f"; {row['peak_memory_gb']:.1f} GB"
        target = "" if row["target_ms"] is None else f"{row['target_ms']:.1f} ms"
        first = row["target_ms"] is not None or row["compile"] is False
        yield Line(f"a step, {row['case']}", target, found, "decode" if first else "more")


def _preparing(rows: list[Row]) -> Iterator[Line]:
    steps = _of_kind(rows, "decode_step")
    for what, name in (("compiling", "first_run_seconds"), ("capturing", "second_run_seconds")):
        seconds = [value for row in steps if row["compile"] is not False for value in row[name].values()]
        if seconds:
            found = f"{min(seconds):.2g} to {max(seconds):.2g} s"
            yield Line(f"before the first replay of a shape: the run with {what}", "", found, "decode")


def _lossless(rows: list[Row]) -> Iterator[Line]:
    for row in _of_kind(rows, "lossless"):
        what = f"{row['case']}: tokens and steps in which K={row['K']} differs from {row['against']}"
        differ, steps = row["tokens_that_differ"], row["steps_that_differ"]
        target = "" if "its own" in row["against"] else "0"
        found = f"{differ} and {steps} of {row['total']} ({row['rows_of_a_step']} rows a step)"
        yield Line(what, target, found, "lossless")


def _answers(rows: list[Row]) -> Iterator[Line]:
    answers = _of_kind(rows, "answers")
    for dtype, by in dict.fromkeys((row["dtype"], row["by"]) for row in answers):
        mine = sorted((row for row in answers if (row["dtype"], row["by"]) == (dtype, by)), key=lambda row: row["K"])
        found = []
        for row in mine:
            target = row["target_ms"]
            found.append(f"K={row['K']}: " + _judged(f"{row['ms']:.1f} ms", target is None or row["ms"] <= target))
        targets = [f"K={row['K']}: {row['target_ms']:.0f} ms" for row in mine if row["target_ms"] is not None]
        same = "the CPU's tokens" if all(row["same_as_cpu"] for row in mine) else "OTHER tokens than the CPU's"
        what = f"embedded model, an answer of {mine[0]['tokens']} tokens, {dtype}, by `{by}`"
        yield Line(what, ", ".join(targets), f"{', '.join(found)}; {same}", "embedded")
    for row in _of_kind(rows, "host_share"):
        share = f"{row['ms']:.3f} ms, of which {100 * row['host_share']:.0f} % the host's"
        yield Line(f"a step, {row['case']}", "", share, "embedded")


def _chosen(rows: list[Row]) -> Iterator[Line]:
    for row in _of_kind(rows, "drafts_chosen"):
        ways = ", ".join(f"{'' if way == 'auto' else 'K='}{way} {ms:.1f}" for way, ms in row["ms"].items())
        static, best = row["against_static"], row["against_best"]
        target = "0.97 of static's speed, 0.95 of the best fixed K's"
        held = static >= 0.97 and best >= 0.95
        speeds = _judged(f"{static:.2f} and {best:.2f}", held)
        yield Line(f'`draft_steps="auto"`, {row["case"]}', target, f"{speeds}; ms an answer: {ways}", "chosen")


def _attending(rows: list[Row]) -> Iterator[Line]:
    timings = [row for row in _of_kind(rows, "timing") if row["op"] == "draft_attention"]
    for groups, (length, heads) in ATTENDING.items():
        for drafts in (1, 8):
            shape = {"B": 1, "K": drafts, "L": length, "G": groups}
            mine = [row for row in timings if shape.items() <= row["shape"].items()]
            mine.sort(key=lambda row: row["shape"]["T"])
            if mine:
                stored = " / ".join(f"{size:,}" for size in dict.fromkeys(row["shape"]["T"] for row in mine))
                ours, others = (
                    " / ".join(f"{row['median_us']:.1f}" for row in mine if (row["provider"] == row["op"]) is our_own)
                    for our_own in (True, False)
                )
                what = f"`draft_attention`, {heads}, K={drafts}, L={length}, {stored} stored keys"
                yield Line(what, "", f"{ours} us; PyTorch's over keys joined before {others}", "attention")


OPS = ("predict_tokens", "drawn tokens", "draft_step", "step")


def _ops(rows: list[Row]) -> Iterator[Line]:
    timings = [row for row in _of_kind(rows, "timing") if row["op"] in OPS]
    for op, shape, dtype in dict.fromkeys((row["op"], shape_text(row["shape"]), row["dtype"]) for row in timings):
        found: dict[str, str] = {}  # a provider that was timed twice: the first time, against eager
        for row in timings:
            if (row["op"], shape_text(row["shape"]), row["dtype"]) == (op, shape, dtype):
                share = row["percent_of_bandwidth"]
                text = f"{row['provider']} {row['median_us']:.1f}" + ("" if share is None else f" ({share:.0f} %)")
                found.setdefault(row["provider"], text)
        named = {"step": "`predict_tokens` and `draft_step`", "drawn tokens": "`predict_tokens` with a temperature"}
        name = named.get(op, f"`{op}`")
        shared = " (of the copy's bandwidth)" if any("%" in text for text in found.values()) else ""
        yield Line(
            f"{name}, {shape}{', ' if dtype else ''}{dtype}", "", f"us: {', '.join(found.values())}{shared}", "ops"
        )


def _decoder(rows: list[Row]) -> Iterator[Line]:
    for row in _of_kind(rows, "decoder_step"):
        parts = ", ".join(f"{what} {number}" for what, number in row["kernels_of_parts"].items())
        found = (
            f"{row['driver_calls']} calls of the driver, {row['synchronisations']} synchronisations; "
            f"{row['kernels']} kernels and copies on the device ({parts})"
        )
        yield Line(f"`Decoder.launch` and `poll`, {row['model']} model, {shape_text(row['shape'])}", "", found, "ops")


def _checks(rows: list[Row]) -> Iterator[Line]:
    for row in _of_kind(rows, "checks"):
        part = "contract" if "draft_attention" in row["what"] else "other_contracts"
        yield Line(row["what"], "all", row["last"].split(" in ")[0], part)


SOURCES: list[Callable[[list[Row]], Iterator[Line]]] = [
    _steps,
    _preparing,
    _lossless,
    _answers,
    _chosen,
    _attending,
    _ops,
    _decoder,
    _checks,
]
