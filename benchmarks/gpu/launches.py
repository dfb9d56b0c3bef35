"""Kernels and synchronisations of what a decoder launches between two forwards, counted by the profiler."""

from __future__ import annotations

import functools
import re

import torch
from torch.profiler import ProfilerActivity, profile

import freedave_kernels as fk
from benchmarks import scenes
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record
from benchmarks.scenes import MASK

# Names in a trace: the runtime and driver calls that start a kernel, and those that wait.
LAUNCH = re.compile(r"^cu(da)?LaunchKernel")
WAIT = re.compile(r"^cu(da)?(Stream|Device|Ctx|Event)Synchronize")
K, L, VOCAB = 8, 32, 4096
EXPECTED = {"cuda": 3, "triton": 3}


def run(plan: Plan) -> None:
    plan.case("launches", 10, functools.partial(count, plan.record, plan.machine))


def count(record: Record, machine: Machine) -> bool:
    """Whether our step needs no more launches than promised, and never waits."""
    held = True
    for batch in (1, 2 if machine.dry else 128):
        scene = scenes.drafts(batch, K, L, device=machine.device)
        logits = torch.randn(batch, K, L, VOCAB, device=machine.device)

        def step(logits: torch.Tensor = logits, scene: scenes.DraftScene = scene) -> object:
            token_ids, confidence = fk.predict_tokens(logits, scene.drafts, MASK)
            return fk.draft_step(scene.drafts, token_ids, confidence, scene.num_drafts, MASK, K)

        for backend in machine.backends:
            with fk.use_backend(backend):
                kernels, waits = _counted(machine, step)
            record.note(f"step, B={batch}: {backend} {kernels} launches, {waits} synchronisations", batch=batch)
            held &= machine.dry or (kernels == EXPECTED[backend] and waits == 0)
    return held


def _counted(machine: Machine, call: object) -> tuple[int, int]:
    assert callable(call)
    call()  # what is compiled or cached on the first call is not part of a step
    activities = [ProfilerActivity.CPU] + ([] if machine.dry else [ProfilerActivity.CUDA])
    with profile(activities=activities) as trace:
        call()
    names = [event.name for event in trace.events()]
    return sum(bool(LAUNCH.match(name)) for name in names), sum(bool(WAIT.match(name)) for name in names)
