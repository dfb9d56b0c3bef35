"""Timings against eager and compiled PyTorch, and against the bandwidth that a plain copy reaches in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import freedave_kernels as fk
from benchmarks import eager, scenes
from benchmarks.gpu.machine import Machine
from benchmarks.report import Report
from benchmarks.scenes import MASK

K, L = 8, 32
COPIES = 10  # calls in one captured graph


def predict_tokens(report: Report, machine: Machine) -> None:
    bandwidth = machine.copy_bandwidth()
    report.note(f"copy bandwidth (bytes read and written): {bandwidth / 1e9:.0f} GB/s", gb_per_s=bandwidth / 1e9)
    compiled = torch.compile(_dense_prediction, dynamic=False, backend="aot_eager" if machine.dry else "inductor")
    for vocab in machine.vocabularies:
        for rows, masked in machine.rows:
            for dtype in (torch.bfloat16, torch.float32):
                inputs = (*scenes.logits(rows, masked, vocab, dtype, device=machine.device), MASK)
                calls = {name: _on(name, partial(fk.predict_tokens, *inputs)) for name in machine.backends}
                calls["eager"] = partial(eager.predict_tokens, *inputs)
                calls["compiled"] = partial(compiled, *inputs)
                report.add(
                    "predict_tokens",
                    f"{masked} of {rows} rows, V={vocab}",
                    str(dtype).removeprefix("torch."),
                    machine.times(calls),
                    num_bytes=masked * vocab * dtype.itemsize,
                    read_bandwidth=bandwidth,
                )


def draft_step(report: Report, machine: Machine) -> None:
    for batch in machine.batches:
        scene = scenes.drafts(batch, K, L, device=machine.device)
        predictions = (scene.drafts, scene.token_ids, scene.confidence)
        ours = partial(fk.draft_step, *predictions, scene.num_drafts, MASK, K)
        calls = {name: _on(name, ours) for name in machine.backends}
        calls["eager"] = partial(eager.draft_step, *predictions, MASK, K)
        report.add("draft_step", f"B={batch}, K={K}, L={L}", "", machine.times(calls))


def step(report: Report, machine: Machine) -> None:
    """predict_tokens and draft_step together: launched one by one, and replayed from a CUDA graph of many steps."""
    vocab = machine.vocabularies[-1] if machine.dry else 151936
    for batch in machine.batches:
        scene = scenes.drafts(batch, K, L, device=machine.device)
        logits = torch.randn(batch, K, L, vocab, device=machine.device).to(torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {}
        for name in machine.backends:
            calls[name] = _on(name, partial(_step, scene, logits))
            calls[f"{name}, graph"] = machine.replayed(calls[name], COPIES)
        calls["eager"] = partial(_eager_step, scene, logits)
        timings = machine.times(calls)
        timings = {name: timing.per(COPIES) if "graph" in name else timing for name, timing in timings.items()}
        report.add("step", f"B={batch}, K={K}, L={L}, V={vocab}", "bfloat16", timings)


def _on(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with fk.use_backend(backend):
            return call()

    return run


def _step(scene: scenes.DraftScene, logits: torch.Tensor) -> fk.DraftStep:
    token_ids, confidence = fk.predict_tokens(logits, scene.drafts, MASK)
    return fk.draft_step(scene.drafts, token_ids, confidence, scene.num_drafts, MASK, K)


def _eager_step(scene: scenes.DraftScene, logits: torch.Tensor) -> torch.Tensor:
    token_ids, confidence = eager.predict_tokens(logits, scene.drafts, MASK)
    return eager.draft_step(scene.drafts, token_ids, confidence, MASK, K)


def _dense_prediction(
    logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The form that a compiler fuses best: every row, no gather of the masked ones."""
    x = logits.float()
    top, token = x.max(-1)
    masked = input_ids == mask_token_id
    confidence = (top - x.logsumexp(-1)).exp()
    return torch.where(masked, token, input_ids), torch.where(masked, confidence, float("-inf"))
