"""The table of measurements on one processor in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.record import Row, shape_text, time_text
from benchmarks.report import Results, of_kind

Line = tuple[str, str, str]  # what, what was found, the benchmark that measured it


def table(name: str, results: Results) -> str:
    environment = next(iter(results.values()))[0]
    threads = environment["threads"]
    some_other = any(rows[0]["threads"] != threads for rows in results.values())
    loads = [rows[0]["load_average"] for rows in results.values()]
    commits = sorted({(rows[0]["git_commit"] or "unknown")[:10] for rows in results.values()})
    lines = [
        f"{environment['cpu']}, {threads} threads{' where the command says no other' if some_other else ''}, "
        f"{environment['cpu_isa']}, torch {environment['torch']}; "
        f"load average before each benchmark {min(loads):.1f} to {max(loads):.1f}; at commit {', '.join(commits)}; all of it "
        f"in `benchmarks/results/{name}/`:",
        "",
        "| what | measured | command |",
        "|---|---|---|",
    ]
    for source in SOURCES:
        for what, found, benchmark in source(results):
            other = results[benchmark][0]["threads"]
            option = f" --threads {other}" if other != threads else ""
            name, _, part = benchmark.partition("-")
            lines.append(f"| {what} | {found} | `benchmarks {name}{' --only ' if part else ''}{part}{option}` |")
    return "\n".join(lines) + "\n"


def _find(among: list[Row], /, **wanted: object) -> Row | None:
    """The first row with these values; a shape's dimensions count as its values."""
    for row in among:
        values = row | row.get("shape", {})
        if all(values.get(name) == value for name, value in wanted.items()):
            return row
    return None


def _predicting(results: Results) -> Iterator[Line]:
    rows = of_kind(results, "ops", "timing")
    for dtype in ("float32", "bfloat16"):
        for total, masked in ((256, 256), (256, 32)):
            case = {"op": "predict_tokens", "V": 151936, "rows": total, "masked": masked, "dtype": dtype}
            ours, compiled = _find(rows, provider="cpu", **case), _find(rows, provider="compiled", **case)
            if ours is None:
                continue
            found = f"{ours['ratio']:.0f}x eager"
            if compiled is not None:
                found += f", {compiled['median_us'] / ours['median_us']:.1f}x compiled"
            if ours["percent_of_bandwidth"]:
                found += f", {ours['percent_of_bandwidth']:.0f} % of the read bandwidth"
            yield f"`predict_tokens`, {masked} masked of {total} rows, V=151936, {dtype}", found, "ops"
        for op, logits in (("drawn tokens", "normal"), ("drawn tokens, peaked", "peaked")):
            drawn = _find(rows, op=op, provider="cpu, drawn", V=151936, dtype=dtype)
            if drawn is not None:
                yield (
                    f"the same with a temperature, {logits} logits, V=151936, {dtype}",
                    f"{1 / drawn['ratio']:.1f}x the time of greedy",
                    "ops",
                )


def _drafting(results: Results) -> Iterator[Line]:
    rows = [
        _find(of_kind(results, "ops", "timing"), op="draft_step", provider="cpu", B=b, K=8, L=32) for b in (1, 8, 32)
    ]
    found = [f"B={row['shape']['B']}: {row['ratio']:.0f}x eager, {row['median_us']:.0f} us" for row in rows if row]
    if found:
        yield "`draft_step`, K=8, L=32, a call from Python", "; ".join(found), "ops"
    line = _find(of_kind(results, "scaling", "scaling"), op="draft_step", axis="B", provider="cpu")
    if line:
        text = (
            f"{line['us_at_zero']:.1f} us + {line['us_a_unit']:.2f} us a sequence, no point further than "
            f"{100 * line['relative_distance']:.0f} % from the line"
        )
        yield f"`draft_step` over B=1..{line['points'][-1]['size']}", text, "scaling"


def _calling(results: Results) -> Iterator[Line]:
    tiny = [row for row in of_kind(results, "ops", "timing") if row["shape"] == {"tiny": 1}]
    times = {row["op"]: row["median_us"] for row in tiny}
    if times:
        add, step = times.pop("torch.add"), times.pop("draft_step")
        text = f"{min(times.values()):.1f}-{max(times.values()):.1f} us; `draft_step` {step:.1f} us; `torch.add` {add:.1f} us"
        yield "one call on tiny tensors, Python and checks included", text, "ops"


def _stepping(results: Results) -> Iterator[Line]:
    timings, counts = of_kind(results, "step", "timing"), of_kind(results, "step", "counts")
    for batch in (1, 8):
        case = {"B": batch, "K": 8, "L": 32, "V": 151936}
        found = []
        for dtype in ("float32", "bfloat16"):
            if row := _find(timings, provider="cpu", dtype=dtype, **case):
                found.append(f"{row['ratio']:.0f}x eager in {dtype}")
        ours, theirs = (_find(counts, provider=provider, **case) for provider in ("cpu", "eager"))
        if ours and theirs:
            found.append(
                f"{ours['operators']} operator calls and {ours['synchronisations']} host synchronisations instead of "
                f"{theirs['operators']} and {theirs['synchronisations']}"
            )
        if found:
            what = (
                f"the ops between two forwards alone, `predict_tokens` and `draft_step`, B={batch}, K=8, L=32, V=151936"
            )
            yield what, "; ".join(found), "step"


def _decoder(results: Results) -> Iterator[Line]:
    """What a decoder launches of it: with the logits in slices of the vocabulary there are more ops than two."""
    benchmark = "step" if of_kind(results, "step", "decoder_step") else "step-decoder"
    rows = of_kind(results, benchmark, "decoder_step")
    for shape in dict.fromkeys(shape_text(row["shape"]) for row in rows):
        found = [
            f"{row['provider']}: {time_text(row['median_us'] / 1e6)}, our ops alone {time_text(row['ops_us'] / 1e6)}; "
            f"{row['operations']} operations, of which {sum(row['ops'].values())} are ours"
            for row in rows
            if shape_text(row["shape"]) == shape
        ]
        yield (
            f"`Decoder.launch` and `poll` without the model's forward, {shape}, by executor",
            ". ".join(found),
            benchmark,
        )


def _projecting(results: Results) -> Iterator[Line]:
    timings, peaks = of_kind(results, "projection", "timing"), of_kind(results, "projection", "memory")
    for row in timings:
        if row["provider"] != "slices" or row["shape"]["V"] != 151936 or row["shape"]["rows"] not in (32, 256):
            continue
        case = {"dtype": row["dtype"], **row["shape"]}
        ours, whole = (_find(peaks, provider=provider, **case) for provider in ("slices", "all logits"))
        found = f"{row['ratio']:.2f}x the speed of all logits at once"
        if ours and whole:
            found += f", at most {ours['peak_bytes'] / 2**20:.0f} MiB instead of {whole['peak_bytes'] / 2**20:.0f}"
        what = f"features to predictions, {row['shape']['rows']} rows, H={row['shape']['H']}, V=151936, {row['dtype']}"
        yield what, found, "projection"


def _decoding(results: Results) -> Iterator[Line]:
    rows = of_kind(results, "decode", "decode")
    for model in dict.fromkeys(row["model"] for row in rows):
        for batch in sorted({row["shape"]["B"] for row in rows if row["model"] == model}):
            found = []
            for provider, count in (("freedave", 8), ("ahead 1", 8), ("freedave", 16), ("ahead 1", 16)):
                row = _find(rows, model=model, provider=provider, B=batch, K=count, block=16)
                if row and row["ratio"] is not None:
                    name = f"K={count}{', lookahead 1' if provider == 'ahead 1' else ''}"
                    same = "" if row["identical_to_static"] else ", NOT the static tokens"
                    found.append(
                        f"{name}: {row['tokens_per_forward']:.1f} tokens a forward, {row['ratio']:.1f}x static, "
                        f"{100 * row['share_outside_forward']:.1f} % of the time outside the forward{same}"
                    )
            if found:
                yield f"whole decodes, {model} model, B={batch}, blocks of 16", "; ".join(found), "decode"


def _choosing(results: Results) -> Iterator[Line]:
    benchmark = "decode" if of_kind(results, "decode", "choice") else "decode-choices"
    for row in of_kind(results, benchmark, "choice"):
        found = f"{row['against_static']:.2f}x static"
        if row["best"] != "static":
            found += f", {row['against_best']:.2f}x the best fixed setting, {row['best']}"
        if not all(way["identical_to_static"] for way in row["ways"]):
            found += ", NOT the static tokens"
        shape = f"B={row['shape']['B']}, blocks of {row['shape']['block']}"
        yield f'tokens a second with `draft_steps="auto"`, {row["model"]} model, {shape}', found, benchmark


def _launching(results: Results) -> Iterator[Line]:
    rows = [row for row in of_kind(results, "overhead", "timing") if row["provider"] == "triton, a launch"]
    times = {row["op"]: row["median_us"] for row in rows}
    if times:
        step = times.pop("draft_step")
        text = f"{min(times.values()):.0f}-{max(times.values()):.0f} us, `draft_step` {step:.0f} us, checks included"
        yield "a launch of the Triton ops from Python, the driver stubbed", text, "overhead"


def _targets(results: Results) -> Iterator[Line]:
    rows = of_kind(results, "check", "target")
    missed = [
        f"{row['name']} ({row['found']:.1f} instead of {row['limit']:g} {row['unit']})"
        for row in rows
        if not row["held"]
    ]
    if rows:
        text = f"{len(rows) - len(missed)} of {len(rows)} held" + (f"; missed: {'; '.join(missed)}" if missed else "")
        yield "the stated targets", text, "check"


SOURCES: list[Callable[[Results], Iterator[Line]]] = [
    _predicting,
    _drafting,
    _calling,
    _stepping,
    _decoder,
    _projecting,
    _decoding,
    _choosing,
    _launching,
    _targets,
]
