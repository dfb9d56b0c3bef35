"""The stated speed targets, and how each is measured: a number, its limit, and whether the machine decides as well."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks import cases, decode, ops, scaling, scenes
from benchmarks.measure import line, proportional
from benchmarks.processor import YARDSTICK, Processor
from benchmarks.record import Record

MACHINE = "absolute time: depends on the machine"
NEIGHBOURS = "depends on how much of the memory bandwidth neighbours leave to the run"


@dataclass(frozen=True)
class Found:
    """A target and what was measured. `at`: "least" if found must reach the limit, "most" if it must not exceed it."""

    name: str
    found: float
    at: Literal["least", "most"]
    limit: float
    unit: str
    machine_dependent: str = ""

    @property
    def held(self) -> bool:
        return (operator.ge if self.at == "least" else operator.le)(self.found, self.limit)

    def text(self) -> str:
        sign = ">=" if self.at == "least" else "<="
        verdict = "held" if self.held else "FAILED"
        note = f"  ({self.machine_dependent})" if self.machine_dependent else ""
        return f"{verdict:<8}{self.name:<74}{self.found:>9.2f} {sign} {self.limit:g} {self.unit}{note}"


def measured(record: Record, quick: bool) -> Iterator[Found]:
    """Everything that is measured on the way goes into the record as rows of its own."""
    processor = Processor(3, quick=True) if quick else Processor(20, 12.0)
    yield from _prediction(record, processor if quick else Processor(100, 30.0, quiet=True), quick)
    yield from _proportional_to_rows(processor if quick else Processor(60, 20.0), quick)
    yield from _draft_step(record, processor, quick)
    for op, seconds in ops.record_overhead(record, processor).items():
        if op != YARDSTICK:
            yield Found(f"{op}: a call on tiny tensors", seconds * 1e6, "most", 5, "us", MACHINE)
    yield from _decoding(record, quick)


def _prediction(record: Record, processor: Processor, quick: bool) -> Iterator[Found]:
    rows, vocab = (32, 1000) if quick else (256, 151936)
    for dtype, share in ((torch.float32, 85), (torch.bfloat16, 70)):
        case = cases.prediction(scenes.rows_of_logits(rows, vocab, dtype), rows)
        timings = cases.measure(record, processor, case)
        if timings is None:
            continue
        name = f"predict_tokens {cases.dtype_name(dtype)}, {rows} rows x {vocab}"
        ours = timings["cpu"].median
        reading = [timing.median for provider, timing in timings.items() if provider.startswith("read")]
        if reading:
            found = 100 * min(reading) / ours
            yield Found(f"{name}: share of the read bandwidth", found, "least", share, "%", NEIGHBOURS)
        yield Found(f"{name}: times eager", timings["eager"].median / ours, "least", 20, "x")
        if "compiled" in timings:
            yield Found(f"{name}: times compiled", timings["compiled"].median / ours, "least", 10, "x")


def _proportional_to_rows(processor: Processor, quick: bool) -> Iterator[Found]:
    """By the best of the rounds: of what is left to a call, neighbours take a different part each time."""
    for dtype in (torch.float32, torch.bfloat16):
        axis = scaling.over_rows(dtype, quick)
        timings = scaling.times(processor, axis, "cpu")
        fitted = proportional(list(timings), [timing.best for timing in timings.values()])
        name = f"predict_tokens {axis.dtype}: from time proportional to masked rows"
        yield Found(name, 100 * fitted.distance, "most", 5, "%", NEIGHBOURS)


def _draft_step(record: Record, processor: Processor, quick: bool) -> Iterator[Found]:
    timings = cases.measure(record, processor, cases.step_case(1, 8, 32, processor.device))
    assert timings is not None
    ratio = timings["eager"].median / timings["cpu"].median
    yield Found("draft_step B=1, K=8, L=32: times eager", ratio, "least", 40, "x")
    alone = processor.quiet_times({"cpu": cases.step_case(1, 8, 32, processor.device).ours[""]})["cpu"].median
    yield Found("draft_step B=1, K=8, L=32: a call from Python", alone * 1e6, "most", 12, "us", MACHINE)
    by_batch = scaling.times(scaling.for_windows(processor), scaling.over_batches(quick), "cpu")
    fitted = line(list(by_batch), [timing.best for timing in by_batch.values()])
    name = f"draft_step: from a line over B=1..{max(by_batch)}"
    yield Found(name, 100 * fitted.distance, "most", 5, "%")


def _decoding(record: Record, quick: bool) -> Iterator[Found]:
    way = decode.Way(1, 16, 8)
    embedded = decode.embedded({1}, rounds=2 if quick else 7, max_new_tokens=16 if quick else 96)
    outside = decode.measure(record, embedded, [way.static, way])
    yield Found("decode embedded, K=8: time outside the forward", 100 * outside[way].outside, "most", 10, "%")
    random = decode.random({1}, rounds=3, tiny=quick)
    outside = decode.measure(record, random, [way.static, way])
    yield Found("decode random 156 M, K=8: time outside the forward", 100 * outside[way].outside, "most", 2, "%")
    for model in ("embedded", "random"):
        for batch, block_length in decode.QUICK_CELLS if quick else decode.CELLS_OF_CHECK:
            chosen = decode.measure_choice(record, model, batch, block_length, quick)
            name = f"decode {model} B={batch}, block {block_length}, auto: tokens a second"
            yield Found(f"{name} against static", chosen.against_static, "least", 0.97, "x")
            yield Found(f"{name} against the best fixed setting", chosen.against_best, "least", 0.95, "x")
