"""A step as users run it: `Decoder.launch` and `Decoder.poll`, without the model's own forward.

The model is small and random, its vocabulary is a published one. What counts as its forward is the backbone, our attention
and its cache in it included, and the products with the projection's weights; everything else is the decoder's: planning,
`partial_predictions` of each slice of the vocabulary, drafting, reading the record, committing.

Steps are timed as they are. The same decode runs once more under `counts.Operators`, which tells what is dispatched and what
our ops take of it: the ops alone, in the very steps that are timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers

import freedave
from benchmarks.counts import OURS, Operators
from benchmarks.measure import timing
from benchmarks.record import Record, shape_text, time_text
from freedave.decode.decoder import Decoder
from freedave.decode.settings import Settings, resolve_settings

EXECUTORS = ("planned", "graph")
STATIC, DRAFTS = 1, 8
PROMPT = 40
SEED = 0


@dataclass(frozen=True)
class Scale:
    """`steps` of each decode are measured, the one with the prompt is not; of `rounds` decodes the best counts, step by step:
    they are the same steps, and what a neighbour on the machine takes is only ever added."""

    vocab: int
    block_length: int
    batches: tuple[int, ...]
    steps: int
    rounds: int


FULL = Scale(151936, 4, (1, 8), steps=12, rounds=4)  # SDAR's vocabulary and blocks
QUICK = Scale(5000, 8, (1, 2), steps=4, rounds=2)


@dataclass(frozen=True)
class Step:
    """`forward`: seconds in the model; `outside`: in everything else."""

    forward: float
    outside: float


@dataclass
class Samples:
    """By round, the steps of a decode: as they are, and as they were counted."""

    timed: list[list[Step]] = field(default_factory=list)
    counted: list[list[Operators]] = field(default_factory=list)


class ModelsPart:
    """Where a step is in the model's own forward; `seconds` of it. `operators` do not count there."""

    def __init__(self, lm: freedave.DiffusionLM, operators: Operators | None = None) -> None:
        self.seconds = 0.0
        self._lm = lm
        self._operators = operators
        self._depth = 0
        self._began = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The backbone by hooks. The projection's products by the function that makes them: a hook on the projection would
        make the decoder take another path."""
        backbone: Any = self._lm.model.base_model
        hooks = [
            backbone.register_forward_pre_hook(lambda *_: self._enter()),
            backbone.register_forward_hook(lambda *_: self._leave()),
        ]
        linear = F.linear

        def product(*args: Any, **kwargs: Any) -> torch.Tensor:
            self._enter()
            try:
                return linear(*args, **kwargs)
            finally:
                self._leave()

        F.linear = product  # type: ignore[assignment]
        try:
            yield
        finally:
            F.linear = linear
            for hook in hooks:
                hook.remove()

    def _enter(self) -> None:
        if self._depth == 0:
            self._began = time.perf_counter()
            self._pause(True)
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began
            self._pause(False)

    def _pause(self, paused: bool) -> None:
        if self._operators is not None:
            self._operators.paused = paused


def run(record: Record, quick: bool) -> None:
    scale = QUICK if quick else FULL
    lm = language_model(scale)
    print()
    for batch, drafts in itertools.product(scale.batches, (STATIC, DRAFTS)):
        wanted = {executor: settings(lm, scale, drafts, executor) for executor in EXECUTORS}
        samples = {executor: Samples() for executor in EXECUTORS}
        for each in wanted.values():
            decode(lm, each, scale, batch)  # warms up
        for _ in range(scale.rounds):
            for executor, each in wanted.items():
                samples[executor].timed.append(decode(lm, each, scale, batch))
                samples[executor].counted.append([])
                decode(lm, each, scale, batch, samples[executor].counted[-1])
        for executor in EXECUTORS:
            put(record, scale, batch, drafts, executor, samples[executor])


def language_model(scale: Scale, layers: int = 2) -> freedave.DiffusionLM:
    config = transformers.Qwen3Config(
        vocab_size=scale.vocab,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = transformers.Qwen3ForCausalLM(config)
    return freedave.DiffusionLM(model, scale.vocab - 1, attention="block_causal", block_length=scale.block_length)


def settings(lm: freedave.DiffusionLM, scale: Scale, drafts: int, executor: str) -> Settings:
    new = (scale.steps + 1) * drafts  # more than the steps can commit
    return resolve_settings(lm, PROMPT, new, draft_steps=drafts, eos_token_id=[], executor=executor)


def decode(
    lm: freedave.DiffusionLM, wanted: Settings, scale: Scale, batch: int, counted: list[Operators] | None = None
) -> list[Step]:
    """Seconds of a decode's steps. With a list for them, what each dispatches is counted; its seconds mean nothing then."""
    generator = torch.Generator().manual_seed(SEED)
    decoder = Decoder(lm, wanted, slots=batch, capacity=wanted.sequence_length(PROMPT))
    for _ in range(batch):
        decoder.add(torch.randint(scale.vocab - 1, (PROMPT,), generator=generator))
    steps = []
    for number in range(scale.steps + 1):
        operators = Operators() if counted is not None else None
        part = ModelsPart(lm, operators)
        with part.watched(), operators or nullcontext():
            began = time.perf_counter()
            decoder.launch()
            decoder.poll()
            seconds = time.perf_counter() - began
        if number:  # not the one that computes the prompts
            steps.append(Step(part.seconds, seconds - part.seconds))
            if counted is not None and operators is not None:
                counted.append(operators)
    for sequence in decoder.sequences:
        decoder.drop(sequence)
    decoder.close()
    return steps


def put(record: Record, scale: Scale, batch: int, drafts: int, executor: str, samples: Samples) -> None:
    timed, counted = (list(zip(*rounds, strict=True)) for rounds in (samples.timed, samples.counted))
    outside = timing([min(step.outside for step in same) for same in timed])
    forward = statistics.median(min(step.forward for step in same) for same in timed)
    ops = statistics.median(min(step.our_seconds for step in same) for same in counted)
    by_number = sorted((same[0] for same in counted), key=lambda step: step.operations.total())
    middle = by_number[len(by_number) // 2]
    ours = {name.removeprefix(OURS): n for name, n in middle.operations.items() if name.startswith(OURS)}
    shape = {"B": batch, "K": drafts, "block": scale.block_length, "V": scale.vocab}
    text = (
        f"launch and poll {shape_text(shape):<34}{executor:<9}without the model: {time_text(outside.median)} "
        f"({time_text(outside.lower)} - {time_text(outside.upper)}), our ops alone {time_text(ops)}; "
        f"{middle.operations.total()} operations, {sum(ours.values())} of them ours"
    )
    record.put(
        "decoder_step",
        text,
        provider=executor,
        shape=shape,
        dtype="float32",
        median_us=outside.median * 1e6,
        lower_quartile_us=outside.lower * 1e6,
        upper_quartile_us=outside.upper * 1e6,
        forward_us=forward * 1e6,
        ops_us=ops * 1e6,
        steps=len(counted),
        rounds=scale.rounds,
        operations=middle.operations.total(),
        most_operations=by_number[-1].operations.total(),
        ops=ours,
        synchronisations=max(step.synchronisations for step in by_number),
    )
