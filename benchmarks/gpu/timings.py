"""The ops between two forwards, from graphs over rotating inputs, against the bytes they must move and PyTorch."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import freedave_kernels as fk
from benchmarks import cases, eager, roofline, scenes, vectorised
from benchmarks import step as one_step
from benchmarks.compiled import compiled
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.measure import Timing
from benchmarks.record import Record
from benchmarks.scenes import MASK
from freedave_kernels import registry
from freedave_kernels.contract import POOLED_DRAFTINGS

K, L, STATES = 8, 32, 16
ROTATED = 2**27  # bytes of logits to go through, more than a GPU's cache holds
Call = Callable[[], object]


def run(plan: Plan) -> None:
    machine, record = plan.machine, plan.record
    vocab = 1000 if machine.dry else 151936
    for rows, dtype in itertools.product((256, 32), (torch.bfloat16, torch.float32)):
        what = f"predict_tokens {rows} x {vocab} {cases.dtype_name(dtype)}"
        plan.case(what, 8, functools.partial(predict_tokens, record, machine, rows, vocab, dtype))
    what = f"drawn tokens 256 x {vocab} bfloat16"
    plan.case(what, 8, functools.partial(drawn_tokens, record, machine, 256, vocab, torch.bfloat16))
    for batch in (1, 128) if not machine.dry else (1, 2):
        plan.case(f"draft_step B={batch}", 8, functools.partial(draft_step, record, machine, batch))
        for drafting in POOLED_DRAFTINGS:
            what = f"draft_step {drafting} B={batch}"
            plan.case(what, 8, functools.partial(pooled_step, record, machine, batch, drafting))
    for batch in (1, 8) if not machine.dry else (1,):
        plan.case(f"step B={batch}", 10, functools.partial(step, record, machine, batch, vocab))
    # Compiling takes long: two shapes, and after everything else.
    for rows in (256, 32):
        what = f"predict_tokens {rows} x {vocab} bfloat16, torch.compile"
        function = compiled(vectorised.predict_tokens, machine.compiler, False)
        plan.case(what, 30, functools.partial(predict_tokens, record, machine, rows, vocab, torch.bfloat16, function))


def masked_rows(machine: Machine, rows: int, vocab: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of `predict_tokens`, all of whose rows are masked, to go through."""
    copies = 2 if machine.dry else max(2, math.ceil(ROTATED / (rows * vocab * dtype.itemsize)))
    inputs: list[tuple[Any, ...]] = []
    for _ in range(copies):
        logits = scenes.rows_of_logits(rows, vocab, dtype, machine.device)
        inputs.append((logits, torch.full((rows,), MASK, device=machine.device), MASK))
    return inputs


def drawn_tokens(record: Record, machine: Machine, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Every backend with a temperature, against itself without one."""
    draw = functools.partial(fk.predict_tokens, **cases.drawing(rows, machine.device))
    drawn: dict[str, Callable[..., object]] = {
        f"{name}, drawn": functools.partial(_on, name, draw) for name in machine.backends
    }
    with torch.inference_mode():
        timings = timed(machine, fk.predict_tokens, masked_rows(machine, rows, vocab, dtype), drawn)
    cases.record_drawn(record, {"V": vocab, "rows": rows}, dtype, timings)


def predict_tokens(
    record: Record,
    machine: Machine,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    against: Callable[..., object] | None = None,
) -> None:
    """All rows masked; against a compiled form from a graph, or eager PyTorch, which waits for masks and so is launched."""
    inputs = masked_rows(machine, rows, vocab, dtype)
    with torch.inference_mode():
        timings = timed(machine, fk.predict_tokens, inputs, {"compiled": against} if against else {})
        if against is None:
            timings |= machine.times({"eager": functools.partial(eager.predict_tokens, *inputs[0])})
    moved = roofline.predict_tokens(rows, rows, vocab, dtype.itemsize)
    shape = {"V": vocab, "rows": rows, "masked": rows}
    record.add(
        "predict_tokens",
        shape,
        cases.dtype_name(dtype),
        timings,
        baseline="compiled" if against else "eager",
        num_bytes=moved,
        bandwidth=machine.bandwidth,
    )


def draft_step(record: Record, machine: Machine, batch: int) -> None:
    scene = scenes.drafts(batch * 4, K, L, machine.device)
    inputs = [(p.drafts, p.token_ids, p.confidence, p.num_drafts, MASK, K) for p in scene.parts(batch)]
    with torch.inference_mode():
        timings = timed(machine, fk.draft_step, inputs, {})
        if batch == 1:  # eager goes through the drafts in Python: a third of a second with 128
            arguments = inputs[0]
            call = functools.partial(eager.draft_step, *arguments[:3], MASK, K)
            timings |= machine.times({"eager": call})
    record.add(
        "draft_step", {"B": batch, "K": K, "L": L}, "", timings, num_bytes=roofline.draft_step(batch, K, L)
    )  # fmt: skip


def pooled_step(record: Record, machine: Machine, batch: int, drafting: str) -> None:
    """draft_step on pools, which hold what the replays before have left there."""
    scene = scenes.drafts(batch * 4, K, L, machine.device)
    inputs = [
        (p.drafts, p.token_ids, p.confidence, p.num_drafts, fk.draft_pool(batch, STATES, L, machine.device))
        for p in scene.parts(batch)
    ]

    def ours(
        drafts: torch.Tensor,
        token_ids: torch.Tensor,
        confidence: torch.Tensor,
        num_drafts: torch.Tensor,
        pool: fk.DraftPool,
    ) -> object:
        return fk.draft_step(drafts, token_ids, confidence, num_drafts, MASK, K, drafting=drafting, pool=pool)

    able = [name for name in machine.backends if name in registry.backends_with("pooled_step")]
    with torch.inference_mode():
        timings = timed(machine, ours, inputs, {}, able)
    named = {f"{name}, {drafting}": timing for name, timing in timings.items()}
    shape = {"B": batch, "K": K, "L": L, "P": STATES}
    record.add("draft_step", shape, "", named, num_bytes=roofline.pooled_step(batch, K, L, STATES))


def step(record: Record, machine: Machine, batch: int, vocab: int) -> None:
    """predict_tokens and draft_step together: launched one by one, and from a graph."""
    scene = scenes.drafts(batch * 4, K, L, device=machine.device)
    logits = torch.randn(batch, K, L, vocab, device=machine.device).to(torch.bfloat16)
    inputs = [(logits, part) for part in scene.parts(batch)]
    with torch.inference_mode():
        timings = timed(machine, one_step.ours, inputs, {})
        launched: dict[str, Call] = {
            f"{name}, launched": cases.on(name, functools.partial(one_step.ours, *inputs[0]))
            for name in machine.backends
        }
        if batch == 1:
            launched["eager"] = functools.partial(one_step.theirs, *inputs[0])
        timings |= machine.times(launched)
    record.add("step", {"B": batch, "K": K, "L": L, "V": vocab}, "bfloat16", timings)


def timed(
    machine: Machine,
    ours: Callable[..., object],
    inputs: Sequence[tuple[object, ...]],
    others: dict[str, Callable[..., object]],
    backends: Sequence[str] | None = None,
) -> dict[str, Timing]:
    """One call of each, from a graph of one call an input: of ours on every backend (or on these), and of the others."""
    providers = {name: _all(functools.partial(_on, name, ours), inputs) for name in backends or machine.backends}
    providers |= {name: _all(function, inputs) for name, function in others.items()}
    replays = {name: machine.replayed(call, 1) for name, call in providers.items()}
    return {name: timing.per(len(inputs)) for name, timing in machine.times(replays).items()}


def _all(function: Callable[..., object], inputs: Sequence[tuple[object, ...]]) -> Call:
    return lambda: [function(*arguments) for arguments in inputs]


def _on(backend: str, function: Callable[..., object], *arguments: object) -> object:
    with fk.use_backend(backend):
        return function(*arguments)
