"""One decoding step without its forward: predict_tokens on every draft, then draft_step."""

from __future__ import annotations

import torch

import freedave_kernels as fk
from benchmarks import eager, scenes
from benchmarks.measure import interleaved
from benchmarks.report import Report
from benchmarks.scenes import MASK

K, L = 8, 32


def run(report: Report, rounds: int) -> None:
    for batch, vocab, dtype in [(1, 151936, torch.float32), (1, 151936, torch.bfloat16), (8, 32768, torch.bfloat16)]:
        scene = scenes.drafts(batch, K, L)
        logits = torch.randn(batch, K, L, vocab).to(dtype)
        timings = interleaved(
            {"cpu": lambda: ours(logits, scene), "eager": lambda: theirs(logits, scene)},  # noqa: B023
            rounds,
        )
        report.add("step", f"B={batch}, K={K}, L={L}, V={vocab}", str(dtype).removeprefix("torch."), timings)


def ours(logits: torch.Tensor, scene: scenes.DraftScene) -> fk.DraftStep:
    token_ids, confidence = fk.predict_tokens(logits, scene.drafts, MASK)
    return fk.draft_step(scene.drafts, token_ids, confidence, scene.num_drafts, MASK, K)


def theirs(logits: torch.Tensor, scene: scenes.DraftScene) -> torch.Tensor:
    token_ids, confidence = eager.predict_tokens(logits, scene.drafts, MASK)
    return eager.draft_step(scene.drafts, token_ids, confidence, MASK, K)
