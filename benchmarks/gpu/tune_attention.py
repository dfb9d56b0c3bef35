"""Which `tiles` suit `draft_attention` on this device, and what programs should share out: choices for shapes of decode
steps, from graphs over rotating inputs. Of the choices that can be made together (a form: equal keys, splits and spans, which
decide a row's bits), the best ones, beside those of the form that is chosen now.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from benchmarks.gpu.attention import TINY, Case, copies_of, ours, rotating
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import LLADA_8B, SDAR_8B
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record
from freedave_kernels.triton import draft_attention as kernels
from freedave_kernels.triton.draft_attention import Tiles

Form = tuple[int, int, int]  # keys, split, span
Sharing = Literal["nothing", "spans", "splits"]


class Choice(NamedTuple):
    """`sharing`: what programs share out; None: as `shared_out` has it."""

    tiles: Tiles
    sharing: Sharing | None = None

    @property
    def form(self) -> Form:
        return self.tiles[1:4]

    def __str__(self) -> str:
        sharing = f", {self.sharing} shared out" if self.sharing else ""
        return "{} rows, {} keys, split {}, span {}, {} warps, {} registers, {} stages".format(*self.tiles) + sharing


# By worth: what does not fit the time is left out.
FORMS: list[Form] = [(32, 512, 1), (32, 512, 3), (32, 512, 2), (64, 512, 3), (32, 256, 3), (32, 256, 6)]
NEAR = [
    Case(SDAR_8B, 1, 8, 20, 128),
    Case(SDAR_8B, 1, 1, 8, 128),
    Case(LLADA_8B, 1, 4, 32, 128),
    Case(SDAR_8B, 1, 16, 36, 128),
]
FAR = Case(SDAR_8B, 1, 1, 8, 4096)
FAR_MANY = [Case(SDAR_8B, 1, 8, 20, 4096), Case(LLADA_8B, 1, 4, 32, 4096), Case(SDAR_8B, 1, 16, 36, 4096)]
SECONDS = 90
COMPILING = 55  # of them
THREADS = 14  # that compile
BEST = 4
LATE = "no time was left"


def flat(form: Form) -> Choice:
    """Two programs a multiprocessor, of 64 rows."""
    return Choice(Tiles(64, *form, 4, 255, 4 if form[0] == 32 else 3))


def for_many(form: Form) -> Iterator[Choice]:
    """Rows by the hundred and thousands of stored positions: taller tiles, which read them less often; more programs a
    multiprocessor; every way of sharing out.
    """
    keys, _, span = form
    ways: list[Sharing] = ["spans" if span > 1 else "splits"]
    yield from (Choice(flat(form).tiles, sharing) for sharing in (*ways, "nothing"))
    if keys == 32:
        yield Choice(Tiles(128, *form, 4, 255, 4), ways[0])
        yield Choice(Tiles(128, *form, 8, 128, 4), ways[0])
        yield Choice(Tiles(64, *form, 4, 168, 3), ways[0])
    yield Choice(Tiles(128, *form, 8, 255, 4 if keys == 32 else 3), ways[0])


def choices(machine: Machine) -> list[tuple[Case, Choice]]:
    if machine.dry:
        return [(case, choice) for case in TINY for form in FORMS[:2] for choice in for_many(form)]
    shared = [(FAR_MANY[0], choice) for form in FORMS for choice in for_many(form) if choice.sharing != "nothing"]
    near = [(case, flat(form)) for case in (FAR, *NEAR) for form in FORMS]
    return shared + near + [(case, choice) for case in FAR_MANY[1:] for form in FORMS for choice in for_many(form)]


def run(plan: Plan) -> None:
    plan.case("tiles of draft_attention", SECONDS, functools.partial(measure, plan.record, plan.machine))


def measure(record: Record, machine: Machine) -> None:
    began = time.monotonic()
    work = choices(machine)
    found: dict[Case, dict[Choice, float]] = {}
    with torch.inference_mode():
        failed = {} if machine.dry else _compile(machine, work, began + COMPILING)
        for case in dict.fromkeys(case for case, _ in work):
            own = [choice for other, choice in work if other == case]
            found[case] = _time(record, machine, case, own, failed, began + SECONDS)
            for choice, seconds in sorted(found[case].items(), key=lambda item: item[1])[:BEST]:
                record.note(f"  best: {seconds * 1e6:6.1f} us  {choice}")
    record.note(
        "forms, by the mean of their shapes' times, each with its best tiles, over the times of the form chosen now:"
    )
    for mean, form, best in sorted(_together(found), key=lambda item: item[0]):
        record.note("  {:.3f}  keys {}, split {}, span {}".format(mean, *form))
        for case, (choice, seconds, ratio) in best.items():
            record.note(f"    {ratio:.2f}  {seconds * 1e6:6.1f} us  {_name(case)}: {choice}")


def _time(
    record: Record,
    machine: Machine,
    case: Case,
    choices: list[Choice],
    failed: dict[tuple[Case, Choice], str],
    end: float,
) -> dict[Choice, float]:
    """Seconds a call; each choice over the same inputs."""
    copies = copies_of(machine, case)
    call = rotating(ours(machine, case, copies))
    found = {}
    for choice in choices:
        reason = failed.get((case, choice))
        if reason is None and time.monotonic() > end:
            reason = LATE
        if reason is None:
            try:
                with using(choice):
                    replay = machine.replayed(call, 1)
                found[choice] = machine.times({"ours": replay})["ours"].per(copies).median
            except Exception as error:  # too much shared memory, mostly
                reason = f"{type(error).__name__}: {error}"
        text = f"{found[choice] * 1e6:6.1f} us" if choice in found else f"left out, {(reason or '')[:150]}"
        row = {"case": _name(case), "seconds": found.get(choice), "sharing": choice.sharing, **choice.tiles._asdict()}
        record.put("tiles", f"{_name(case)}: {choice}: {text}", **row)
    return found


class _Chosen(threading.local):
    choice: Choice | None = None


_chosen = _Chosen()
_tiles, _shared_out = kernels.tiles, kernels.shared_out


def _chosen_tiles(dtype: torch.dtype, padded: int, device_architecture: int) -> Tiles:
    return _chosen.choice.tiles if _chosen.choice else _tiles(dtype, padded, device_architecture)


def _chosen_sharing(programs: int, stored_splits: int, stored_spans: int) -> Sharing:
    as_it_is = _shared_out(programs, stored_splits, stored_spans)
    return (_chosen.choice and _chosen.choice.sharing) or as_it_is


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Calls of this thread are made so."""
    kernels.tiles, kernels.shared_out = _chosen_tiles, _chosen_sharing
    _chosen.choice = choice
    try:
        yield
    finally:
        _chosen.choice = None


def _compile(machine: Machine, work: list[tuple[Case, Choice]], end: float) -> dict[tuple[Case, Choice], str]:
    """In threads; what failed or did not begin before `end`, and why."""

    def one(item: tuple[Case, Choice]) -> str | None:
        case, choice = item
        if time.monotonic() > end:
            return LATE
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(machine.device)), using(choice):
                ours(machine, case, 1)[0]()
                machine.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(one, work))
    return {item: reason for item, reason in zip(work, reasons, strict=True) if reason is not None}


def _together(
    found: dict[Case, dict[Choice, float]],
) -> Iterator[tuple[float, Form, dict[Case, tuple[Choice, float, float]]]]:
    """Of each form: the mean ratio, and each shape's best choice, its time, and that over the best of the form chosen now."""
    now = flat(FORMS[0]).form
    for form in FORMS:
        best = {}
        for case, times in found.items():
            own, present = ({choice: t for choice, t in times.items() if choice.form == of} for of in (form, now))
            if own and present:
                choice = min(own, key=own.__getitem__)
                best[case] = (choice, own[choice], own[choice] / min(present.values()))
        if best:
            yield sum(ratio for _, _, ratio in best.values()) / len(best), form, best


def _name(case: Case) -> str:
    return f"{case.published.name} B={case.batch} K={case.drafts} L={case.length}, {case.stored} stored"
