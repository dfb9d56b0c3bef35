"""`python -m benchmarks ops|step|overhead|tune|gpu`: prints a table and writes benchmarks/results/<machine>/<name>.jsonl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu, ops, overhead, step, tune
from benchmarks.gpu.machine import this_machine
from benchmarks.measure import CannotMeasureError
from benchmarks.report import RESULTS, Report, machine_name

# Each may return whether what it checks held.
BENCHMARKS: dict[str, Callable[[Report, int], bool | None]] = {
    "ops": ops.run,
    "step": step.run,
    "overhead": overhead.run,
}
ON_A_GPU = {"gpu": gpu.run, "tune": tune.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, *ON_A_GPU])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds; each times every provider once")
    parser.add_argument("--machine", help="name of the results' folder (default: the processor's, or the GPU's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where that folder is (default: %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="gpu, tune: try the code itself on the CPU; nothing is written"
    )
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.benchmark not in ON_A_GPU:
        parser.error(f"--dry-run goes with {' and '.join(ON_A_GPU)}; the other benchmarks run on any machine")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    held: bool | None
    with torch.inference_mode():
        try:
            if arguments.benchmark in ON_A_GPU:
                machine = this_machine(arguments.dry_run, arguments.rounds)
                report = Report(arguments.benchmark, arguments.machine or machine.name, arguments.results)
                held = ON_A_GPU[arguments.benchmark](report, machine)
            else:
                report = Report(arguments.benchmark, arguments.machine or machine_name(), arguments.results)
                held = BENCHMARKS[arguments.benchmark](report, arguments.rounds)
        except CannotMeasureError as error:
            print(f"benchmarks {arguments.benchmark}: {error}", file=sys.stderr)
            return 2
    if not arguments.dry_run:
        report.write()
    return 1 if held is False else 0


if __name__ == "__main__":
    sys.exit(main())
