"""`python -m benchmarks gpu`: everything that only a GPU can tell, with one command.

The contract tests on the real device, the sanitizers where the CUDA toolkit is installed, timings against eager and compiled
PyTorch with the share of the measured copy bandwidth, launches and synchronisations of a decoding step, CUDA-graph replay.
`--dry-run` goes through the same code on a CPU, with tiny shapes and the emulated kernels: its numbers mean nothing.
"""

from __future__ import annotations

from benchmarks.gpu import checks, launches, timings
from benchmarks.gpu.machine import Machine
from benchmarks.record import Record


def run(record: Record, machine: Machine) -> bool:
    """Returns whether everything that was checked held."""
    record.note("machine", **machine.describe())
    for provider, reason in machine.absent.items():
        record.absent(provider, reason)
    held = [checks.contract_tests(record, machine), *checks.sanitizers(record, machine)]
    held.append(launches.count(record, machine))
    timings.ops(record, machine)
    timings.step(record, machine)
    return all(held)
