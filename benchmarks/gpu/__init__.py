"""`python -m benchmarks gpu --minutes 4`: what only a GPU can tell, most important first, as much as fits.

| part | what it answers |
|---|---|
| `decode` | what a decode step of an 8B model takes, against reading its weights once, and where the time goes |
| `contract` | whether `draft_attention` and `keep` are right on this device |
| `attention` | what `draft_attention` takes against the bytes it must move, and against PyTorch's attention |
| `lossless` | whether answers in bfloat16 are those of static decoding |
| `embedded` | milliseconds a whole answer of the embedded model |
| `chosen` | whether the number of drafts that is chosen is a good one |
| `ops` | the other ops, from graphs; launches and synchronisations, those of a decoder's steps too |
| `more` | further numbers of drafts, batches and shapes of `decode` and `attention` |
| `other_contracts`, `sanitizers` | whether the other ops are right on this device |
| `tune_attention` | only with `--only`: which tiles suit `draft_attention` on this device, and what to share out |

No case begins that would not end in time. Each result is written when it is there. `--dry-run` goes through the same code on
a CPU, with tiny shapes and no graphs: its numbers mean nothing, and it leaves no case out, however long it takes.
"""

from __future__ import annotations

import faulthandler
import math

from benchmarks.gpu import attention, checks, chosen, decode, embedded, launches, lossless, timings, tune_attention
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record

# A run that hangs says where, and ends, so many seconds after its minutes.
GRACE = 90

PARTS = {
    "decode": [decode.run],
    "contract": [checks.contract],
    "attention": [attention.run],
    "lossless": [lossless.run],
    "embedded": [embedded.run],
    "chosen": [chosen.run],
    "ops": [timings.run, launches.run],
    "more": [decode.run_more, attention.run_more],
    "other_contracts": [checks.other_contracts],
    "sanitizers": [checks.sanitizers],
}
ON_REQUEST = {"tune_attention": [tune_attention.run]}


def run(record: Record, machine: Machine, minutes: float, only: list[str] | None = None) -> bool:
    """`only`: names of parts. Returns whether everything that was checked held, and nothing failed."""
    plan = Plan(record, machine, math.inf if machine.dry else minutes)
    if not machine.dry:
        faulthandler.dump_traceback_later(60 * minutes + GRACE, exit=True)
    try:
        record.note("machine", **machine.describe())
        for provider, reason in machine.absent.items():
            record.absent(provider, reason)
        rate = machine.bandwidth
        record.note(f"copy bandwidth (bytes read and written): {rate / 1e9:.0f} GB/s", gb_per_s=rate / 1e9)
        for name in only or PARTS:
            print(f"\n== {name}", flush=True)
            for part in (PARTS | ON_REQUEST)[name]:
                part(plan)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return plan.held
