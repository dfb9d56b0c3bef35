"""The table on the screen and the JSON lines beside it."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import freedave_kernels
import freedave_kernels._C as _C
from benchmarks.measure import Timing

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """CPU model and number of cores, as a folder name."""
    cores = len(os.sched_getaffinity(0))
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {cores} cores".lower()).strip("-")


def cpu_model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


class Report:
    def __init__(self, benchmark: str, machine: str, results: Path = RESULTS) -> None:
        self.path = results / machine / f"{benchmark}.jsonl"
        self.rows: list[dict[str, Any]] = []
        environment = {
            "command": f"python -m benchmarks {benchmark}",
            "machine": machine,
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "cpu_isa": _C.cpu_isa(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "freedave_kernels": freedave_kernels.__version__,
            "git_commit": _C.build["git_commit"],
            "git_dirty": _C.build["git_dirty"],
            "compiler": _C.build["compiler"],
        }
        self.rows.append(environment)
        print(", ".join(f"{key} {value}" for key, value in environment.items()))
        print(
            f"\n{'op':<16}{'shape':<34}{'dtype':<10}{'provider':<18}"
            f"{'median':>12}{'quartiles':>22}{'x eager':>9}{'GB/s':>8}{'% read':>8}"
        )

    def add(
        self,
        op: str,
        shape: str,
        dtype: str,
        timings: dict[str, Timing],
        *,
        num_bytes: int | None = None,
        read_bandwidth: float | None = None,
    ) -> None:
        """One row a provider. `num_bytes`: what each reads; `read_bandwidth`: of the same rounds, in bytes a second."""
        eager = timings.get("eager")
        for provider, timing in timings.items():
            bandwidth = num_bytes / timing.median if num_bytes else None
            compared = eager is not None and not provider.startswith("read")
            row = {
                "op": op,
                "shape": shape,
                "dtype": dtype,
                "provider": provider,
                "median_us": timing.median * 1e6,
                "lower_quartile_us": timing.lower * 1e6,
                "upper_quartile_us": timing.upper * 1e6,
                "best_us": timing.best * 1e6,
                "times_eager": eager.median / timing.median if eager and compared else None,
                "gb_per_s": bandwidth / 1e9 if bandwidth else None,
                "percent_of_read_bandwidth": 100 * bandwidth / read_bandwidth if bandwidth and read_bandwidth else None,
            }
            self.rows.append(row)
            quartiles = f"{_time(timing.lower)} - {_time(timing.upper)}"
            print(
                f"{op:<16}{shape:<34}{dtype:<10}{provider:<18}{_time(timing.median):>12}{quartiles:>22}"
                f"{_number(row['times_eager']):>9}{_number(row['gb_per_s']):>8}"
                f"{_number(row['percent_of_read_bandwidth']):>8}"
            )

    def note(self, text: str, **values: Any) -> None:
        self.rows.append({"note": text, **values})
        print(text)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        print(f"\nwritten to {os.path.relpath(self.path)}")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"
