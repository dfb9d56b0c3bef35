"""Interleaved timing: on a machine with neighbours, only what ran in the same seconds can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


class CannotMeasureError(RuntimeError):
    """Something is missing on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds."""

    median: float
    lower: float
    upper: float
    best: float

    def per(self, count: int) -> Timing:
        """One of `count` equal parts of the call."""
        return Timing(self.median / count, self.lower / count, self.upper / count, self.best / count)


def interleaved(providers: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 2e-4) -> dict[str, Timing]:
    """Times every provider once a round, in turn; a short call is repeated until it fills `seconds`."""
    repeats = {}
    for name, call in providers.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))

    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            count = repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper, min(values))


def readers(num_bytes: int) -> dict[str, Callable[[], object]]:
    """Ways to read `num_bytes` of memory as fast as this machine can; the best of them is its read bandwidth.

    The memory is written first: pages that were never written are all one zero page, which the cache holds.
    """
    memory = torch.empty(num_bytes // 4, dtype=torch.float32).normal_()
    words = memory.view(torch.int64)
    return {"read: float sum": memory.sum, "read: float max": memory.amax, "read: int64 sum": words.sum}


def slope(sizes: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """The line with the least relative errors: seconds per unit, seconds at 0, and the largest relative distance from it."""
    design = torch.tensor([[n / t, 1 / t] for n, t in zip(sizes, seconds, strict=True)], dtype=torch.float64)
    solution = torch.linalg.lstsq(design, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
    distance = (design @ solution - 1).abs().max()
    return float(solution[0]), float(solution[1]), float(distance)
