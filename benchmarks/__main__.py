"""`python -m benchmarks ops|step|gpu`: prints a table and writes benchmarks/results/<machine>/<name>.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import gpu, ops, step
from benchmarks.gpu.machine import NoGpuError, this_machine
from benchmarks.report import RESULTS, Report, machine_name

BENCHMARKS = {"ops": ops.run, "step": step.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "gpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds; each times every provider once")
    parser.add_argument("--machine", help="name of the results' folder (default: the processor's, or the GPU's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where that folder is (default: %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="gpu: try the code itself on the CPU; nothing is written"
    )
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.benchmark != "gpu":
        parser.error("--dry-run goes with gpu; the other benchmarks run on any machine")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    held = True
    with torch.inference_mode():
        if arguments.benchmark == "gpu":
            try:
                machine = this_machine(arguments.dry_run, arguments.rounds)
            except NoGpuError as error:
                print(f"benchmarks gpu: {error}", file=sys.stderr)
                return 2
            report = Report("gpu", arguments.machine or machine.name, arguments.results)
            held = gpu.run(report, machine)
        else:
            report = Report(arguments.benchmark, arguments.machine or machine_name(), arguments.results)
            BENCHMARKS[arguments.benchmark](report, arguments.rounds)
    if not arguments.dry_run:
        report.write()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
