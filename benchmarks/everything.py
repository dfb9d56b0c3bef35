"""`python -m benchmarks all`: every benchmark that needs no GPU, each in a process of its own, then the report."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import RESULTS, ROOT

# `overhead` pretends that there is a GPU, and a compiler's threads would disturb the next: hence the processes.
CANNOT_MEASURE = 2  # the exit status
ORDER = ("ops", "step", "projection", "decode", "scaling", "overhead", "check")


def run(results: Path, quick: bool, threads: int, machine: str | None) -> int:
    """Goes on where one fails; returns 1 if any did. What cannot be measured here has said why, and is no failure."""
    failed: dict[str, int] = {}
    absent = []
    options = ["--threads", str(threads), *(["--machine", machine] if machine else [])]
    options += ["--quick"] if quick else []
    options += ["--results", str(results.resolve())] if results != RESULTS else []
    for name in ORDER:
        print(f"\n== {name}\n", flush=True)
        began = time.monotonic()
        code = _benchmark(name, *options)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if code == CANNOT_MEASURE:
            absent.append(name)
        elif code:
            failed[name] = code
    if quick and results == RESULTS:
        print("\nno report: a smoke run leaves the results alone")
    else:
        print("\n== report\n", flush=True)
        code = _benchmark("report", *(["--results", str(results.resolve())] if results != RESULTS else []))
        if code:
            failed["report"] = code
    for name in absent:
        print(f"not measured here: {name} (above it says why)")
    for name, code in failed.items():
        print(f"failed: python -m benchmarks {name} (exit status {code})")
    return 1 if failed else 0


def _benchmark(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, check=False).returncode
