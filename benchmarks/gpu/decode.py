"""Steps of an 8B model's decode: wall clock and device, against reading the weights once; and what its parts take alone."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.gpu import kernels, parts_of_step
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import LLADA_8B, SDAR_8B, Published, prompt, random_model, shape_of, weight_bytes
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stepper import Step, Stepper
from benchmarks.record import Record
from freedave.decode.settings import resolve_settings

NEW_TOKENS = 96  # a random model accepts few drafts: some 50 steps with 8 of them
REPLAYS = 15  # of one step, for its time on the device
MEASURED_AFTER = 4  # replayed steps, so that there are drafts
STEADY = 20  # steps that a median is made of, in no more than so many decodes:
MOST_DECODES = 4
LONG, SHORT = 4096, 128


@dataclass(frozen=True)
class Case:
    """`target`: the most milliseconds that a step may take. `seconds`: what the case takes, with compiling."""

    published: Published
    batch: int
    prompt: int
    drafts: int
    target: float | None
    seconds: float
    compile: bool | None = None

    @property
    def name(self) -> str:
        way = "static" if self.drafts == 1 else f"K={self.drafts}"
        how = ", layers not compiled" if self.compile is False else ""
        return f"{self.published.name} B={self.batch} prompt {self.prompt} {way}{how}"


# By worth. A shape's first step compiles the layers.
FIRST = [
    Case(SDAR_8B, 1, SHORT, 1, 7.0, 45),
    Case(SDAR_8B, 1, SHORT, 8, 8.0, 25),
    Case(SDAR_8B, 1, LONG, 1, 7.3, 20),
    Case(SDAR_8B, 1, LONG, 8, 8.6, 20),
    Case(LLADA_8B, 1, SHORT, 1, 7.2, 45),
    Case(LLADA_8B, 1, SHORT, 4, 9.0, 30),
]
THEN = [
    Case(SDAR_8B, 1, SHORT, 16, None, 25),
    Case(SDAR_8B, 1, SHORT, 4, None, 25),
    Case(SDAR_8B, 4, SHORT, 8, None, 30),
    Case(SDAR_8B, 4, SHORT, 1, None, 25),
    Case(SDAR_8B, 16, SHORT, 1, None, 25),
    Case(LLADA_8B, 1, SHORT, 8, None, 30),
    Case(SDAR_8B, 16, SHORT, 8, None, 60),
]
# Where the time goes is looked at in these, which have been compiled by then.
WHERE = [FIRST[1], FIRST[0], FIRST[5], FIRST[3]]
UNCOMPILED = Case(SDAR_8B, 1, SHORT, 8, None, 10, compile=False)


@dataclass
class Steps:
    """What a decode's steps took; in its midst, a step is replayed alone."""

    stepper: Stepper
    machine: Machine
    steps: list[Step] = field(default_factory=list)
    device_ms: float | None = None
    replayed: str | None = None

    def __call__(self, step: Step) -> None:
        self.steps.append(step)
        # A step of several shapes is one in which a sequence begins.
        ran = [other for other in self.steps if self._counts(other) and other.shapes.keys() == step.shapes.keys()]
        if self.device_ms is None and self._counts(step) and len(ran) > MEASURED_AFTER:
            [self.replayed] = step.shapes
            self.device_ms = device_ms(self.machine, self.stepper, self.replayed)

    def _counts(self, step: Step) -> bool:
        return step.replayed and len(step.shapes) == 1 and not self.stepper.shape(next(iter(step.shapes))).one

    def steady(self) -> list[float]:
        """Seconds of the replayed steps, of the shape that was measured."""
        return [step.seconds for step in self.steps if self._counts(step) and self.replayed in step.shapes]

    def before(self, runs: int) -> dict[str, float]:
        """Seconds of the steps that ran a shape for the first (second) time, by shape."""
        return {
            name: round(step.seconds, 3)
            for step in self.steps
            for name, number in step.shapes.items()
            if number == runs
        }


def run(plan: Plan) -> None:
    machine = plan.machine
    for case in FIRST:
        plan.case(case.name, case.seconds, functools.partial(measure, plan.record, machine, case))
    for case in WHERE:
        plan.case(f"kernels of {case.name}", 8, functools.partial(list_kernels, plan.record, machine, case))
    for case in WHERE:
        plan.case(f"parts of {case.name}", 8, functools.partial(parts, plan.record, machine, case))
    plan.case(UNCOMPILED.name, UNCOMPILED.seconds, functools.partial(measure, plan.record, machine, UNCOMPILED))


def run_more(plan: Plan) -> None:
    for case in THEN:
        plan.case(case.name, case.seconds, functools.partial(measure, plan.record, plan.machine, case))


def measure(record: Record, machine: Machine, case: Case) -> bool:
    """Decodes until there are enough steps; where a case has a target, whether it was met."""
    machine.forget_peak_memory()
    frames = kernels.compiled_frames()
    stepper, prompts = prepared(machine, case)
    steps = Steps(stepper, machine)
    for _ in range(MOST_DECODES):
        if len(steps.steady()) < STEADY:
            stepper.decode(prompts, steps)
    if steps.replayed is None or steps.device_ms is None:
        raise RuntimeError(f"no step was replayed: {[step.shapes for step in steps.steps]}")
    lm = random_model(shape_of(case.published, machine), machine.device)
    wall = statistics.median(steps.steady()) * 1e3
    limit = weight_bytes(lm) / machine.bandwidth * 1e3
    shape = stepper.shape(steps.replayed)
    values = {
        "ms": wall,
        "device_ms": steps.device_ms,
        "host_share": 1 - steps.device_ms / wall,
        "limit_ms": limit,
        "share_of_bandwidth_limit": limit / wall,
        "target_ms": case.target,
        "held": None if case.target is None else wall <= case.target,
        "tokens": shape.rows * shape.drafts * shape.forward,
        "steps": len(steps.steps),
        "steady_steps": len(steps.steady()),
        "first_run_seconds": steps.before(1),
        "second_run_seconds": steps.before(2),
        "prompt_seconds": [round(step.seconds, 4) for step in steps.steps if not step.shapes],
        "graphs_compiled": kernels.compiled_frames() - frames,
        "graph_shape": steps.replayed,
        "graph_shapes": stepper.executor.shapes,
        "capacity": stepper.executor._capacity,
        "peak_memory_gb": machine.peak_memory() / 1e9,
    }
    target = "" if case.target is None else f", target {case.target:.1f}"
    text = (
        f"{case.name:<44}{wall:8.2f} ms a step{target} (device {steps.device_ms:.2f}, host {values['host_share']:.1%}); "
        f"{values['share_of_bandwidth_limit']:.0%} of the bandwidth limit of {limit:.2f}; {values['tokens']} tokens, "
        f"{values['steady_steps']} of {values['steps']} steps; before replays {sum(steps.before(1).values()):.1f} + "
        f"{sum(steps.before(2).values()):.1f} s, {values['graphs_compiled']} graphs compiled; "
        f"{values['peak_memory_gb']:.1f} GB"
    )
    record.put("decode_step", text, case=case.name, **_described(case), **values)
    return machine.dry or values["held"] is not False


def prepared(machine: Machine, case: Case) -> tuple[Stepper, list[list[int]]]:
    """A stepper with room for the case, and its prompts. Those of one sequence stay: its next decode finds its shapes."""
    published = shape_of(case.published, machine)
    lm = random_model(published, machine.device)
    length = case.prompt if not machine.dry else 9 + case.prompt // 512
    prompts = [prompt(lm, length, seed) for seed in range(case.batch)]
    if case.batch == 1 and case.compile is None:
        return kept_stepper(machine, published, 1, case.drafts, case.prompt), prompts
    return new_stepper(machine, published, case.batch, case.drafts, case.prompt, case.compile), prompts


def new_stepper(
    machine: Machine,
    published: Published,
    batch: int,
    drafts: int | Literal["auto"],
    prompt_length: int,
    compile: bool | None = None,
    static: bool = False,
) -> Stepper:
    """With room for prompts of a length, as `generate` has it. `static`: static decoding in the shapes of `drafts`."""
    lm = random_model(published, machine.device)
    most = prompt_length if not machine.dry else 20
    new_tokens = NEW_TOKENS if not machine.dry else 40
    settings = resolve_settings(
        lm, most, new_tokens, draft_steps=drafts, cache=published.cache, executor="graph", compile=compile
    )
    capacity = settings.sequence_length(most)
    return Stepper(lm, settings.static() if static else settings, slots=batch, capacity=capacity)


kept_stepper = functools.cache(new_stepper)


def device_ms(machine: Machine, stepper: Stepper, shape: str) -> float:
    """Milliseconds of a step on the device: replays from the same state, each launched while the one before it runs."""
    with stepper.state_kept() as restore:

        def replay() -> None:
            stepper.replay(shape)

        return machine.back_to_back(replay, REPLAYS, between=restore)


def in_full_flight(machine: Machine, case: Case, look: Callable[[Stepper, str], None]) -> None:
    """Calls `look` once in the midst of a decode, with a shape that has been captured."""
    stepper, prompts = prepared(machine, case)
    seen: list[str] = []

    def after_step(step: Step) -> None:
        if not seen and step.replayed and len(step.shapes) == 1:
            [name] = step.shapes
            if not stepper.shape(name).one:
                seen.append(name)
                look(stepper, name)

    stepper.decode(prompts, after_step)
    if not seen:
        raise RuntimeError(f"no step was replayed: {stepper.executor.shapes}")


def list_kernels(record: Record, machine: Machine, case: Case) -> None:
    """Of one step, in the midst of a decode."""

    def look(stepper: Stepper, shape: str) -> None:
        with stepper.state_kept() as restore:
            found = kernels.of(machine, lambda: stepper.replay(shape), restore)
        record.put("kernels", kernels.text(case.name, found), case=case.name, **found)

    in_full_flight(machine, case, look)


def parts(record: Record, machine: Machine, case: Case) -> None:
    """The backbone, the predictions and all layers' attention alone, each in a graph."""
    in_full_flight(
        machine, case, lambda stepper, shape: parts_of_step.measure(record, machine, case.name, stepper, shape)
    )


def _described(case: Case) -> dict[str, object]:
    described: dict[str, object] = {"model": case.published.name, "B": case.batch, "prompt": case.prompt}
    return described | {"K": case.drafts, "compile": case.compile}
