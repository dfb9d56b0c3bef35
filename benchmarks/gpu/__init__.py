"""`python -m benchmarks gpu`: everything that only a GPU can tell, with one command.

The contract tests on the real device, the sanitizers where the CUDA toolkit is installed, timings against eager and compiled
PyTorch with the share of the measured copy bandwidth, launches and synchronisations of a decoding step, CUDA-graph replay.
`--dry-run` goes through the same code on a CPU, with tiny shapes and the emulated kernels: its numbers mean nothing.
"""

from __future__ import annotations

from benchmarks.gpu import checks, launches, timings
from benchmarks.gpu.machine import Machine
from benchmarks.report import Report


def run(report: Report, machine: Machine) -> bool:
    """Returns whether everything that was checked held."""
    report.note("machine", **machine.describe())
    held = [checks.contract_tests(report, machine), *checks.sanitizers(report, machine)]
    held.append(launches.count(report, machine))
    timings.predict_tokens(report, machine)
    timings.draft_step(report, machine)
    timings.step(report, machine)
    return all(held)
