"""What the host asks of the device in a step, by the profiler: for the ops alone, and for `Decoder.launch` and `poll`."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

import freedave_kernels as fk
from benchmarks import scenes
from benchmarks.gpu import embedded, kernels, parts_of_step
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stepper import Step, Stepper
from benchmarks.record import Record
from benchmarks.scenes import MASK

# Names in a trace: the runtime and driver calls that start a kernel, start a graph of them or copy, and those that wait.
LAUNCH = re.compile(r"^cu(da)?LaunchKernel")
ASK = re.compile(r"^cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset)")
WAIT = re.compile(r"^cu(da)?(Stream|Device|Ctx|Event)Synchronize")
K, L, VOCAB = 8, 32, 4096
EXPECTED = {"cuda": 3, "triton": 3}


def run(plan: Plan) -> None:
    plan.case("launches", 10, functools.partial(count, plan.record, plan.machine))
    for batch, drafts in itertools.product((1, 2 if plan.machine.dry else 8), (1, 8)):
        what = f"launches of a decoder's step, B={batch}, K={drafts}"
        plan.case(what, 20, functools.partial(count_of_decoder, plan.record, plan.machine, batch, drafts))


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


def count_of_decoder(record: Record, machine: Machine, batch: int, drafts: int) -> None:
    """Of a step that is replayed, in the midst of a decode of the embedded model; beside it, the kernels of the model's own
    forward and of the projection with its predictions, each alone."""
    stepper = embedded.stepper(machine, torch.bfloat16, drafts, batch)
    prompts = embedded.prompts(embedded.model(machine, torch.bfloat16), batch)
    traces: list[profile] = []
    replays: list[str] = []

    @contextmanager
    def around_step() -> Iterator[None]:
        with profile(activities=_activities(machine)) as trace:
            yield
            machine.synchronize()
        traces.append(trace)

    def after_step(step: Step) -> None:
        trace = traces.pop()
        [name] = step.shapes if len(step.shapes) == 1 else [""]
        if replays or not step.replayed or not name or stepper.shape(name).one:
            return
        replays.append(name)
        events = [event for event in trace.events() if machine.dry or str(event.device_type).endswith("CUDA")]
        names = [event.name for event in trace.events()]
        asked, waits = (sum(bool(pattern.match(name)) for name in names) for pattern in (ASK, WAIT))
        with stepper.state_kept() as restore:
            parts = _kernels_of_parts(machine, stepper, name, restore)
        text = (
            f"launch and poll, B={batch}, K={drafts}: {asked} calls of the driver, {waits} synchronisations, {len(events)} "
            f"kernels and copies on the device ({', '.join(f'{what} {number}' for what, number in parts.items())})"
        )
        shape = {"B": batch, "K": drafts, "block": embedded.BLOCK_LENGTH}
        values = {"driver_calls": asked, "synchronisations": waits, "kernels": len(events), "kernels_of_parts": parts}
        record.put("decoder_step", text, provider="graph", shape=shape, dtype="bfloat16", model="embedded", **values)

    stepper.decode(prompts)  # so that its shapes have been captured
    stepper.decode(prompts, after_step, around_step)
    if not replays:
        raise RuntimeError(f"no step was replayed: {stepper.executor.shapes}")


def _kernels_of_parts(machine: Machine, stepper: Stepper, name: str, restore: Callable[[], None]) -> dict[str, int]:
    executor, shape = stepper.executor, stepper.shape(name)
    calls = {
        "the backbone": parts_of_step.backbone(executor, shape, parts_of_step.attention_of(executor, shape)),
        "projection and predictions": parts_of_step.predictions(executor, shape),
    }
    return {what: kernels.of(machine, call, restore)["kernels"] for what, call in calls.items()}


def _activities(machine: Machine) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([] if machine.dry else [ProfilerActivity.CUDA])


def _counted(machine: Machine, call: object) -> tuple[int, int]:
    assert callable(call)
    call()  # what is compiled or cached on the first call is not part of a step
    with profile(activities=_activities(machine)) as trace:
        call()
    names = [event.name for event in trace.events()]
    return sum(bool(LAUNCH.match(name)) for name in names), sum(bool(WAIT.match(name)) for name in names)
