"""Cost against vocabulary, masked rows, drafts K, batch B and window L: one axis at a time, with the fitted line.

All sizes of an axis are timed in the same rounds, so that a slow moment of the machine falls on all of them. Fitted are the
best of the rounds: neighbours take from a call what they like, and a line through that would be a line through their load.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks import cases, scenes
from benchmarks.measure import Timing, exponent, line, mean
from benchmarks.processor import Processor
from benchmarks.record import Record, shape_text

ROUNDS, BUDGET = 20, 10.0  # seconds an axis and provider
WINDOW_ROUNDS = 500  # of calls that take microseconds: for seconds, so that some of them are quiet
VOCABULARIES = [32000, 64000, 126464, 151936, 262144]
ROWS = [32, 64, 128, 192, 256]
OTHER_BYTES = 2**28  # read before every call: no cache holds as much
WAKING_CALLS, WAKING_VOCAB = 5, 2**18
DRAFTS = [1, 2, 4, 8, 16, 32]
BATCHES = [1, 2, 4, 8, 16, 32]
LENGTHS = [4, 8, 16, 32, 64, 128, 256]
B, K, L, VOCAB, MASKED = 8, 8, 32, 151936, 256


@dataclass(frozen=True)
class Axis:
    """Cases by size, and the dimensions that stay; several of one size count as their mean.

    `in_memory`: what is read is to come from memory at every size.
    """

    op: str
    name: str
    fixed: dict[str, int]
    dtype: str
    cases: Mapping[int, Sequence[cases.Case]]
    in_memory: bool = False


def run(record: Record, quick: bool) -> None:
    processor = Processor(3, quick=True) if quick else Processor(ROUNDS, BUDGET)
    for provider, reason in processor.absent.items():
        record.absent(provider, reason)
    short = for_windows(processor)
    for axis in _drafting_axes(quick):
        _measured(record, short, axis, "cpu")
        _measured(record, short, axis, "eager")
    for dtype in (torch.float32, torch.bfloat16):
        # One axis at a time: the logits of one are gigabytes.
        for make in (over_rows, over_vocabularies):
            axis = make(dtype, quick)
            for provider in ("cpu", "eager"):
                _measured(record, processor, axis, provider)
            del axis


def for_windows(processor: Processor) -> Processor:
    return processor if processor.quick else dataclasses.replace(processor, rounds=WINDOW_ROUNDS)


def over_rows(dtype: torch.dtype, quick: bool = False) -> Axis:
    rows, vocab = ([4, 8, 16], 1000) if quick else (ROWS, VOCAB)
    most = max(rows)
    logits, order = scenes.rows_of_logits(most, vocab, dtype), torch.randperm(most)

    def every_row_as_often(n: int) -> list[cases.Case]:
        # A page of memory is not read as fast as the next one: every size reads all of it, in as many calls as that takes.
        calls = math.lcm(n, most) // n
        return [cases.prediction(logits, n, order[torch.arange(i * n, (i + 1) * n) % most]) for i in range(calls)]

    by_size = {n: every_row_as_often(n) for n in rows}
    return Axis("predict_tokens", "masked", {"V": vocab, "rows": most}, cases.dtype_name(dtype), by_size, not quick)


def over_vocabularies(dtype: torch.dtype, quick: bool = False) -> Axis:
    vocabularies, masked = ([500, 1000, 2000], 4) if quick else (VOCABULARIES, MASKED)
    by_size = {n: [cases.prediction(scenes.rows_of_logits(masked, n, dtype), masked)] for n in vocabularies}
    return Axis("predict_tokens", "V", {"rows": masked, "masked": masked}, cases.dtype_name(dtype), by_size, not quick)


def over_batches(quick: bool = False) -> Axis:
    sizes = BATCHES[:3] if quick else BATCHES
    cpu = torch.device("cpu")
    return Axis("draft_step", "B", {"K": K, "L": L}, "", {n: [cases.step_case(n, K, L, cpu)] for n in sizes})


def _drafting_axes(quick: bool) -> list[Axis]:
    cpu = torch.device("cpu")
    drafts, lengths = (DRAFTS[:3], LENGTHS[:3]) if quick else (DRAFTS, LENGTHS)
    over_drafts = {n: [cases.step_case(B, n, L, cpu)] for n in drafts}
    over_lengths = {n: [cases.step_case(B, K, n, cpu)] for n in lengths}
    return [
        over_batches(quick),
        Axis("draft_step", "K", {"B": B, "L": L}, "", over_drafts),
        Axis("draft_step", "L", {"B": B, "K": K}, "", over_lengths),
    ]


def times(processor: Processor, axis: Axis, provider: str) -> dict[int, Timing]:
    """Seconds a call by size."""
    calls: dict[str, cases.Call] = {}
    before = _out_of_caches(axis.dtype, provider) if axis.in_memory else None
    for n, of_one_size in axis.cases.items():
        for i, case in enumerate(of_one_size):
            if before is not None:
                calls[f"before {n}, {i}"] = before
            calls[f"{n}, {i}"] = _call(case, provider)
    timings = processor.times(calls)
    return {n: mean([timings[f"{n}, {i}"] for i in range(len(of_one_size))]) for n, of_one_size in axis.cases.items()}


def _call(case: cases.Case, provider: str) -> cases.Call:
    return case.ours[""] if provider == "cpu" else case.eager


def _out_of_caches(dtype: str, provider: str) -> cases.Call:
    """Reads other memory, and then calls the op on little of it.

    What a cache still held of the logits would make a call faster than memory is. But the code of the call, and Python's,
    would be in no cache either, which costs once what one or two rows cost: 86 us were measured.
    """
    other = torch.ones(OTHER_BYTES // 4)
    waking = _call(cases.prediction(scenes.rows_of_logits(1, WAKING_VOCAB, getattr(torch, dtype)), 1), provider)

    def before() -> None:
        other.sum()
        for _ in range(WAKING_CALLS):
            waking()

    return before


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
        rounds=timings[sizes[0]].rounds,
        points=[{"size": n} | _microseconds(timing) for n, timing in timings.items()],
        us_a_unit=fitted.slope * 1e6,
        us_at_zero=fitted.at_zero * 1e6,
        relative_distance=fitted.distance,
        exponent=power,
    )


def _microseconds(timing: Timing) -> dict[str, float]:
    return {f"{name}_us": value * 1e6 for name, value in dataclasses.asdict(timing).items() if "rounds" not in name}
