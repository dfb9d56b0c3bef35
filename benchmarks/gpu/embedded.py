"""The embedded model end to end: milliseconds an answer, and whether it is the CPU's."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

import freedave
from benchmarks.gpu.decode import MOST_DECODES, Steps
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stepper import Stepper
from benchmarks.record import Record
from freedave.decode.settings import Settings, resolve_settings
from freedave.demo.tasks import TASKS, problems

DRAFTS = (16, 1, 8)
NEW_TOKENS, SEED = 96, 0
ROUNDS = 10
TARGET_MS = {16: 12.0}
TOKENS = 68  # of the answer that is timed, about
BLOCK_LENGTH = 16
MOST_PROMPT = 48


@functools.cache
def model(machine: Machine, dtype: torch.dtype) -> freedave.DiffusionLM:
    return freedave.load_model("demo", dtype=dtype, device=machine.device)


def prompts(lm: freedave.DiffusionLM, count: int) -> list[list[int]]:
    """Held-out problems, tasks in turn."""
    by_task = [problems(task, "test", count, SEED) for task in TASKS]
    return [lm.tokenizer(problem.prompt)["input_ids"] for row in zip(*by_task, strict=False) for problem in row][:count]


@functools.cache
def stepper(
    machine: Machine,
    dtype: torch.dtype,
    drafts: int | Literal["auto"],
    batch: int = 1,
    static: bool = False,
    compile: bool | None = None,
) -> Stepper:
    """With room for any of the prompts; it stays. `static`: static decoding in the shapes of `drafts`."""
    lm = model(machine, dtype)
    wanted = dataclasses.replace(settings(lm, machine, drafts), compile=compile)
    capacity = wanted.sequence_length(MOST_PROMPT)
    return Stepper(lm, wanted.static() if static else wanted, slots=batch, capacity=capacity)


def settings(lm: freedave.DiffusionLM, machine: Machine, drafts: int | Literal["auto"]) -> Settings:
    return resolve_settings(
        lm,
        MOST_PROMPT,
        NEW_TOKENS if not machine.dry else 16,
        draft_steps=drafts,
        block_length=BLOCK_LENGTH,
        executor="graph",
    )


def run(plan: Plan) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for drafts in DRAFTS:
            name = f"embedded {str(dtype).removeprefix('torch.')} K={drafts}"
            plan.case(name, 20, functools.partial(measure, plan.record, plan.machine, dtype, drafts))


@functools.cache
def on_the_cpu(machine: Machine) -> tuple[list[int], list[int]]:
    """The prompt whose answer has about as many tokens as wanted, and its answer, in float32."""
    lm = freedave.load_model("demo")
    answers = []
    for token_ids in prompts(lm, 1 if machine.dry else 12):
        wanted = settings(lm, machine, 8)
        out = freedave.generate(
            lm,
            torch.tensor([token_ids]),
            max_new_tokens=wanted.max_new_tokens,
            draft_steps=8,
            block_length=BLOCK_LENGTH,
        )
        answer = out.sequences[0, len(token_ids) :].tolist()
        answers.append((abs(written(lm, answer) - TOKENS), token_ids, answer))
    _, token_ids, answer = min(answers, key=lambda row: row[0])
    return token_ids, answer


def written(lm: freedave.DiffusionLM, answer: list[int]) -> int:
    """Tokens up to the first end of sequence."""
    ends = [i for i, token in enumerate(answer) if token in lm.eos_token_ids]
    return ends[0] if ends else len(answer)


def measure(record: Record, machine: Machine, dtype: torch.dtype, drafts: int) -> bool:
    """Answers from the decoder, whose shapes stay, and from `generate`."""
    lm = model(machine, dtype)
    token_ids, expected = on_the_cpu(machine)
    wanted = settings(lm, machine, drafts)
    kept = stepper(machine, dtype, drafts)

    def decode() -> tuple[list[int], int]:
        [sequence] = kept.decode([token_ids])
        return sequence.generated(sequence.tokens), len(sequence.accepted_lengths)

    held = report(record, machine, lm, dtype, drafts, "decoder", decode, expected)
    host_share(record, machine, kept, token_ids, f"embedded, {str(dtype).removeprefix('torch.')}, K={drafts}")
    input_ids = torch.tensor([token_ids], device=machine.device)

    def generate() -> tuple[list[int], int]:
        out = freedave.generate(
            lm,
            input_ids,
            max_new_tokens=wanted.max_new_tokens,
            draft_steps=drafts,
            block_length=BLOCK_LENGTH,
            executor="graph",
        )
        return out.sequences[0, len(token_ids) :].tolist(), out.num_forwards

    return report(record, machine, lm, dtype, drafts, "generate", generate, expected) and held


def host_share(record: Record, machine: Machine, kept: Stepper, token_ids: list[int], name: str) -> None:
    """Of some answers' steps, by the time of one replayed alone."""
    steps = Steps(kept, machine)
    for _ in range(MOST_DECODES):
        kept.decode([token_ids], steps)
    assert steps.device_ms is not None  # an answer has at least two steps that are replayed
    wall = statistics.median(steps.steady()) * 1e3
    share = 1 - steps.device_ms / wall
    text = f"{name}: {wall:.3f} ms a step, of which {steps.device_ms:.3f} the device's and {share:.0%} the host's"
    record.put("host_share", text, case=name, ms=wall, device_ms=steps.device_ms, host_share=share)


def report(
    record: Record,
    machine: Machine,
    lm: freedave.DiffusionLM,
    dtype: torch.dtype,
    drafts: int,
    by: str,
    answer: Callable[[], tuple[list[int], int]],
    expected: list[int],
) -> bool:
    """Whether the target was met; in float32 the answer must be the CPU's."""
    began = time.perf_counter()
    answer()
    first = time.perf_counter() - began
    samples = []
    for _ in range(2 if machine.dry else ROUNDS + 2):  # the second time, shapes are captured
        began = time.perf_counter()
        tokens, forwards = answer()
        samples.append((time.perf_counter() - began) * 1e3)
    ms = statistics.median(samples[2:] or samples)
    target = TARGET_MS.get(drafts)
    same = tokens == expected
    name = str(dtype).removeprefix("torch.")
    record.put(
        "answers",
        f"embedded, {name}, {by}, K={drafts}: {ms:.2f} ms an answer of {written(lm, tokens)} tokens"
        f"{'' if target is None else f', target {target:.0f}'}; {forwards} forwards; first answer {first:.1f} s; "
        f"{'the same as' if same else 'OTHER than'} the CPU's in float32",
        dtype=name,
        by=by,
        K=drafts,
        ms=ms,
        best_ms=min(samples),
        target_ms=target,
        tokens=written(lm, tokens),
        forwards=forwards,
        first_seconds=first,
        same_as_cpu=same,
    )
    return (machine.dry or target is None or ms <= target) and (same or dtype != torch.float32)
