"""The kernels of one step, as the profiler saw them on the device, and how many graphs the compiler made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.machine import Machine

MOST_LISTED = 15


def of(machine: Machine, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Kernels, copies and fills of one `call`, which follows `before`: how many, their microseconds, the longest by name."""
    before()
    call()  # whatever happens only once
    before()
    machine.synchronize()
    activities = [ProfilerActivity.CPU] + ([] if machine.dry else [ProfilerActivity.CUDA])
    with profile(activities=activities) as trace:
        call()
        machine.synchronize()
    events = [event for event in trace.events() if machine.dry or str(event.device_type).endswith("CUDA")]
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        spent[event.name].append(event.time_range.elapsed_us())
    total = sum(map(sum, spent.values()))
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:MOST_LISTED]
    listed = [{"name": name[:120], "count": len(times), "us": round(sum(times), 1)} for name, times in longest]
    return {"kernels": sum(map(len, spent.values())), "busy_us": round(total, 1), "longest": listed}


def text(what: str, found: dict[str, Any]) -> str:
    lines = [f"{what}: {found['kernels']} kernels, busy for {found['busy_us'] / 1e3:.2f} ms"]
    lines += [f"    {row['us']:>9.1f} us {row['count']:>5} x {row['name'][:90]}" for row in found["longest"]]
    return "\n".join(lines)


def compiled_frames() -> int:
    """Graphs that torch.compile has made in this process."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
