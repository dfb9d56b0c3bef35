"""Running a step of a fixed shape: first launch by launch, then captured in a CUDA graph, from then on replayed."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from freedave.decode.device_step import DeviceStep
from freedave.decode.shapes import Shape
from freedave.forward.compiled_layers import compiled_layers, is_compile_error

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

logger = logging.getLogger(__name__)


@dataclass
class CapturedStep:
    """A shape's buffers, and how often it ran; `seconds`: what its runs took, as the host sees it, until it was ready."""

    window: list[torch.Tensor]
    record: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    runs: int = 0
    seconds: float = 0.0


class CapturedSteps:
    """The shapes that a step has run in.

    `layers`: the model's layers, compiled, or None. `capture`: whether steps are captured. Where the model does not allow one
    of them, that is given up for good, with a warning.
    """

    def __init__(self, lm: DiffusionLM, step: DeviceStep, *, compile: bool, capture: bool) -> None:
        self.layers = compiled_layers(lm) if compile else None
        self.capture = capture
        self.steps: dict[Shape, CapturedStep] = {}
        self.ran: Counter[Shape] = Counter()
        self.new_seconds = 0.0
        """What the last new shape took until it was ready; 0 where none was made yet."""
        self._name = lm.name
        self._step = step
        self._pool: Any = None

    def run(self, shape: Shape, *, compiled: bool = True) -> torch.Tensor:
        """Runs a step whose shape will come again, with compiled layers where there are any and it is to; its record."""
        step = self.steps.get(shape)
        if step is None:
            step = self.steps[shape] = CapturedStep(self._step.state.window_buffers(shape))
            if self.capture or (compiled and self.layers is not None):
                logger.info("a new shape, which takes a moment: %s", shape)
        if self.ready(shape):
            return self._run(shape, step, compiled)
        began = time.perf_counter()
        record = self._run(shape, step, compiled)
        step.seconds += time.perf_counter() - began
        if self.ready(shape):
            self.new_seconds = step.seconds
        return record

    def ready(self, shape: Shape) -> bool:
        """Whether the next run of this shape takes no longer than those after it."""
        if not self.capture and self.layers is None:
            return True
        step = self.steps.get(shape)
        return step is not None and step.runs > (1 if self.capture else 0)

    def runs(self, shape: Shape) -> int:
        step = self.steps.get(shape)
        return 0 if step is None else step.runs

    def _run(self, shape: Shape, step: CapturedStep, compiled: bool) -> torch.Tensor:
        step.runs += 1
        self.ran[shape] += 1
        # The first run compiles, and loads kernels; the second is captured.
        if self.capture and step.runs > 1 and step.graph is None:
            self._record(shape, step, compiled)
        if step.graph is None:
            return self._by_launches(shape, step.window, compiled)
        assert step.record is not None
        step.graph.replay()
        # Graphs share their memory: the next one may write intermediate results where this record is.
        return step.record.clone()

    def run_once(self, shape: Shape) -> torch.Tensor:
        """Runs a step whose shape is not kept."""
        return self._by_launches(shape, self._step.state.window_buffers(shape), compiled=False)

    def _by_launches(self, shape: Shape, window: list[torch.Tensor], compiled: bool) -> torch.Tensor:
        """Runs a step launch by launch."""
        with self._step.state.lent(window):
            if compiled and self.layers is not None:
                try:
                    with self.layers.instead():
                        return self._step.run(shape, window)
                except Exception as error:
                    if not is_compile_error(error):
                        raise
                    self.layers = None
                    warnings.warn(f"{self._name} does not compile, so it runs uncompiled: {error}", stacklevel=2)
            return self._step.run(shape, window)

    def _record(self, shape: Shape, step: CapturedStep, compiled: bool) -> None:
        """Captures a step, without running it."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step.record = self._by_launches(shape, step.window, compiled)
        except RuntimeError as error:  # for example, the model reads back a result
            self.capture = False
            warnings.warn(f"{self._name} cannot be captured, so it runs launch by launch: {error}", stacklevel=2)
        else:
            step.graph = graph
