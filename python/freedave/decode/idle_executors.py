"""Graph executors between two decodes: what a model's shapes were compiled and captured for serves the next decode, too."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.settings import Settings

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# Positions of a slot come in multiples of this, so that decodes of nearly the same length find each other's executor.
POSITIONS_TOGETHER = 256

_lock = threading.Lock()  # for `DiffusionLM.idle_executor`: kept there, an executor is freed with its model


def take(lm: DiffusionLM, settings: Settings, slots: int, capacity: int) -> GraphExecutor:
    """The model's idle executor if it serves these settings, else a new one; nobody else has it until `give_back`.

    One is kept a model, the last that was used: its buffers are as large as the cache of the decode that it served.
    """
    with _lock:
        executor, lm.idle_executor = lm.idle_executor, None
    if isinstance(executor, GraphExecutor) and executor.serves(settings, slots, capacity):
        executor.reset(settings)
        return executor
    del executor  # frees its buffers before the new ones are allocated
    return GraphExecutor(lm, settings, slots=slots, capacity=-(-capacity // POSITIONS_TOGETHER) * POSITIONS_TOGETHER)


def give_back(lm: DiffusionLM, executor: GraphExecutor) -> None:
    """Keeps an executor, all of whose sequences have ended, for the model's next decode."""
    with _lock:
        lm.idle_executor = executor


def forget(lm: DiffusionLM) -> None:
    """Frees what is kept for a model: its executor's buffers and graphs."""
    with _lock:
        lm.idle_executor = None
