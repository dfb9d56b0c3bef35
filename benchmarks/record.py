"""One format for every result: a table on the screen, and JSON lines.

The first line of `<benchmark>.jsonl` is the environment (machine, versions, state of git); every further line has a `kind`:

| kind | one line is |
|---|---|
| `timing` | one provider on one case: median, quartiles, best, ratio to the baseline of the same rounds, bytes moved, share of the bandwidth measured in the same rounds |
| `absent` | a provider or a case that could not be timed here, and why |
| `counts` | operator calls, allocations and synchronisations of one call |
| `decoder_step` | `Decoder.launch` and `poll`: time without the model's own forward and what is launched; on a GPU, launches alone |
| `memory` | the most that tensors took during one call |
| `scaling` | a provider's timings along one axis, with the fitted line |
| `decode` | a whole decode: tokens, forwards, seconds, share of time outside the forward |
| `target` | a stated target, what was found, and whether it held |
| `decode_step` | on a GPU: one step of a decode, wall clock and device, against the bandwidth limit |
| `part_of_step` | on a GPU: a part of such a step alone, on the device |
| `kernels` | on a GPU: the kernels of one step, the longest first |
| `answers` | on a GPU: whole answers of the embedded model, and whether they are the CPU's |
| `lossless` | how many tokens and steps of two decodes differ |
| `checks` | a run of tests, its last line and what failed |
| `failed` | a case that raised, and the end of its traceback |
| `note` | a sentence, and its numbers |
"""  # noqa: E501

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import freedave_kernels
import freedave_kernels._C as _C
from benchmarks.measure import Timing

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

HEADER = (
    f"{'op':<16}{'shape':<36}{'dtype':<10}{'provider':<20}"
    f"{'median':>12}{'quartiles':>24}{'x base':>9}{'GB/s':>8}{'% band':>8}"
)


def machine_name() -> str:
    """CPU model and number of cores, as a folder name."""
    model = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", cpu_model().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {len(os.sched_getaffinity(0))} cores").strip("-")


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """What git says about this checkout; None where there is no git or no checkout."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout


def environment(benchmark: str, machine: str, quick: bool, arguments: str) -> Row:
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ":!benchmarks/results")
    return {
        "kind": "environment",
        "benchmark": benchmark,
        "command": f"python -m benchmarks {arguments}",
        "quick": quick,
        "machine": machine,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "cpu_isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "freedave_kernels": freedave_kernels.__version__,
        "git_commit": commit.strip() if commit else None,
        "git_dirty": bool(changes.strip()) if changes is not None else None,
        "native_git_commit": _C.build["git_commit"],
        "native_git_dirty": _C.build["git_dirty"],
        "compiler": _C.build["compiler"],
    }


class Record:
    """The results of one benchmark on one machine.

    `at_once`: each row is written the moment it is there, so that a run that is cut short keeps what it had. `arguments`: of
    the command that measures them; None: the benchmark's name.
    """

    def __init__(
        self,
        benchmark: str,
        machine: str,
        results: Path = RESULTS,
        quick: bool = False,
        *,
        at_once: bool = False,
        arguments: str | None = None,
    ) -> None:
        self.folder = results / machine
        self.benchmark = benchmark
        self.rows: list[Row] = []
        self._at_once = at_once
        if at_once:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lines.write_text("")
        self._append(environment(benchmark, machine, quick, arguments or benchmark))
        print(", ".join(f"{key} {value}" for key, value in self.rows[0].items() if key != "kind"))
        print()

    @property
    def lines(self) -> Path:
        """The file of JSON lines."""
        return self.folder / f"{self.benchmark}.jsonl"

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        if self._at_once:
            with self.lines.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def add(
        self,
        op: str,
        shape: Mapping[str, Any],
        dtype: str,
        timings: Mapping[str, Timing],
        *,
        baseline: str = "eager",
        num_bytes: int | None = None,
        bandwidth: float | None = None,
    ) -> None:
        """One row a provider. `num_bytes`: what each must move; `bandwidth`: of the same rounds, in bytes a second."""
        if not self.of_kind("timing"):
            print(HEADER)
        base = timings.get(baseline)
        for provider, timing in timings.items():
            speed = num_bytes / timing.median if num_bytes else None
            compared = base is not None and not provider.startswith("read")
            row: Row = {
                "kind": "timing",
                "op": op,
                "shape": dict(shape),
                "dtype": dtype,
                "provider": provider,
                "median_us": timing.median * 1e6,
                "lower_quartile_us": timing.lower * 1e6,
                "upper_quartile_us": timing.upper * 1e6,
                "best_us": timing.best * 1e6,
                "rounds": timing.rounds,
                "of_rounds": timing.of_rounds,
                "baseline": baseline if base is not None else None,
                "ratio": base.median / timing.median if base is not None and compared else None,
                "num_bytes": num_bytes,
                "gb_per_s": speed / 1e9 if speed else None,
                "bandwidth_gb_per_s": bandwidth / 1e9 if bandwidth else None,
                "percent_of_bandwidth": 100 * speed / bandwidth if speed and bandwidth else None,
            }
            self._append(row)
            quartiles = f"{time_text(timing.lower)} - {time_text(timing.upper)}"
            print(
                f"{op:<16}{shape_text(shape):<36}{dtype:<10}{provider:<20}{time_text(timing.median):>12}{quartiles:>24}"
                f"{_number(row['ratio']):>9}{_number(row['gb_per_s']):>8}{_number(row['percent_of_bandwidth']):>8}",
                flush=True,
            )

    def absent(self, provider: str, reason: str, op: str = "", shape: Mapping[str, Any] | None = None) -> None:
        """What could not be timed, and why."""
        self._append({"kind": "absent", "op": op, "shape": dict(shape or {}), "provider": provider, "reason": reason})
        case = f"{op:<16}{shape_text(shape or {}):<46}" if op else ""
        print(f"{case}{provider}: not timed, {reason}", flush=True)

    def put(self, kind: str, text: str, **values: Any) -> None:
        """A row of another kind, and what people read of it."""
        self._append({"kind": kind, **values})
        print(text, flush=True)

    def note(self, text: str, **values: Any) -> None:
        self._append({"kind": "note", "text": text.strip(), **values})
        print(text, flush=True)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        print(f"\nwritten: {os.path.relpath(self.lines)}")


def read(path: Path) -> list[Row]:
    """The rows of a result file, the environment first."""
    return parse(path.read_text(), str(path))


def parse(text: str, name: str) -> list[Row]:
    rows: list[Row] = [json.loads(line) for line in text.splitlines() if line]
    if not rows or rows[0].get("kind") != "environment" or not all("kind" in row for row in rows):
        raise ValueError(f"{name} is not a result of this version of the benchmarks; measure again or remove it")
    return rows


def shape_text(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in shape.items())


def time_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"
