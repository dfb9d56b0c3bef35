"""The CPU as the machine that is measured: what runs on it, what does not and why, and how calls are timed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

import freedave_kernels as fk
from benchmarks import compiled
from benchmarks.measure import Calls, Timing, interleaved

YARDSTICK = "torch.add"  # what the machine needs for the simplest call of torch
CORES = "torch.exp"  # all cores, out of their caches
QUIET_ROUNDS, QUIET_BUDGET = 1500, 12.0  # more seconds than a neighbour usually stays


@dataclass(frozen=True)
class Processor:
    """`rounds`: at most so many, within `budget` seconds a case; `quiet`: of them count those in which a computation on all
    cores was fastest. `quick`: a smoke run, whose numbers mean nothing.
    """

    rounds: int
    budget: float = math.inf
    quiet: bool = False
    quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backends: list[str] = field(default_factory=lambda: ["cpu"])
    dynamic: bool = True

    @property
    def compiler(self) -> str:
        """A smoke run goes through torch.compile without generating code, which would take most of its time."""
        return "aot_eager" if self.quick else "inductor"

    @functools.cached_property
    def absent(self) -> dict[str, str]:
        """Providers that are not timed here, and why."""
        reasons = {"triton": _untimed_triton(), "cuda": _untimed_cuda()}
        missing = None if self.quick else compiled.unavailable()
        return reasons | ({"compiled": missing} if missing else {})

    def times(self, calls: Calls) -> dict[str, Timing]:
        if not self.quiet:
            return interleaved(calls, self.rounds, self.budget)
        x = torch.rand(2**17)
        result = torch.empty_like(x)
        calls = {**calls, CORES: lambda: torch.exp(x, out=result)}
        timings = interleaved(calls, self.rounds, self.budget, yardstick=CORES)
        del timings[CORES]
        return timings

    def quiet_times(self, calls: Calls) -> dict[str, Timing]:
        """Of short calls, for an absolute number: of many rounds, those in which `torch.add` was fastest."""
        x = torch.rand(1, 4)
        rounds, budget = (self.rounds, self.budget) if self.quick else (QUIET_ROUNDS, QUIET_BUDGET)
        return interleaved({**calls, YARDSTICK: lambda: torch.add(x, x)}, rounds, budget, yardstick=YARDSTICK)

    def free_memory(self) -> int:
        """Bytes that could be allocated now without swapping."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return 2**62  # not Linux: allocation itself will tell
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _untimed_triton() -> str:
    reason = fk.available_backends()["triton"]
    if reason is None and fk.triton.interpreting():
        reason = "TRITON_INTERPRET is set, and how long the interpreter takes says nothing; use a GPU"
    return reason or "these are CPU tensors; `python -m benchmarks gpu` times it on the GPU"


def _untimed_cuda() -> str:
    return fk.available_backends()["cuda"] or "these are CPU tensors; `python -m benchmarks gpu` times it on the GPU"
