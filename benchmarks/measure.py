"""Interleaved timing: on a machine with neighbours, only what ran in the same seconds can be compared.

`torch.utils.benchmark.Timer` times one statement at a time and warms up before each; here its clock and its statistics
(`Measurement`) serve rounds in which every provider is timed once, in turn.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

Calls = Mapping[str, Callable[[], object]]
FEWEST_ROUNDS = 3
STREAMS = 16  # a core's prefetcher follows several streams of addresses at once; one leaves it idle at every page
QUIET_PART = 4  # the quietest quarter of the rounds


class CannotMeasureError(RuntimeError):
    """Something is missing on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds that count; `of_rounds` were timed."""

    median: float
    lower: float
    upper: float
    best: float
    rounds: int
    of_rounds: int

    def per(self, count: int) -> Timing:
        """One of `count` equal parts of the call."""
        parts = {name: getattr(self, name) / count for name in ("median", "lower", "upper", "best")}
        return dataclasses.replace(self, **parts)


def timing(samples: Sequence[float], of_rounds: int | None = None) -> Timing:
    """Median and quartiles of seconds a call. `of_rounds`: how many were timed, where not all count."""
    measured = Measurement(1, list(samples), TaskSpec(stmt="", setup=""))
    lower, _, upper = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(measured.median, lower, upper, min(samples), len(samples), of_rounds or len(samples))


def mean(timings: Sequence[Timing]) -> Timing:
    """Of calls that were timed in the same rounds."""
    median, lower, upper, best = (
        statistics.fmean(column)
        for column in zip(*((t.median, t.lower, t.upper, t.best) for t in timings), strict=True)
    )
    return Timing(median, lower, upper, best, timings[0].rounds, timings[0].of_rounds)


def interleaved(
    calls: Calls, rounds: int, budget: float = math.inf, fill: float = 1e-3, yardstick: str | None = None
) -> dict[str, Timing]:
    """Times every provider once a round, in turn; a short call is repeated until it fills `fill` seconds.

    `budget`: seconds that all rounds may take together. Where `rounds` would take longer there are fewer of them, but never
    fewer than three; each `Timing` says how many there were.

    `yardstick`: one of the calls, which is not itself judged: only the quarter of the rounds counts in which it took least
    time. A neighbour on the same core doubles the seconds of everything, and comes and goes within seconds: the yardstick
    tells which rounds were quiet without a look at what is judged.
    """
    repeats = {}
    a_round = 0.0
    for name, call in calls.items():
        call()
        start = timer()
        call()
        seconds = timer() - start
        repeats[name] = max(1, round(fill / seconds))
        a_round += repeats[name] * seconds
    rounds = max(min(rounds, int(budget / a_round) if budget < math.inf else rounds), min(rounds, FEWEST_ROUNDS))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count = repeats[name]
            start = timer()
            for _ in range(count):
                call()
            samples[name].append((timer() - start) / count)
    counted: Sequence[int] = range(rounds)
    if yardstick is not None:
        quiet = sorted(counted, key=samples[yardstick].__getitem__)
        counted = sorted(quiet[: max(rounds // QUIET_PART, min(rounds, FEWEST_ROUNDS))])
    return {name: timing([values[i] for i in counted], rounds) for name, values in samples.items()}


def readers(memory: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read `memory` as fast as this machine can; the best of them is its read bandwidth.

    The memory must have been written: pages that never were are all one zero page, which the cache holds.
    """
    flat = memory.flatten()
    as_float = flat.view(torch.float32) if flat.numel() * flat.itemsize % 4 == 0 else flat
    ways: dict[str, Callable[[], object]] = {"read: float sum": as_float.sum, "read: float max": as_float.amax}
    if flat.numel() * flat.itemsize % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        ways["read: int64 sum"] = flat.view(torch.int64).sum
    rows = as_float[: as_float.numel() // STREAMS * STREAMS].view(STREAMS, -1)
    tops = rows.new_empty(rows.shape[1])
    ways["read: max of 16 rows"] = lambda: torch.amax(rows, 0, out=tops)
    return ways


@dataclass(frozen=True)
class Line:
    """Seconds against size: `slope` a unit, `at_zero`, and the largest relative distance of a point from the line."""

    slope: float
    at_zero: float
    distance: float


def line(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least relative errors."""
    return _fitted([[n / t, 1 / t] for n, t in zip(sizes, seconds, strict=True)])


def proportional(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line through the origin with the least relative errors."""
    return _fitted([[n / t] for n, t in zip(sizes, seconds, strict=True)])


def _fitted(rows: list[list[float]]) -> Line:
    design = torch.tensor(rows, dtype=torch.float64)
    solution = torch.linalg.lstsq(design, torch.ones(len(rows), 1, dtype=torch.float64)).solution
    distance = (design @ solution - 1).abs().max()
    return Line(float(solution[0]), float(solution[1]) if len(solution) > 1 else 0.0, float(distance))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope on logarithmic axes: 1 where time is proportional to size, 0 where it does not depend on it."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
