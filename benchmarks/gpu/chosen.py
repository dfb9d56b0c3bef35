"""`draft_steps="auto"` against static decoding and fixed numbers of drafts: milliseconds an answer, in turn."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.gpu import embedded
from benchmarks.gpu.decode import SHORT, kept_stepper
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import SDAR_8B, prompt, random_model, shape_of
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stepper import Stepper
from benchmarks.record import Record

Drafts = int | Literal["auto"]


@dataclass(frozen=True)
class Rounds:
    """Of all ways in turn; `learning`: those before the timed ones, in which shapes are captured and acceptance is learnt."""

    learning: int
    timed: int
    answers: int  # of a round


EMBEDDED, EIGHT_BILLION, DRY = Rounds(12, 10, 8), Rounds(3, 3, 2), Rounds(0, 1, 1)


def run(plan: Plan) -> None:
    plan.case("embedded, a chosen number of drafts", 60, functools.partial(of_embedded, plan.record, plan.machine))
    plan.case("8B, a chosen number of drafts", 60, functools.partial(of_8b, plan.record, plan.machine))


def of_embedded(record: Record, machine: Machine) -> bool:
    """Layers are not compiled: a shape of so small a model would have to serve thousands of answers to pay for that."""
    dtype = torch.bfloat16
    ways: dict[Drafts, Stepper] = {
        drafts: embedded.stepper(machine, dtype, drafts, compile=False) for drafts in ("auto", 1, 8, 16)
    }
    rounds = EMBEDDED if not machine.dry else DRY
    answers = embedded.prompts(embedded.model(machine, dtype), rounds.answers)
    return compare(record, machine, "embedded, bfloat16", ways, answers, rounds)


def of_8b(record: Record, machine: Machine) -> bool:
    """Random weights, which accept little more than a draft a forward; layers are compiled."""
    published = shape_of(SDAR_8B, machine)
    lm = random_model(published, machine.device)
    ways: dict[Drafts, Stepper] = {
        drafts: kept_stepper(machine, published, 1, drafts, SHORT) for drafts in ("auto", 1, 8)
    }
    rounds = EIGHT_BILLION if not machine.dry else DRY
    answers = [prompt(lm, SHORT if not machine.dry else 10, seed) for seed in range(rounds.answers)]
    return compare(record, machine, f"{published.name}, bfloat16", ways, answers, rounds)


def compare(
    record: Record, machine: Machine, what: str, ways: dict[Drafts, Stepper], answers: list[list[int]], rounds: Rounds
) -> bool:
    """Whether "auto" is as fast as static decoding, and nearly as fast as the best fixed number, once it has learnt."""
    samples: dict[Drafts, list[float]] = {way: [] for way in ways}
    for _ in range(rounds.learning + rounds.timed):
        for way, stepper in ways.items():
            began = time.perf_counter()
            for token_ids in answers:
                stepper.decode([token_ids])
            samples[way].append((time.perf_counter() - began) * 1e3 / len(answers))
    ms = {way: statistics.median(times[rounds.learning :]) for way, times in samples.items()}
    best = min(each for way, each in ms.items() if way != "auto")
    executor = ways["auto"].executor
    record.put(
        "drafts_chosen",
        f"{what}, auto: {ms[1] / ms['auto']:.2f} x static, {best / ms['auto']:.2f} x the best fixed; "
        f"ms an answer: {', '.join(f'{way} {each:.2f}' for way, each in ms.items())}; {executor.drafts_reason}",
        case=what,
        ms={str(way): each for way, each in ms.items()},
        ms_of_rounds={str(way): times for way, times in samples.items()},
        against_static=ms[1] / ms["auto"],
        against_best=best / ms["auto"],
        chosen=executor.drafts_chosen,
        shapes=executor.shapes,
    )
    return machine.dry or (ms[1] >= 0.97 * ms["auto"] and best >= 0.95 * ms["auto"])
