"""`python -m benchmarks tune`: measures how predict_tokens should use this GPU, and writes its entries of the tunables table.

On a GPU only; `--dry-run` goes through the same code with the interpreter on tiny shapes, and writes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import freedave_kernels as fk
from benchmarks import scenes
from benchmarks.gpu.machine import Machine
from benchmarks.measure import CannotMeasureError, Timing
from benchmarks.record import Record
from benchmarks.scenes import MASK
from freedave_kernels.triton.tunables import TABLE, Tunables, architecture, tunables

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NUM_WARPS = (4, 8, 16)
MAX_REGISTERS = (0, 64, 80, 96, 128)  # from eight programs of 128 threads a multiprocessor to what the compiler likes


def run(record: Record, machine: Machine) -> bool:
    """Returns whether every candidate computed what the present entry computes."""
    reason = fk.available_backends()["triton"]
    if reason is not None:
        raise CannotMeasureError(f"nothing to tune: {reason}")
    with fk.use_backend("triton"):
        best = {}
        held = True
        for dtype in DTYPES:
            chosen, agreed = choose(record, machine, dtype)
            best[str(dtype).removeprefix("torch.")] = asdict(chosen)
            held &= agreed
    table = updated(TABLE, architecture(machine.device), best)
    print(table)
    if held and not machine.dry:
        TABLE.write_text(table)
        print(f"written to {TABLE}; run the contract tests again: the order of sums may have changed")
    return held


def choose(record: Record, machine: Machine, dtype: torch.dtype) -> tuple[Tunables, bool]:
    """The fastest candidate: least total over the shapes, each as a share of what the present entry takes."""
    present = tunables(machine.device, dtype)
    candidates = [Tunables(*pair) for pair in itertools.product(NUM_WARPS, MAX_REGISTERS)]
    if machine.dry:
        candidates = candidates[::7]
    scores = dict.fromkeys(candidates, 0.0)
    held = True
    shapes = [(rows, masked, vocab) for vocab in machine.shapes.vocabularies for rows, masked in machine.shapes.rows]
    for rows, masked, vocab in shapes:
        logits, input_ids = scenes.logits(rows, masked, vocab, dtype, device=machine.device)
        call = partial(fk.predict_tokens, logits, input_ids, MASK)
        with using(present):
            expected = call()
            share = machine.times({"present": call})["present"].median
        for candidate in candidates:
            with using(candidate):
                timing = machine.times({"candidate": call})["candidate"]
                held &= same(call(), expected)
            scores[candidate] += timing.median / share
            add(record, rows, masked, vocab, dtype, candidate, timing)
    return min(candidates, key=scores.__getitem__), held


def add(
    record: Record, rows: int, masked: int, vocab: int, dtype: torch.dtype, candidate: Tunables, timing: Timing
) -> None:
    shape = {"V": vocab, "rows": rows, "masked": masked}
    provider = f"{candidate.num_warps} warps, {candidate.max_registers} reg"
    record.add("predict_tokens", shape, str(dtype).removeprefix("torch."), {provider: timing})


def same(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(result[0], expected[0]) and torch.allclose(result[1], expected[1], rtol=1e-6, atol=0)


@contextlib.contextmanager
def using(candidate: Tunables) -> Iterator[None]:
    """predict_tokens inside the block takes `candidate`, whatever the table says."""
    with mock.patch("freedave_kernels.triton.scan_logits.tunables", return_value=candidate):
        yield


def updated(table: Path, name: str, entries: dict[str, dict[str, int]]) -> str:
    """The text of the table with the entries of architecture `name` replaced; one line an entry."""
    content = json.loads(table.read_text()) | {name: entries}
    lines = []
    for architecture_name, by_dtype in content.items():
        rows = [f"    {json.dumps(dtype)}: {json.dumps(entry)}" for dtype, entry in by_dtype.items()]
        lines.append(f"  {json.dumps(architecture_name)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"
