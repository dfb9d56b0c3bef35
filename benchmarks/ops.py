"""Every op against its eager twin; predict_tokens also against the memory bandwidth measured in the same rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch

import freedave_kernels as fk
from benchmarks import eager, scenes
from benchmarks.measure import interleaved, readers, slope
from benchmarks.report import Report
from benchmarks.scenes import MASK, DraftScene

K, L = 8, 32
VOCAB = 151936
SEQUENCES = 256  # distinct ones that draft_step is timed on


def run(report: Report, rounds: int) -> None:
    report.note(f"triton: not timed, {untimed_triton()}", provider="triton")
    for rows, masked, vocab in [(256, 160, VOCAB), (32, 20, VOCAB), (32, 1, VOCAB), (256, 160, 4096)]:
        for dtype in (torch.float32, torch.bfloat16):
            predict_tokens(report, rounds, rows, masked, vocab, dtype)
    for batch in (1, 8, 32):
        draft_step(report, rounds, batch)
    small_ops(report, rounds)
    scaling(report, rounds)
    call_overhead(report, rounds)


def untimed_triton() -> str:
    """Why the provider `triton` has no rows here."""
    reason = fk.available_backends()["triton"]
    if reason is None and fk.triton.interpreting():
        reason = "TRITON_INTERPRET is set, and how long the interpreter takes says nothing; use a GPU"
    return reason or "these are CPU tensors; `python -m benchmarks gpu` times it on the GPU"


def predict_tokens(report: Report, rounds: int, rows: int, masked: int, vocab: int, dtype: torch.dtype) -> None:
    logits, input_ids = scenes.logits(rows, masked, vocab, dtype)
    num_bytes = masked * vocab * dtype.itemsize
    in_memory = num_bytes > 2**25  # a cache may hold less
    read = readers(num_bytes) if in_memory else {}
    timings = interleaved(
        {
            "cpu": lambda: fk.predict_tokens(logits, input_ids, MASK),
            **read,
            "eager": lambda: eager.predict_tokens(logits, input_ids, MASK),
        },
        rounds,
    )
    report.add(
        "predict_tokens",
        f"{masked} of {rows} rows, V={vocab}",
        str(dtype).removeprefix("torch."),
        timings,
        num_bytes=num_bytes if in_memory else None,
        read_bandwidth=num_bytes / min(timings[name].median for name in read) if in_memory else None,
    )


def step(scene: DraftScene, drafting: str = "recycled") -> object:
    return fk.draft_step(scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts, MASK, K, drafting=drafting)


def stepper(scene: DraftScene, batch: int) -> Callable[[], object]:
    parts = scene.batches(batch)
    return lambda: step(next(parts))


def eager_step(scene: DraftScene) -> object:
    return eager.draft_step(scene.drafts, scene.token_ids, scene.confidence, MASK, K)


def draft_step(report: Report, rounds: int, batch: int) -> None:
    recycled, nested, baseline = (scenes.drafts(SEQUENCES, K, L).batches(batch) for _ in range(3))
    timings = interleaved(
        {
            "cpu recycled": lambda: step(next(recycled)),
            "cpu nested": lambda: step(next(nested), drafting="nested"),
            "eager": lambda: eager_step(next(baseline)),
        },
        rounds,
    )
    report.add("draft_step", f"B={batch}, K={K}, L={L}", "", timings)


def small_ops(report: Report, rounds: int) -> None:
    batch = 8
    scene = scenes.drafts(batch, K, L)
    state, tokens, confidence = scene.drafts[:, 0], scene.token_ids[:, 0], scene.confidence[:, 0]
    masked = state == MASK
    targets = scene.drafts.roll(-1, 1)
    for op, cpu, baseline in [
        (
            "rank_positions",
            lambda: fk.rank_positions(confidence, masked),
            lambda: eager.rank_positions(confidence, masked),
        ),
        (
            "select_transfer",
            lambda: fk.select_transfer(confidence, masked, num_transfer=2),
            lambda: eager.select_transfer(confidence, masked, 2),
        ),
        (
            "build_drafts",
            lambda: fk.build_drafts(state, tokens, confidence, MASK, K),
            lambda: eager.build_drafts(state, tokens, confidence, MASK, K),
        ),
        (
            "verify_drafts",
            lambda: fk.verify_drafts(scene.drafts, targets),
            lambda: eager.verify_drafts(scene.drafts, targets),
        ),
    ]:
        report.add(op, f"B={batch}, K={K}, L={L}", "", interleaved({"cpu": cpu, "eager": baseline}, rounds))


def scaling(report: Report, rounds: int) -> None:
    batches = [1, 2, 4, 8, 16, 32]  # beyond, a second thread joins
    scene = scenes.drafts(SEQUENCES, K, L)
    timings = interleaved({f"B={batch}": stepper(scene, batch) for batch in batches}, rounds)
    per_sequence, at_zero, distance = slope(batches, [timings[f"B={batch}"].best for batch in batches])
    report.note(
        f"\ndraft_step over B={batches[0]}..{batches[-1]} (best of {rounds}): {at_zero * 1e6:.1f} us + "
        f"{per_sequence * 1e6:.2f} us a sequence, no point further than {distance:.0%} from the line",
        us_at_zero=at_zero * 1e6,
        us_per_sequence=per_sequence * 1e6,
        relative_distance=distance,
        **{f"us_at_{name}": timing.best * 1e6 for name, timing in timings.items()},
    )


def call_overhead(report: Report, rounds: int) -> None:
    """A whole call from Python on tensors so small that the call is all there is."""
    logits, input_ids = torch.randn(1, 4, 16), torch.tensor([[MASK, 1, 2, 3]])
    confidence, masked = torch.rand(1, 4), input_ids == MASK
    scene = scenes.drafts(1, 2, 4)
    tokens = torch.zeros_like(input_ids)
    timings = interleaved(
        {
            "predict_tokens": lambda: fk.predict_tokens(logits, input_ids, MASK),
            "rank_positions": lambda: fk.rank_positions(confidence, masked),
            "select_transfer": lambda: fk.select_transfer(confidence, masked),
            "build_drafts": lambda: fk.build_drafts(input_ids, tokens, confidence, MASK, 2),
            "verify_drafts": lambda: fk.verify_drafts(scene.drafts, scene.drafts),
            "draft_step": lambda: fk.draft_step(
                scene.drafts, scene.token_ids, scene.confidence, scene.num_drafts, MASK, 2
            ),
            "torch.add": lambda: torch.add(confidence, confidence),
        },
        rounds,
    )
    print()
    for name, timing in timings.items():
        report.add(name, "one call on tiny tensors", "", {"cpu": timing})
