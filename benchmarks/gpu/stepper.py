"""Decodes on the graph executor, one step at a time: what each took, and the same step replayed alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from freedave import DiffusionLM
from freedave.decode.decoder import Decoder
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.sequence import Sequence
from freedave.decode.settings import Settings
from freedave.decode.shapes import Shape
from freedave_kernels import DraftPool


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

    Args:
        settings: of the graph executor. `settings.static()` are those of static decoding in the same shapes.
    """

    def __init__(self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int) -> None:
        self._decoder = Decoder(lm, settings, slots=slots, capacity=capacity)
        executor: Any = self._decoder._executor
        self.executor: GraphExecutor = executor

    def decode(
        self,
        prompts: list[list[int]],
        after_step: Callable[[Step], None] | None = None,
        around_step: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Sequence]:
        """Decodes all of the prompts, of which there are at most `slots`; each step within a context of `around_step`."""
        sequences = [self._decoder.add(prompt) for prompt in prompts]
        while self._decoder.sequences:
            before = {} if after_step is None else self.executor.shapes
            with around_step():
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
        self.executor.steps.run(self.shape(shape))

    def shape(self, name: str) -> Shape:
        return next(shape for shape in self.executor.steps.steps if str(shape) == name)

    @contextmanager
    def state_kept(self) -> Iterator[Callable[[], None]]:
        """Gives a call that puts the decode back to where it is now, which also happens in the end."""
        with torch.inference_mode():
            parts = [
                part.memory if isinstance(part, DraftPool) else part for part in vars(self.executor.state).values()
            ]
            state = [part for part in parts if isinstance(part, torch.Tensor)]
            saved = [part.clone() for part in state]

            def restore() -> None:
                torch._foreach_copy_(state, saved)

            yield restore
            restore()
