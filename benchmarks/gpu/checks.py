"""Correctness on the device: the contract tests, and the same under NVIDIA's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.machine import Machine
from benchmarks.record import Record
from freedave_kernels._library import OPS

ROOT = Path(__file__).parents[2]
# Those of merge_predictions are with its other half's.
OP_TESTS = [f"tests/test_{op}.py" for op in OPS if op != "merge_predictions"]
TOOLS = ("memcheck", "racecheck", "synccheck")


def contract_tests(record: Record, machine: Machine) -> bool:
    if machine.dry:
        return _pytest(record, "contract tests", [], ["tests/test_rank_positions.py"], "example")
    wanted = " or ".join(machine.backends)
    return _pytest(record, "contract tests", [], [*OP_TESTS, "tests/test_gpu.py"], f"({wanted}) and not emulated")


def sanitizers(record: Record, machine: Machine) -> list[bool]:
    """compute-sanitizer slows kernels a hundredfold, so it watches the tests with fixed inputs only."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if machine.dry or found is None or "cuda" not in machine.backends:
        reason = "this is a dry run" if machine.dry else "not found; the CUDA toolkit has it"
        record.note(f"compute-sanitizer: not run ({reason if found is None or machine.dry else 'no CUDA kernels'})")
        return []
    selected = "cuda and not emulated and (example or long_windows or ties or broken or strided or all_equal)"
    commands = {tool: [found, "--tool", tool, "--error-exitcode", "86"] for tool in TOOLS}
    return [
        _pytest(record, f"compute-sanitizer {tool}", command, OP_TESTS, selected) for tool, command in commands.items()
    ]


def _pytest(record: Record, what: str, under: list[str], tests: list[str], selected: str) -> bool:
    command = [*under, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *tests]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or ["no output"]
    record.note(f"{what}: {lines[-1]}", returncode=result.returncode)
    if result.returncode != 0:
        print(result.stdout[-6000:], result.stderr[-2000:], sep="\n")
    return result.returncode == 0
