"""Correctness on the device: the contract tests, and the same under NVIDIA's sanitizers."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.plan import Plan
from benchmarks.record import Record
from freedave_kernels.contract import NATIVE_OPS

ROOT = Path(__file__).parents[2]
NEW_OPS = ["tests/test_draft_attention.py", "tests/test_keep.py"]
# Those of merge_predictions are with its other half's.
OTHER_OPS = [
    test for op in NATIVE_OPS if (test := f"tests/test_{op}.py") not in (*NEW_OPS, "tests/test_merge_predictions.py")
]
TOOLS = ("memcheck", "racecheck", "synccheck")
PROCESSES = 8
MOST_SECONDS = {"draft_attention and keep": 90, "the other ops": 150}
SANITIZED = "cuda and not emulated and (example or long_windows or ties or broken or strided or all_equal)"
MOST_FAILURES = 20


def contract(plan: Plan) -> None:
    _contract(plan, "draft_attention and keep", NEW_OPS)


def other_contracts(plan: Plan) -> None:
    _contract(plan, "the other ops", [*OTHER_OPS, "tests/test_gpu.py"])


def _contract(plan: Plan, what: str, tests: list[str]) -> None:
    machine = plan.machine
    selected = f"({' or '.join(machine.backends)}) and not emulated"
    if machine.dry:
        tests, selected = ["tests/test_rank_positions.py"], "example and cpu"
    name = f"contract tests of {what}"
    limit = min(MOST_SECONDS[what], max(plan.left(), 30))
    plan.case(name, 30, functools.partial(pytest, plan.record, name, [], tests, selected, limit), apart=True)


def sanitizers(plan: Plan) -> None:
    """compute-sanitizer slows kernels a hundredfold, so it watches the tests with fixed inputs only."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    reason = _no_sanitizers(plan.machine, found)
    if reason is not None or found is None:
        plan.record.note(f"compute-sanitizer: not run ({reason})")
        return
    for tool in TOOLS:
        command = [found, "--tool", tool, "--error-exitcode", "86"]
        limit = min(300.0, max(plan.left(), 60))
        name = f"compute-sanitizer {tool}"
        check = functools.partial(pytest, plan.record, name, command, [*NEW_OPS, *OTHER_OPS], SANITIZED, limit)
        plan.case(name, 60, check, apart=True)


def _no_sanitizers(machine: Machine, found: str | None) -> str | None:
    """Why they cannot run."""
    if machine.dry:
        return "this is a dry run"
    if found is None:
        return "not found; the CUDA toolkit has it"
    return None if "cuda" in machine.backends else "no CUDA kernels"


def pytest(record: Record, what: str, under: list[str], tests: list[str], selected: str, limit: float) -> bool:
    """One run of tests of at most `limit` seconds, in parallel where pytest-xdist is there; whether all passed."""
    command = [*under, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-k", selected]
    if not under and len(tests) > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(PROCESSES)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        code = _run([*command, *tests], output.fileno(), limit)
        output.seek(0)
        lines = output.read().strip().splitlines() or ["no output"]
    seconds = time.monotonic() - began
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = f"stopped after {limit:.0f} s, at: {lines[-1][-80:]}" if code is None else lines[-1].strip("= ")
    record.put(
        "checks",
        f"{what}: {last}",
        what=what,
        tests=tests,
        last=last,
        returncode=code,
        failed=failed[:MOST_FAILURES],
        num_failed=len(failed),
        seconds=round(seconds, 1),
    )
    if code != 0:
        print("\n".join(failed[:MOST_FAILURES] or lines[-15:]), flush=True)
    return code == 0


def _run(command: list[str], output: int, limit: float) -> int | None:
    """The exit status; None where `limit` seconds were not enough, after which the command and its children are ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
