"""Losslessness in 16 bits: FreeDave against static decoding in the same shapes, and in shapes of its own.

Products in bfloat16 round differently with the number of rows, so static decoding in shapes of its own is another model's
decode wherever two tokens nearly tie. In the same shapes a row's bits are the same, and so must the answers be.
"""

from __future__ import annotations

import functools
from itertools import chain

import torch

from benchmarks.gpu import embedded
from benchmarks.gpu.decode import NEW_TOKENS, SHORT, kept_stepper, new_stepper
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import SDAR_8B, prompt, random_model, shape_of
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stepper import Stepper
from benchmarks.record import Record
from freedave.decode.sequence import Sequence

K = 8
ANSWERS = 12  # of the embedded model
Prompts = list[list[int]]


def run(plan: Plan) -> None:
    machine = plan.machine
    plan.case("lossless 8B", 40, functools.partial(of_8b, plan.record, machine))
    for batch in (1, 2 if machine.dry else ANSWERS):
        plan.case(f"lossless embedded B={batch}", 40, functools.partial(of_embedded, plan.record, machine, batch))


def of_8b(record: Record, machine: Machine) -> bool:
    published = shape_of(SDAR_8B, machine)
    lm = random_model(published, machine.device)
    prompts = [[prompt(lm, SHORT if not machine.dry else 10, seed)] for seed in range(2)]
    many, own = (kept_stepper(machine, published, 1, drafts, SHORT) for drafts in (K, 1))
    same = new_stepper(machine, published, 1, K, SHORT, static=True)
    return compare(record, f"{published.name}, bfloat16, {NEW_TOKENS} tokens", prompts, many, same, own)


def of_embedded(record: Record, machine: Machine, batch: int) -> bool:
    """Trained, so that many drafts are accepted."""
    lm = embedded.model(machine, torch.bfloat16)
    every = embedded.prompts(lm, 2 if machine.dry else ANSWERS)
    groups = [every[begin : begin + batch] for begin in range(0, len(every), batch)]
    if batch == 1:
        many, own = (embedded.stepper(machine, torch.bfloat16, drafts) for drafts in (K, 1))
    else:
        many, own = (embedded.stepper(machine, torch.bfloat16, drafts, batch) for drafts in (K, 1))
    same = embedded.stepper(machine, torch.bfloat16, K, batch, static=True)
    return compare(record, f"embedded, bfloat16, B={batch}", groups, many, same, own)


def compare(record: Record, what: str, groups: list[Prompts], many: Stepper, same: Stepper, own: Stepper) -> bool:
    """`many` decodes with K drafts, `same` with the first of them only, `own` in shapes of one draft. Whether the first two
    agree, where all rows of a step fit one tile of a matrix product.
    """
    decoded, same_shapes, own_shapes = (
        [stepper.decode(prompts) for prompts in groups] for stepper in (many, same, own)
    )
    rows = max(shape.rows * shape.drafts * shape.forward for shape in many.executor.steps.steps)
    held = True
    for against, static in (("static in the same shapes", same_shapes), ("static in its own shapes", own_shapes)):
        tokens, steps, total = differences(decoded, static)
        record.put(
            "lossless",
            f"{what}, K={K} against {against}: {tokens} tokens and {steps} steps of {total} differ ({rows} rows a step)",
            case=what,
            K=K,
            against=against,
            tokens_that_differ=tokens,
            steps_that_differ=steps,
            total=total,
            rows_of_a_step=rows,
            forwards=sum(len(sequence.accepted_lengths) for group in decoded for sequence in group),
            forwards_static=sum(len(sequence.accepted_lengths) for group in static for sequence in group),
        )
        held &= static is own_shapes or rows > 256 or tokens == steps == 0
    return held


def differences(ours: list[list[Sequence]], theirs: list[list[Sequence]]) -> tuple[int, int, int]:
    """Tokens and steps that differ, and how many there are."""
    tokens = steps = total = 0
    for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
        total += mine.total
        for name in ("tokens", "step_map"):
            pairs = zip(mine.generated(getattr(mine, name)), other.generated(getattr(other, name)), strict=True)
            differing = sum(a != b for a, b in pairs)
            tokens, steps = (tokens + differing, steps) if name == "tokens" else (tokens, steps + differing)
    return tokens, steps, total
