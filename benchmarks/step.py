"""A decoding step without its forward: the two ops alone against eager PyTorch, and what a `Decoder` launches for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

import freedave_kernels as fk
from benchmarks import cases, decoder_step, eager, roofline, scenes, vectorised
from benchmarks.counts import counted
from benchmarks.processor import Processor
from benchmarks.record import Record, shape_text
from benchmarks.scenes import MASK

ROUNDS, BUDGET = 20, 6.0
# B, K, L, V, dtype: batch 1 on the published vocabularies and windows, then larger batches.
SHAPES = [
    (1, 8, 32, 151936, torch.float32),
    (1, 8, 32, 151936, torch.bfloat16),
    (1, 8, 4, 151936, torch.bfloat16),
    (1, 8, 32, 126464, torch.bfloat16),
    (1, 16, 64, 126464, torch.bfloat16),
    (8, 8, 32, 151936, torch.bfloat16),
    (32, 8, 4, 151936, torch.bfloat16),
    (32, 8, 32, 32000, torch.bfloat16),
]
QUICK = [(1, 4, 8, 1000, torch.float32), (2, 4, 8, 1000, torch.bfloat16)]


def run(record: Record, quick: bool, only: Sequence[str] = ("ops", "decoder")) -> None:
    if "ops" in only:
        ops_alone(record, quick)
    if "decoder" in only:
        decoder_step.run(record, quick)


def ops_alone(record: Record, quick: bool) -> None:
    processor = Processor(3, quick=True) if quick else Processor(ROUNDS, BUDGET)
    for provider, reason in processor.absent.items():
        record.absent(provider, reason)
    for shape in QUICK if quick else SHAPES:
        case = step(*shape)
        if cases.measure(record, processor, case) is not None:
            for provider, call in (("cpu", case.ours[""]), ("eager", case.eager)):
                count(record, case, provider, call)


def count(record: Record, case: cases.Case, provider: str, call: Callable[[], object]) -> None:
    counts = counted(call)
    text = (
        f"{'':<16}{shape_text(case.shape):<46}{provider:<20}{counts.operators} operators, {counts.operations} operations, "
        f"{counts.synchronisations} synchronisations, {counts.allocations} allocations of {counts.bytes / 1e6:.2f} MB"
    )
    values = dataclasses.asdict(counts)
    record.put("counts", text, op=case.op, shape=case.shape, dtype=case.dtype, provider=provider, **values)


def step(
    batch: int, count: int, length: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> cases.Case:
    """The drafts of a decoder in full flight, half of each window masked or less: predict_tokens on all, then draft_step."""
    scene = scenes.drafts(batch, count, length, device)
    rows = batch * count * length
    logits = scenes.rows_of_logits(rows, vocab, dtype, device).view(batch, count, length, vocab)
    masked = int((scene.drafts == MASK).sum())
    moved = roofline.predict_tokens(rows, masked, vocab, dtype.itemsize) + roofline.draft_step(batch, count, length)
    return cases.Case(
        "step",
        {"B": batch, "K": count, "L": length, "V": vocab},
        cases.dtype_name(dtype),
        moved,
        {"": lambda: ours(logits, scene)},
        lambda: theirs(logits, scene),
        _vectorised,
        lambda: (logits, scene.drafts, count),
        memory=logits.view(rows, vocab)[:masked],
        needed=3 * masked * vocab * dtype.itemsize,
    )


def ours(logits: torch.Tensor, scene: scenes.DraftScene) -> fk.DraftStep:
    token_ids, confidence = fk.predict_tokens(logits, scene.drafts, MASK)
    return fk.draft_step(scene.drafts, token_ids, confidence, scene.num_drafts, MASK, scene.drafts.shape[1])


def theirs(logits: torch.Tensor, scene: scenes.DraftScene) -> torch.Tensor:
    token_ids, confidence = eager.predict_tokens(logits, scene.drafts, MASK)
    return eager.draft_step(scene.drafts, token_ids, confidence, MASK, scene.drafts.shape[1])


def _vectorised(logits: torch.Tensor, drafts: torch.Tensor, count: int) -> torch.Tensor:
    token_ids, confidence = vectorised.predict_tokens(logits, drafts, MASK)
    return vectorised.draft_step(drafts, token_ids, confidence, MASK, count)
