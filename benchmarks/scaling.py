"""Cost against vocabulary, masked rows, drafts K, batch B and window L: one axis at a time, with the fitted line.

All sizes of an axis are timed in the same rounds, so that a slow moment of the machine falls on all of them. Fitted are the
best of the rounds: neighbours take from a call what they like, and a line through that would be a line through their load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks import cases, scenes
from benchmarks.measure import Timing, exponent, line
from benchmarks.processor import Processor
from benchmarks.record import Record, shape_text

ROUNDS, BUDGET = 20, 10.0  # seconds an axis and provider
VOCABULARIES = [32000, 64000, 126464, 151936, 262144]
ROWS = [32, 64, 128, 192, 256]
OTHER_BYTES = 2**28  # read between two sizes: no cache holds as much
DRAFTS = [1, 2, 4, 8, 16, 32]
BATCHES = [1, 2, 4, 8, 16, 32]
LENGTHS = [4, 8, 16, 32, 64, 128, 256]
B, K, L, VOCAB, MASKED = 8, 8, 32, 151936, 256


@dataclass(frozen=True)
class Axis:
    """Cases by size, and the dimensions that stay. `in_memory`: what is read is to come from memory at every size."""

    op: str
    name: str
    fixed: dict[str, int]
    dtype: str
    cases: Mapping[int, cases.Case]
    in_memory: bool = False


def run(record: Record, quick: bool) -> None:
    processor = Processor(3, quick=True) if quick else Processor(ROUNDS, BUDGET)
    for provider, reason in processor.absent.items():
        record.absent(provider, reason)
    for axis in _drafting_axes(quick):
        _measured(record, processor, axis, "cpu")
        _measured(record, processor, axis, "eager")
    for dtype in (torch.float32, torch.bfloat16):
        # One axis at a time: the logits of one are gigabytes.
        for make in (over_rows, over_vocabularies):
            axis = make(dtype, quick)
            for provider in ("cpu", "eager"):
                _measured(record, processor, axis, provider)
            del axis


def over_rows(dtype: torch.dtype, quick: bool = False) -> Axis:
    rows, vocab = ([4, 8, 16], 1000) if quick else (ROWS, VOCAB)
    logits = scenes.rows_of_logits(max(rows), vocab, dtype)
    by_size = {n: cases.prediction(logits, n) for n in rows}
    return Axis(
        "predict_tokens", "masked", {"V": vocab, "rows": max(rows)}, cases.dtype_name(dtype), by_size, not quick
    )


def over_vocabularies(dtype: torch.dtype, quick: bool = False) -> Axis:
    vocabularies, masked = ([500, 1000, 2000], 4) if quick else (VOCABULARIES, MASKED)
    by_size = {n: cases.prediction(scenes.rows_of_logits(masked, n, dtype), masked) for n in vocabularies}
    return Axis("predict_tokens", "V", {"rows": masked, "masked": masked}, cases.dtype_name(dtype), by_size, not quick)


def over_batches(quick: bool = False) -> Axis:
    sizes = BATCHES[:3] if quick else BATCHES
    cpu = torch.device("cpu")
    return Axis("draft_step", "B", {"K": K, "L": L}, "", {n: cases.step_case(n, K, L, cpu) for n in sizes})


def _drafting_axes(quick: bool) -> list[Axis]:
    cpu = torch.device("cpu")
    drafts, lengths = (DRAFTS[:3], LENGTHS[:3]) if quick else (DRAFTS, LENGTHS)
    over_drafts = {n: cases.step_case(B, n, L, cpu) for n in drafts}
    over_lengths = {n: cases.step_case(B, K, n, cpu) for n in lengths}
    return [
        over_batches(quick),
        Axis("draft_step", "K", {"B": B, "L": L}, "", over_drafts),
        Axis("draft_step", "L", {"B": B, "K": K}, "", over_lengths),
    ]


def times(processor: Processor, axis: Axis, provider: str) -> dict[int, Timing]:
    calls: dict[str, cases.Call] = {}
    other = torch.ones(OTHER_BYTES // 4) if axis.in_memory else None
    for n, case in axis.cases.items():
        if other is not None:  # what a cache still holds of the size before would make this one faster than memory is
            calls[f"before {n}"] = other.sum
        calls[str(n)] = case.ours[""] if provider == "cpu" else case.eager
    timings = processor.times(calls)
    return {n: timings[str(n)] for n in axis.cases}


def _measured(record: Record, processor: Processor, axis: Axis, provider: str) -> None:
    timings = times(processor, axis, provider)
    sizes = list(timings)
    seconds = [timing.best for timing in timings.values()]
    fitted, power = line(sizes, seconds), exponent(sizes, seconds)
    text = (
        f"{axis.op:<16}{axis.name} from {sizes[0]} to {sizes[-1]} ({shape_text(axis.fixed)}) {axis.dtype} {provider}: "
        f"{fitted.at_zero * 1e6:.1f} us + {fitted.slope * 1e6:.3g} us x {axis.name}, no point further than "
        f"{fitted.distance:.0%} from the line; grows with the power {power:.2f}"
    )
    record.put(
        "scaling",
        text,
        op=axis.op,
        axis=axis.name,
        shape=axis.fixed,
        dtype=axis.dtype,
        provider=provider,
        rounds=next(iter(timings.values())).rounds,
        points=[{"size": n} | _microseconds(timing) for n, timing in timings.items()],
        us_a_unit=fitted.slope * 1e6,
        us_at_zero=fitted.at_zero * 1e6,
        relative_distance=fitted.distance,
        exponent=power,
    )


def _microseconds(timing: Timing) -> dict[str, float]:
    return {f"{name}_us": value * 1e6 for name, value in dataclasses.asdict(timing).items() if name != "rounds"}
