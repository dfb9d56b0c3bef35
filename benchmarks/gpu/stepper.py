"""Decodes on the graph executor, one step at a time: what each took, and the same step replayed alone."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from freedave import DiffusionLM
from freedave.decoder import Decoder
from freedave.graph_executor import GraphExecutor, Shape
from freedave.sequence import Sequence
from freedave.settings import Settings
from freedave_kernels.ops.draft_step import COUNTERS


@dataclass(frozen=True)
class Step:
    """Seconds from launch to the record on the host; `shapes`: those that ran, with how often each has run by then. A
    prompt's forward has no shape that is kept.
    """

    seconds: float
    shapes: dict[str, int]

    @property
    def replayed(self) -> bool:
        """Whether it was neither a prompt's, nor compiled (the first of its shape) nor captured (the second)."""
        return bool(self.shapes) and min(self.shapes.values()) > 2


class Stepper:
    """`slots` sequences that advance together on one graph executor, which keeps its shapes from decode to decode.

    `active_drafts`: how many of a step's drafts count; 1 is static decoding in the shapes of all of them.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        settings: Settings,
        *,
        slots: int,
        capacity: int,
        compile: bool | None = None,
        active_drafts: int | None = None,
    ) -> None:
        self._decoder = _decoder(lm, settings, slots, capacity, compile)
        self.executor = self._decoder.executor
        self.executor.active_drafts = active_drafts or settings.draft_steps

    def decode(self, prompts: list[list[int]], after_step: Callable[[Step], None] | None = None) -> list[Sequence]:
        """Decodes all of the prompts, of which there are at most `slots`."""
        sequences = [self._decoder.add(prompt) for prompt in prompts]
        while self._decoder.sequences:
            before = self.executor.shapes
            began = time.perf_counter()
            self._decoder.launch()
            self._decoder.poll()
            seconds = time.perf_counter() - began
            if after_step is not None:
                ran = {name: runs for name, runs in self.executor.shapes.items() if runs != before.get(name, 0)}
                after_step(Step(seconds, ran))
        return sequences

    def replay(self, shape: str) -> None:
        """Launches a step of a shape that has been captured, from the state that there is; reads nothing."""
        self.executor._run(self.shape(shape))

    def shape(self, name: str) -> Shape:
        return next(shape for shape in self.executor._steps if str(shape) == name)

    @contextmanager
    def state_kept(self) -> Iterator[Callable[[], None]]:
        """Gives a call that puts the decode back to where it is now, which also happens in the end."""
        with torch.inference_mode():
            state = [part for part in vars(self.executor).values() if isinstance(part, torch.Tensor)]
            saved = [part.clone() for part in state]

            def restore() -> None:
                torch._foreach_copy_(state, saved)

            yield restore
            restore()


class _OnExecutor:
    """What `Decoder` does around a graph executor."""

    def __init__(
        self, lm: DiffusionLM, settings: Settings, slots: int, capacity: int, compile: bool | None = None
    ) -> None:
        self.executor = GraphExecutor(lm, settings, slots=slots, capacity=capacity, compile=compile)
        self.sequences: list[Sequence] = []
        self._settings, self._mask = settings, lm.mask_token_id
        self._free = list(range(slots))
        self._added = self._forwards = 0

    def add(self, prompt: list[int]) -> Sequence:
        sequence = Sequence(self._added, self._free.pop(), prompt, self._settings, self._mask)
        self._added += 1
        self.sequences.append(sequence)
        self.executor.enter(sequence)
        return sequence

    def launch(self) -> None:
        self._launched = self.executor.launch(self.sequences)

    def poll(self) -> None:
        counters = len(COUNTERS)
        for launched in self._launched:
            length = launched.window
            records = launched.record.tolist()
            for sequence, row in zip(launched.sequences, launched.rows, strict=True):
                record = records[row]
                committed, step_map = record[counters + 2 * length :][:length], record[counters + length :][:length]
                sequence.commit_on_device(committed, record[:counters], step_map, self._forwards)
                if sequence.finished:
                    self.executor.leave(sequence.slot)
                    self._free.append(sequence.slot)
        self.sequences = [sequence for sequence in self.sequences if not sequence.finished]
        self._forwards += 1


class _OnDecoder:
    """`Decoder`, and the graph executor in it."""

    def __init__(
        self, lm: DiffusionLM, settings: Settings, slots: int, capacity: int, compile: bool | None = None
    ) -> None:
        options: dict[str, Any] = {"executor": "graph", "compile": compile}
        self._decoder = Decoder(lm, settings, slots=slots, capacity=capacity, **options)
        parts = [self._decoder, *vars(self._decoder).values()]
        self.executor: GraphExecutor = next(part for part in parts if isinstance(part, GraphExecutor))
        self.add, self.launch, self.poll = self._decoder.add, self._decoder.launch, self._decoder.poll

    @property
    def sequences(self) -> list[Sequence]:
        return self._decoder.sequences


def _decoder(
    lm: DiffusionLM, settings: Settings, slots: int, capacity: int, compile: bool | None
) -> _OnExecutor | _OnDecoder:
    takes = "executor" in inspect.signature(Decoder).parameters
    return (_OnDecoder if takes else _OnExecutor)(lm, settings, slots, capacity, compile)
