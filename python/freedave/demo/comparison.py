"""The demo's measurement: held-out problems decoded statically and with FreeDave; answers, forwards and seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from freedave.decode.generate import generate
from freedave.decode.output import DecodeOutput
from freedave.demo.tasks import TASKS, Problem, problems
from freedave.models.diffusion_lm import DiffusionLM

# The longest response, an eight-item sorting, has 78 tokens.
MAX_NEW_TOKENS = 96
SEED = 0

# Of the answer that is drawn: with these, the model adds up wrongly, so that it is another one than the likeliest.
TEMPERATURE, DRAWN_SEED = 2.0, 3


@dataclass(frozen=True)
class Mode:
    """One way to decode; `draft_steps=1` is static decoding, "auto" chooses in each forward."""

    draft_steps: int | Literal["auto"]
    drafting: str = "recycled"
    lookahead_steps: int | None = None

    @property
    def is_static(self) -> bool:
        """Whether this is the decoding that the others are compared with."""
        return self.draft_steps == 1

    @property
    def name(self) -> str:
        """What people read: "static", "nested K=8", "recycled K=8, ahead 1"."""
        if self.is_static:
            return "static"
        if self.draft_steps == "auto":
            return f"{self.drafting} auto"
        ahead = "" if self.lookahead_steps is None else f", ahead {self.lookahead_steps}"
        return f"{self.drafting} K={self.draft_steps}{ahead}"


STATIC = Mode(draft_steps=1)
AUTO = Mode("auto", "pooled")
DRAFTED = (("nested", None), ("recycled", None), ("pooled", None), ("pooled", 1), ("pipelined", None))


@dataclass(frozen=True)
class DemoSettings:
    """What is decoded, and how."""

    problems_per_task: int = 25
    draft_steps: tuple[int, ...] = (8, 16)
    block_length: int = 16
    cache: str = "auto"

    def __post_init__(self) -> None:
        if self.problems_per_task < 1:
            raise ValueError(f"at least 1 problem a task is needed, got {self.problems_per_task}")
        if any(steps < 2 for steps in self.draft_steps):
            raise ValueError(f"draft_steps must be at least 2 (1 is static decoding), got {min(self.draft_steps)}")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Static decoding, as many drafts as is fastest, then for each fixed number of drafts: every way to draft, and
        "pooled" with the shortest lookahead, which spends less compute on a forward: that is what a CPU is short of.
        """
        return (
            STATIC,
            AUTO,
            *(Mode(steps, drafting, lookahead) for steps in self.draft_steps for drafting, lookahead in DRAFTED),
        )


@dataclass
class Tally:
    """What one mode did on one or more tasks, summed over problems."""

    problems: int = 0
    right: int = 0
    identical: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0

    @property
    def all_identical(self) -> bool:
        """Whether every decode gave the tokens and the step map of static decoding."""
        return self.identical == self.problems

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one model forward gave on average."""
        return self.tokens / self.forwards

    @property
    def other_share(self) -> float:
        """The share of the time that went anywhere but into the model's forward."""
        return 1 - self.forward_seconds / self.seconds

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class WorkedExample:
    """One problem in full: every mode's decode of it."""

    problem: Problem
    outputs: dict[Mode, DecodeOutput] = field(default_factory=dict)


@dataclass
class DrawnExample:
    """The worked example's problem with a temperature: drawn with drafts, and statically with the same seed."""

    mode: Mode
    output: DecodeOutput
    static: DecodeOutput

    @property
    def identical(self) -> bool:
        """Whether both drew the same tokens at the same static steps."""
        return identical(self.output, self.static)


@dataclass
class Comparison:
    """The result: tallies by task and mode, one worked example, and an answer to it that is drawn."""

    settings: DemoSettings
    tallies: dict[str, dict[Mode, Tally]]
    example: WorkedExample
    drawn: DrawnExample

    @property
    def totals(self) -> dict[Mode, Tally]:
        """The tallies of all tasks together."""
        return {mode: sum((task[mode] for task in self.tallies.values()), Tally()) for mode in self.settings.modes}

    @property
    def fastest(self) -> Mode:
        """The mode that took the least time (not always the one with the fewest forwards: drafts cost, too)."""
        totals = self.totals
        return min(
            (mode for mode in totals if not mode.is_static), key=lambda mode: totals[mode].seconds, default=STATIC
        )

    @property
    def lossless(self) -> bool:
        """Whether every decode of every mode, and the drawn one, was identical to static decoding."""
        return all(tally.all_identical for tally in self.totals.values()) and self.drawn.identical


def compare(
    lm: DiffusionLM, settings: DemoSettings, on_decode: Callable[[Mode, DecodeOutput], object] = lambda *_: None
) -> Comparison:
    """Decode held-out problems of every task in every mode of `settings`; `on_decode` is called after each decode.

    Modes take turns on each problem, and the one that goes first changes, so that a slow moment of the machine falls on
    all of them; each has run once, untimed, before the clock starts. All use the same cache.
    """
    modes = settings.modes
    held_out = {task: problems(task, "test", settings.problems_per_task, SEED) for task in TASKS}
    example = WorkedExample(max(held_out["addition"], key=lambda problem: len(problem.response)))
    for mode in modes:
        decode(lm, example.problem, mode, settings)

    tallies = {task: {mode: Tally() for mode in modes} for task in TASKS}
    for task, task_problems in held_out.items():
        for index, problem in enumerate(task_problems):
            outputs: dict[Mode, DecodeOutput] = {}
            seconds: dict[Mode, float] = {}
            first = index % len(modes)
            for mode in (*modes[first:], *modes[:first]):
                start = time.perf_counter()
                outputs[mode] = decode(lm, problem, mode, settings)
                seconds[mode] = time.perf_counter() - start
                on_decode(mode, outputs[mode])
            for mode in modes:
                tallies[task][mode] += tally(lm, problem, outputs[mode], outputs[STATIC], seconds[mode])
            if problem is example.problem:
                example.outputs = {mode: outputs[mode] for mode in modes}
    return Comparison(settings, tallies, example, draw_tokens(lm, example.problem, settings))


def draw_tokens(lm: DiffusionLM, problem: Problem, settings: DemoSettings) -> DrawnExample:
    """A problem's answer drawn with a temperature, by pooled drafts and statically."""
    drafted = Mode(settings.draft_steps[0], "pooled")
    output, static = (
        decode(lm, problem, mode, settings, temperature=TEMPERATURE, seed=DRAWN_SEED) for mode in (drafted, STATIC)
    )
    return DrawnExample(drafted, output, static)


def decode(lm: DiffusionLM, problem: Problem, mode: Mode, settings: DemoSettings, **arguments: Any) -> DecodeOutput:
    """Decode one problem in one mode; further `arguments` go to `freedave.generate`."""
    return generate(
        lm,
        prompt_ids(lm, problem),
        max_new_tokens=MAX_NEW_TOKENS,
        draft_steps=mode.draft_steps,
        drafting=mode.drafting,
        lookahead_steps=mode.lookahead_steps,
        block_length=settings.block_length,
        cache=settings.cache,
        **arguments,
    )


def prompt_ids(lm: DiffusionLM, problem: Problem) -> torch.Tensor:
    """The prompt of a problem as `[1, P]` token ids."""
    return torch.tensor([lm.tokenizer(problem.prompt)["input_ids"]], dtype=torch.int64)


def response_text(lm: DiffusionLM, output: DecodeOutput) -> str:
    """The generated text of a decode, up to its first end of sequence."""
    token_ids = output.sequences[0, -output.step_map.shape[1] :].tolist()
    return str(
        lm.tokenizer.decode(list(itertools.takewhile(lambda token_id: token_id not in lm.eos_token_ids, token_ids)))
    )


def identical(output: DecodeOutput, static: DecodeOutput) -> bool:
    """Whether two decodes committed the same tokens at the same static steps."""
    return torch.equal(output.sequences, static.sequences) and torch.equal(output.step_map, static.step_map)


def tally(lm: DiffusionLM, problem: Problem, output: DecodeOutput, static: DecodeOutput, seconds: float) -> Tally:
    """One problem's decode as a tally of one."""
    return Tally(
        problems=1,
        right=int(problem.check(response_text(lm, output))),
        identical=int(identical(output, static)),
        forwards=output.num_forwards,
        tokens=output.stats.tokens,
        seconds=seconds,
        forward_seconds=output.stats.forward_seconds,
    )
