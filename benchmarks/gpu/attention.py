"""`draft_attention` alone, from graphs over rotating inputs, against the bytes it must move and PyTorch's attention."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import roofline
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import LLADA_8B, SDAR_8B, Published
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record
from freedave_kernels import draft_attention

ROTATED = 2**28  # bytes to go through, several times what a GPU's cache holds
MOST_COPIES = 36
JOINED = 2**32  # bytes that the keys and values of the comparison may take


@dataclass(frozen=True)
class Case:
    published: Published
    batch: int
    drafts: int
    length: int
    stored: int

    @property
    def shape(self) -> dict[str, int]:
        """Its dimensions, by the names that they have in `draft_attention`; T stored positions."""
        shape = {"B": self.batch, "K": self.drafts, "L": self.length, "T": self.stored}
        return shape | {"H": self.published.heads, "G": self.published.groups, "D": self.published.head_size}

    @property
    def block_length(self) -> int | None:
        return self.published.block_length if self.published.attention == "block_causal" else None


# By worth: what the decode steps take first.
FIRST = [
    Case(published, 1, drafts, length, stored)
    for stored in (128, 4096, 1024)
    for published, drafts, length in ((SDAR_8B, 8, 20), (SDAR_8B, 1, 20), (LLADA_8B, 8, 32), (LLADA_8B, 1, 32))
]
ALL = [
    Case(published, batch, drafts, length, stored)
    for batch, published in itertools.product((1, 8), (SDAR_8B, LLADA_8B))
    for drafts, length in itertools.product((8, 16, 1), (20, 4, 32))
    for stored in (128, 1024, 4096)
]
TINY = [Case(SDAR_8B.tiny(), 2, 2, 4, 16), Case(LLADA_8B.tiny(), 1, 2, 8, 16)]


def run(plan: Plan) -> None:
    _run(plan, TINY if plan.machine.dry else FIRST)


def run_more(plan: Plan) -> None:
    _run(plan, [] if plan.machine.dry else [case for case in ALL if case not in FIRST])


def _run(plan: Plan, cases: list[Case]) -> None:
    for case in cases:
        name = f"draft_attention {case.published.name} {case.shape}"
        plan.case(name, 4, functools.partial(measure, plan.record, plan.machine, case))


def measure(record: Record, machine: Machine, case: Case) -> None:
    B, K, L, T, H, G, D = (case.shape[name] for name in "BKLTHGD")
    moved = roofline.draft_attention(B, K, L, T, H, G, D, itemsize=2)
    copies = copies_of(machine, case)
    with torch.inference_mode():
        calls = {"draft_attention": machine.replayed(rotating(ours(machine, case, copies)), 1)}
        joined = 2 * case.batch * case.drafts * (case.stored + case.length) * case.published.groups
        joined_bytes = joined * case.published.head_size * 2
        if joined_bytes * copies <= JOINED:
            calls["sdpa, keys joined"] = machine.replayed(rotating(theirs(machine, case, copies)), 1)
        timings = {name: timing.per(copies) for name, timing in machine.times(calls).items()}
    record.add(
        "draft_attention",
        case.shape,
        "bfloat16",
        timings,
        baseline="sdpa, keys joined",
        num_bytes=moved,
        bandwidth=machine.bandwidth,
    )


def copies_of(machine: Machine, case: Case) -> int:
    """How many inputs to go through."""
    B, K, L, T, H, G, D = (case.shape[name] for name in "BKLTHGD")
    moved = roofline.draft_attention(B, K, L, T, H, G, D, itemsize=2)
    return 2 if machine.dry else min(max(2, math.ceil(ROTATED / moved)), MOST_COPIES)


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """All of the calls, one after the other."""

    def call() -> object:
        return [one() for one in calls]

    return call


def ours(machine: Machine, case: Case, copies: int) -> list[Callable[[], object]]:
    """Slots hold as much as is stored, all of it seen."""
    batch, drafts, length, published = case.batch, case.drafts, case.length, case.published
    ranges = torch.tensor([[[0, case.stored]]] * batch, dtype=torch.int32, device=machine.device)
    start = torch.full((batch,), case.stored, device=machine.device)
    attend = functools.partial(draft_attention, window_start=start, block_length=case.block_length)
    calls: list[Callable[[], object]] = []
    for _ in range(copies):
        query = random(machine, batch, drafts, length, published.heads, published.head_size)
        window = [random(machine, batch, drafts, length, published.groups, published.head_size) for _ in range(2)]
        stored = [random(machine, batch, case.stored, published.groups, published.head_size) for _ in range(2)]
        inputs = (query, *window, *stored, ranges)
        calls.append(functools.partial(attend, *inputs))
    return calls


def theirs(machine: Machine, case: Case, copies: int) -> list[Callable[[], object]]:
    """One call of PyTorch's attention over keys that have been joined for each draft, which is not timed."""
    published, length = case.published, case.length
    rows, keys = case.batch * case.drafts, case.stored + case.length
    mask = None
    if case.block_length is not None:
        block = torch.arange(length, device=machine.device) // case.block_length
        mask = torch.ones(length, keys, dtype=torch.bool, device=machine.device)
        mask[:, case.stored :] = block[:, None] >= block
    calls: list[Callable[[], object]] = []
    for _ in range(copies):
        query = random(machine, rows, published.heads, length, published.head_size)
        key, value = (random(machine, rows, published.groups, keys, published.head_size) for _ in range(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        calls.append(functools.partial(attend, query, key, value, attn_mask=mask, enable_gqa=True))
    return calls


def random(machine: Machine, *size: int) -> torch.Tensor:
    return torch.randn(size, device=machine.device, dtype=torch.bfloat16)
