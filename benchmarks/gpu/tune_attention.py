"""Which `tiles` suit `draft_attention` on this device: combinations for shapes of decode steps, from graphs over rotating
inputs. Of the combinations that may be chosen together (equal keys and splits, which decide a row's bits), the best ones.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from benchmarks.gpu.attention import TINY, Case, copies_of, ours, rotating
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import LLADA_8B, SDAR_8B
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record
from freedave_kernels.triton import draft_attention as kernels
from freedave_kernels.triton.draft_attention import Tiles

FEW = [Case(SDAR_8B, 1, 1, 8, stored) for stored in (4096, 128)]
MANY = [
    *(Case(SDAR_8B, 1, 8, 20, stored) for stored in (4096, 128)),
    *(Case(LLADA_8B, 1, 4, 32, stored) for stored in (4096, 128)),
    Case(SDAR_8B, 16, 8, 20, 128),
]
# rows, keys, split, warps, registers, stages
FOR_FEW = [
    Tiles(64, keys, split, 1, 4, 255, stages)
    for keys, split, stages in (
        *((64, 512, 4), (64, 512, 3), (64, 256, 4), (64, 1024, 4), (32, 512, 4), (32, 256, 4)),
        *((128, 512, 2), (128, 256, 2)),
    )
]
FOR_MANY = [
    *(Tiles(128, 64, split, 1, 8, 255, 3) for split in (512, 256, 1024)),
    Tiles(128, 64, 512, 1, 8, 255, 2),
    *(Tiles(128, 128, split, 1, 8, 255, 2) for split in (512, 256)),
    *(Tiles(64, keys, 512, 1, 4, 255, stages) for keys, stages in ((64, 3), (32, 4), (128, 2))),
]
BEST = 4
THREADS = 12  # that compile


def run(plan: Plan) -> None:
    few, many = (TINY[:1], TINY[1:]) if plan.machine.dry else (FEW, MANY)
    plan.case("tiles of draft_attention", 60, functools.partial(measure, plan.record, plan.machine, few, many))


def measure(record: Record, machine: Machine, few: list[Case], many: list[Case]) -> None:
    work = [
        (case, chosen) for cases, choices in ((few, FOR_FEW), (many, FOR_MANY)) for chosen in choices for case in cases
    ]
    with torch.inference_mode():
        failed = {} if machine.dry else _compile(machine, work)
        found: dict[Case, dict[Tiles, float]] = {}
        for case in [*few, *many]:
            found[case] = _time(record, machine, case, [chosen for other, chosen in work if other == case], failed)
            for chosen, seconds in sorted(found[case].items(), key=lambda item: item[1])[:BEST]:
                record.note(f"  best: {seconds * 1e6:6.1f} us  {_text(chosen)}")
    record.note("choices together, by the mean of their times over the best of each shape:")
    for mean, keys, split, slower in sorted(_together(found))[:BEST]:
        record.note(f"  {mean:.3f}  keys {keys}, split {split}: {', '.join(slower)}")


def _time(
    record: Record, machine: Machine, case: Case, choices: list[Tiles], failed: dict[tuple[Case, Tiles], str]
) -> dict[Tiles, float]:
    """Seconds a call; each choice over the same inputs."""
    name = f"{case.published.name} B={case.batch} K={case.drafts} L={case.length}, {case.stored} stored"
    copies = copies_of(machine, case)
    call = rotating(ours(machine, case, copies))
    found = {}
    for chosen in choices:
        reason = failed.get((case, chosen))
        if reason is None:
            try:
                with using(chosen):
                    replay = machine.replayed(call, 1)
                found[chosen] = machine.times({"ours": replay})["ours"].per(copies).median
            except Exception as error:  # too much shared memory, mostly
                reason = f"{type(error).__name__}: {error}"
        text = f"{found[chosen] * 1e6:6.1f} us" if chosen in found else f"left out, {(reason or '')[:150]}"
        record.put(
            "tiles", f"{name}: {_text(chosen)}: {text}", case=name, seconds=found.get(chosen), **chosen._asdict()
        )
    return found


class _Chosen(threading.local):
    tiles: Tiles | None = None


_chosen = _Chosen()
_as_they_are = kernels.tiles


def _tiles(dtype: torch.dtype, padded: int, device_architecture: int) -> Tiles:
    return _chosen.tiles or _as_they_are(dtype, padded, device_architecture)


@contextmanager
def using(chosen: Tiles) -> Iterator[None]:
    """Calls of this thread take these tiles."""
    kernels.tiles = _tiles
    _chosen.tiles = chosen
    try:
        yield
    finally:
        _chosen.tiles = None


def _compile(machine: Machine, work: list[tuple[Case, Tiles]]) -> dict[tuple[Case, Tiles], str]:
    """In threads, one shape after the other of those that need further kernels; what failed, and why."""

    def one(item: tuple[Case, Tiles]) -> str | None:
        case, chosen = item
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(machine.device)), using(chosen):
                ours(machine, case, 1)[0]()
                machine.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(one, work))
    return {item: reason for item, reason in zip(work, reasons, strict=True) if reason is not None}


def _together(found: dict[Case, dict[Tiles, float]]) -> Iterator[tuple[float, int, int, list[str]]]:
    pairs = {(chosen.keys, chosen.split) for times in found.values() for chosen in times}
    for keys, split in pairs:
        slower = []
        for times in found.values():
            own = [seconds for chosen, seconds in times.items() if (chosen.keys, chosen.split) == (keys, split)]
            slower.append(min(own) / min(times.values()) if own else math.inf)
        if max(slower) < math.inf:
            yield sum(slower) / len(slower), keys, split, [f"{ratio:.2f}" for ratio in slower]


def _text(chosen: Tiles) -> str:
    return "{} rows, {} keys, split {}, span {}, {} warps, {} registers, {} stages".format(*chosen)
