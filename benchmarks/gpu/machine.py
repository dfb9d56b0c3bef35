"""The machine under test: a GPU, or with --dry-run this CPU in its place; and how a call is timed there."""

from __future__ import annotations

import functools
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import freedave_kernels as fk
from benchmarks.cases import ROWS, Shapes
from benchmarks.measure import Calls, CannotMeasureError, Timing, interleaved, timing
from benchmarks.processor import Processor

ROUNDS = 30
DTYPES = [torch.bfloat16, torch.float32]


@dataclass(frozen=True, eq=False)
class Machine:
    """`backends`: those of ours that are measured; `absent`: why others are not. `rounds`: timed rounds; each times every
    provider once."""

    dry: bool
    device: torch.device
    backends: list[str]
    absent: dict[str, str]
    rounds: int
    shapes: Shapes
    dynamic: bool = False

    @property
    def name(self) -> str:
        """As a folder name."""
        name = "dry-run" if self.dry else torch.cuda.get_device_name(self.device)
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def compiler(self) -> str:
        """A dry run goes through torch.compile without generating code."""
        return "aot_eager" if self.dry else "inductor"

    def free_memory(self) -> int:
        """Bytes that could be allocated on the device now."""
        return Processor(1).free_memory() if self.dry else torch.cuda.mem_get_info(self.device)[0]

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = {"dry_run": self.dry, "backends": self.backends, "absent": self.absent}
        if self.dry:
            return description
        properties = torch.cuda.get_device_properties(self.device)
        return description | {
            "gpu": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }

    def times(self, calls: Calls) -> dict[str, Timing]:
        """Interleaved. On a GPU by events on the stream, each call after the L2 cache was overwritten."""
        if self.dry:
            return interleaved(calls, self.rounds)
        return {name: timing(values) for name, values in self._gpu_samples(calls).items()}

    def _gpu_samples(self, calls: Calls) -> dict[str, list[float]]:
        for call in calls.values():
            call()
            call()
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        flush = torch.empty(2 * l2, dtype=torch.uint8, device=self.device)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize(self.device)
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def replayed(self, call: Callable[[], object], copies: int) -> Callable[[], object]:
        """`copies` calls as one CUDA graph: what the GPU needs when nothing has to be launched one by one."""
        if self.dry:
            return lambda: [call() for _ in range(copies)]
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(copies):
                call()

        def replay(inputs_stay: Callable[[], object] = call) -> None:
            graph.replay()

        return replay

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def back_to_back(self, call: Callable[[], object], count: int, between: Callable[[], object]) -> float:
        """Milliseconds of one of `count` calls on the device, the median; each is launched while the one before it runs, so
        that the host's part does not show. `between` runs before each, and does not count.
        """
        if self.dry:
            samples = []
            for _ in range(count):
                between()
                began = time.perf_counter()
                call()
                samples.append((time.perf_counter() - began) * 1e3)
            return statistics.median(samples)
        pairs = []
        for _ in range(count):
            between()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    def forget_peak_memory(self) -> None:
        if not self.dry:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes that tensors took at most since `forget_peak_memory`; 0 in a dry run."""
        return 0 if self.dry else torch.cuda.max_memory_allocated(self.device)

    @functools.cached_property
    def bandwidth(self) -> float:
        """`copy_bandwidth`, measured once."""
        return self.copy_bandwidth()

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large device-to-device copy."""
        source = torch.ones(2**20 if self.dry else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.times({"copy": lambda: target.copy_(source)})["copy"].median


def this_machine(dry: bool) -> Machine:
    available = fk.available_backends()
    if dry:
        wanted = ["cuda_emulated" if available.get("cuda_emulated", "") is None else "cpu"]
        shapes = Shapes([100, 1000], [(8, 5)], DTYPES, [4], [8], [1, 2])
        return Machine(True, torch.device("cpu"), wanted, {}, 4, shapes)
    if not torch.cuda.is_available():
        raise CannotMeasureError(
            "torch sees no GPU; run this on a machine with one, or with --dry-run to try the code itself"
        )
    wanted = [name for name in ("cuda", "triton") if available[name] is None]
    absent = {name: str(reason) for name in ("cuda", "triton") if (reason := available[name]) is not None}
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = Shapes([32000, 126464, 151936, 262144], ROWS, DTYPES, [8, 32], [32, 256], [1, 8, 32, 128])
    return Machine(False, device, wanted, absent, ROUNDS, shapes)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
