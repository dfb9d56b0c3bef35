"""Timings against eager and compiled PyTorch, and against the bandwidth that a plain copy reaches in the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import cases, scenes
from benchmarks import step as one_step
from benchmarks.gpu.machine import Machine
from benchmarks.record import Record

K, L = 8, 32
COPIES = 10  # calls in one captured graph


def ops(record: Record, machine: Machine) -> None:
    """Every op, on the cases that a CPU is measured with."""
    bandwidth = machine.copy_bandwidth()
    record.note(f"copy bandwidth (bytes read and written): {bandwidth / 1e9:.0f} GB/s", gb_per_s=bandwidth / 1e9)
    for case in cases.prediction_cases(machine.shapes, machine):
        if isinstance(case, cases.Case):
            cases.measure(record, machine, case, bandwidth)
        else:
            record.absent("all", case[1], "predict_tokens", case[0])
    for case in itertools.chain(
        cases.part_cases(machine.shapes, machine.device), cases.window_cases(machine.shapes, machine.device)
    ):
        cases.measure(record, machine, case, bandwidth)


def step(record: Record, machine: Machine) -> None:
    """predict_tokens and draft_step together: launched one by one, and replayed from a CUDA graph of many steps."""
    vocab = machine.shapes.vocabularies[-1] if machine.dry else 151936
    for batch in machine.shapes.batches:
        scene = scenes.drafts(batch, K, L, device=machine.device)
        logits = torch.randn(batch, K, L, vocab, device=machine.device).to(torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {}
        for name in machine.backends:
            calls[name] = cases.on(name, partial(one_step.ours, logits, scene))
            calls[f"{name}, graph"] = machine.replayed(calls[name], COPIES)
        calls["eager"] = partial(one_step.theirs, logits, scene)
        timings = machine.times(calls)
        timings = {name: timing.per(COPIES) if "graph" in name else timing for name, timing in timings.items()}
        record.add("step", {"B": batch, "K": K, "L": L, "V": vocab}, "bfloat16", timings)
