"""`python -m benchmarks <benchmark>`: prints tables and writes benchmarks/results/<machine>/<benchmark>.jsonl."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from benchmarks import compare, everything
from benchmarks.measure import CannotMeasureError
from benchmarks.record import RESULTS, Record, machine_name

ON_THE_CPU = {
    "ops": "every op over real shapes, against eager and compiled PyTorch and the read bandwidth",
    "step": "everything between two forwards: the ops alone, and what Decoder.launch and poll launch and take",
    "projection": "from features to predictions: logits in slices of the vocabulary against all at once",
    "decode": "whole decodes, static and FreeDave: tokens a second and a forward, time outside the forward; "
    "--only choices: automatic numbers of drafts against fixed ones (an hour)",
    "scaling": "cost against vocabulary, rows, K, B and L, with fitted lines",
    "overhead": "what a launch of the Triton ops costs on the host; needs no GPU",
    "check": "the stated targets, and a comparison with the committed results",
}
ON_A_GPU = {
    "gpu": "on a GPU: decode steps of 8B models, attention, losslessness, contract tests: what fits into --minutes",
    "tune": "on a GPU: measures its entries of the table of tunables and writes them",
}
# Of `gpu`, most important first.
GPU_PARTS = (
    "decode",
    "contract",
    "attention",
    "lossless",
    "embedded",
    "chosen",
    "ops",
    "more",
    "other_contracts",
    "sanitizers",
)
GPU_ON_REQUEST = ("tune_attention",)
# By benchmark, what --only can ask for.
PARTS = {"gpu": (*GPU_PARTS, *GPU_ON_REQUEST), "step": ("ops", "decoder"), "decode": ("ways", "choices")}
OF_RESULTS = {
    "report": "the tables of docs/benchmarks.md and the plots, from the results that are there",
    "compare": "two records of one machine, BEFORE AFTER: whether an op became slower, by its ratios to eager PyTorch",
    "all": f"{', '.join(everything.ORDER)} and report, one after the other",
}


def main() -> int:
    arguments = parse()
    if arguments.benchmark == "all":
        return everything.run(arguments.results or RESULTS, arguments.quick, arguments.threads, arguments.machine)
    try:
        if arguments.benchmark == "report":
            return _report(arguments)
        if arguments.benchmark == "compare":
            return 0 if compare.run(*arguments.records) else 1
        return _measure(arguments)
    except CannotMeasureError as error:
        print(f"benchmarks {arguments.benchmark}: {error}", file=sys.stderr)
        return 2


def parse() -> argparse.Namespace:
    every = ON_THE_CPU | ON_A_GPU | OF_RESULTS
    width = max(map(len, every))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<{width}}  {what}" for name, what in every.items()),
    )
    parser.add_argument("benchmark", choices=every)
    parser.add_argument("records", nargs="*", type=Path, help="compare: two files of JSON lines")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--machine", help="name of the results' folder (default: the processor's, or the GPU's)")
    parser.add_argument("--results", type=Path, help="where that folder is (default: benchmarks/results)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of the code on tiny shapes; written only where --results says"
    )
    parser.add_argument("--dry-run", action="store_true", help="gpu, tune: the same, on a CPU; nothing is written")
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="gpu: no case begins that would not end by then; a dry run has no end",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME[,NAME]",
        help="some parts of " + "; of ".join(f"{name}: {', '.join(parts)}" for name, parts in PARTS.items()),
    )
    parser.add_argument("--docs", type=Path, help="report: the file whose tables are replaced (docs/benchmarks.md)")
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.benchmark not in ON_A_GPU:
        parser.error(f"--dry-run goes with {' and '.join(ON_A_GPU)}; the other benchmarks have --quick")
    if len(arguments.records) != (2 if arguments.benchmark == "compare" else 0):
        parser.error("compare takes two records, BEFORE AFTER; the other benchmarks take none")
    if arguments.quick and arguments.benchmark in {*ON_A_GPU, "report", "compare"}:
        parser.error("--quick goes with the benchmarks of the CPU; gpu and tune have --dry-run")
    if arguments.only and arguments.benchmark not in PARTS:
        parser.error(f"--only goes with {' and '.join(PARTS)}")
    for name in arguments.only:
        if name not in PARTS[arguments.benchmark]:
            parser.error(f"{name!r} is no part; the parts are {', '.join(PARTS[arguments.benchmark])}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    return arguments


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks import report

    report.run(arguments.results or RESULTS, arguments.docs)
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    name = arguments.benchmark
    if name == "tune" and arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    module = importlib.import_module(f"benchmarks.{name}")
    results = arguments.results or RESULTS
    held: bool | None
    if name == "gpu":
        return _gpu(arguments, results)
    with torch.inference_mode():
        if name in ON_A_GPU:
            from benchmarks.gpu.machine import this_machine

            gpu = this_machine(arguments.dry_run)
            record = Record(name, arguments.machine or gpu.name, results, arguments.dry_run)
            held = module.run(record, gpu)
        else:
            stem, command = _of_parts(name, arguments.only)
            machine = arguments.machine or machine_name()
            at_once = not arguments.quick
            record = Record(stem, machine, results, arguments.quick, at_once=at_once, arguments=command)
            held = module.run(record, arguments.quick, **({"only": arguments.only} if arguments.only else {}))
    if arguments.dry_run or (arguments.quick and arguments.results is None):
        print("\nnothing written")
    else:
        record.write()
    return 1 if held is False else 0


def _of_parts(benchmark: str, only: list[str]) -> tuple[str, str]:
    """The name of the record, and the command's arguments."""
    return "-".join([benchmark, *only]), f"{benchmark} --only {','.join(only)}" if only else benchmark


def _gpu(arguments: argparse.Namespace, results: Path) -> int:
    """Each result is written when it is there; a dry run's only where --results says."""
    from benchmarks import gpu
    from benchmarks.gpu.machine import this_machine

    machine = this_machine(arguments.dry_run)
    written = not arguments.dry_run or arguments.results is not None
    name, command = _of_parts("gpu", arguments.only)
    record = Record(
        name, arguments.machine or machine.name, results, arguments.dry_run, at_once=written, arguments=command
    )
    held = gpu.run(record, machine, arguments.minutes, arguments.only or None)
    if written:
        record.write()
    else:
        print("\nnothing written")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
