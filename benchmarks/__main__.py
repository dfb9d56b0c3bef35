"""`python -m benchmarks ops|step`: prints a table and writes benchmarks/results/<machine>/<name>.jsonl."""

from __future__ import annotations

import argparse

import torch

from benchmarks import ops, step
from benchmarks.report import Report, machine_name

BENCHMARKS = {"ops": ops.run, "step": step.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds; each times every provider once")
    parser.add_argument("--machine", default=machine_name(), help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    report = Report(arguments.benchmark, arguments.machine)
    with torch.inference_mode():
        BENCHMARKS[arguments.benchmark](report, arguments.rounds)
    report.write()


if __name__ == "__main__":
    main()
