"""A run within given minutes: cases one after the other; one that would take too long is left out, one that fails is told."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.record import Record

TRACEBACK_LINES = 12


class Plan:
    """`held`: whether every case so far did what it should."""

    def __init__(self, record: Record, machine: Machine, minutes: float) -> None:
        self.record = record
        self.machine = machine
        self.held = True
        self._end = time.monotonic() + 60 * minutes
        self._broken: str | None = None

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def case(self, what: str, seconds: float, measure: Callable[[], bool | None], *, apart: bool = False) -> None:
        """Runs `measure` if the `seconds` that it may take are left; it returns False where something did not hold.

        After an error that the device does not recover from only cases `apart`, in processes of their own, go on.
        """
        if self.left() < seconds:
            self.record.absent(what, f"it takes about {seconds:.0f} s, and {max(self.left(), 0):.0f} s are left")
            return
        if self._broken and not apart:
            self.record.absent(what, f"the device is in error since {self._broken}")
            return
        began = time.monotonic()
        try:
            self.held &= measure() is not False
        except Exception:
            self.held = False
            lines = traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:]
            text = "\n".join(line[:300] for line in lines)
            self.record.put("failed", f"FAILED {what}:\n{text}", what=what, traceback=text)
        self._clean_up(what)
        print(f"    ({what}: {time.monotonic() - began:.1f} s, {self.left():.0f} s left)", flush=True)

    def _clean_up(self, what: str) -> None:
        gc.collect()
        if not self.machine.dry and self._broken is None:
            try:
                self.machine.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self._broken = f"{what}: {str(error).splitlines()[0]}"
