"""Every op over real shapes, against eager and compiled PyTorch; `predict_tokens` also against the memory bandwidth measured
in the same rounds. And what a call costs when there is nothing to compute.
"""

from __future__ import annotations

import functools
import itertools

import torch

import freedave_kernels as fk
from benchmarks import cases, scenes
from benchmarks.processor import Processor
from benchmarks.record import Record
from benchmarks.scenes import MASK

ROUNDS, BUDGET = 30, 4.0  # of a shape of predict_tokens, whose largest take seconds a round
DRAWN_ROWS = 32
WINDOW_BUDGET = 0.3  # seconds; there are two hundred of these cases, and a round of most takes a millisecond


def run(record: Record, quick: bool) -> None:
    shapes = cases.QUICK if quick else cases.FULL
    processor = Processor(3, quick=True) if quick else Processor(ROUNDS, BUDGET)
    for provider, reason in processor.absent.items():
        record.absent(provider, reason)
    for case in cases.prediction_cases(shapes, processor):
        if isinstance(case, cases.Case):
            cases.measure(record, processor, case)
        else:
            record.absent("all", case[1], "predict_tokens", case[0])
    for dtype in shapes.dtypes:
        drawn_tokens(record, processor, 1000 if quick else 151936, dtype)
    small = processor if quick else Processor(ROUNDS, WINDOW_BUDGET)
    for case in itertools.chain(
        cases.part_cases(shapes, processor.device),
        cases.floor_cases(shapes, processor.device),
        cases.window_cases(shapes, processor.device),
        cases.keep_cases(shapes, processor.device),
    ):
        cases.measure(record, small, case)
    print()
    record_overhead(record, processor)


def drawn_tokens(record: Record, processor: Processor, vocab: int, dtype: torch.dtype) -> None:
    """`predict_tokens` of a block of masked rows, with a temperature and without: of normal logits, any of which
    may be drawn, and of peaked ones."""
    input_ids = torch.full((DRAWN_ROWS,), MASK)
    for op, make in (("drawn tokens", scenes.rows_of_logits), ("drawn tokens, peaked", scenes.peaked_rows)):
        greedy = functools.partial(fk.predict_tokens, make(DRAWN_ROWS, vocab, dtype), input_ids, MASK)
        drawn = functools.partial(greedy, **cases.drawing(DRAWN_ROWS, processor.device))
        timings = processor.times({"cpu": greedy, "cpu, drawn": drawn})
        cases.record_drawn(record, {"V": vocab, "rows": DRAWN_ROWS}, dtype, timings, op)


def record_overhead(record: Record, processor: Processor) -> dict[str, float]:
    """A whole call from Python on tensors so small that the call is all there is: median seconds by op, in quiet rounds."""
    timings = processor.quiet_times(tiny_calls())
    for name, timing in timings.items():
        record.add(name, {"tiny": 1}, "", {"cpu": timing})
    return {name: timing.median for name, timing in timings.items()}


def tiny_calls() -> dict[str, cases.Call]:
    logits, input_ids = torch.randn(1, 4, 16), torch.tensor([[MASK, 1, 2, 3]])
    confidence, masked = torch.rand(1, 4), input_ids == MASK
    scene = scenes.drafts(1, 2, 4)
    tokens = torch.zeros_like(input_ids)
    states = fk.partial_predictions(logits, input_ids, MASK)
    predictions = (scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts)
    return {
        "predict_tokens": lambda: fk.predict_tokens(logits, input_ids, MASK),
        "partial_predictions": lambda: fk.partial_predictions(logits, input_ids, MASK),
        "merge_predictions": lambda: fk.merge_predictions(states, input_ids),
        "logit_floor": lambda: fk.logit_floor(logits, top_k=3, top_p=0.9),
        "rank_positions": lambda: fk.rank_positions(confidence, masked),
        "select_transfer": lambda: fk.select_transfer(confidence, masked),
        "build_drafts": lambda: fk.build_drafts(input_ids, tokens, confidence, MASK, 2),
        "verify_drafts": lambda: fk.verify_drafts(scene.drafts, scene.drafts),
        "draft_step": lambda: fk.draft_step(*predictions, MASK, 2),
    }
