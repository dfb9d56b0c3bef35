"""The benchmarks' own code runs: what it measures is looked at by people, not by tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_gpu_dry_run():
    """Every part of `benchmarks gpu`, in the order in which a GPU owner sees it; nothing is written."""
    before = set((ROOT / "benchmarks/results").rglob("*"))
    result = benchmarks("gpu", "--dry-run")
    assert result.returncode == 0, result.stderr
    parts = [
        "contract tests: ",
        "compute-sanitizer: not run",
        "step, B=1: eager",
        "copy bandwidth",
        "predict_tokens",
        "graph",
    ]
    places = [result.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert set((ROOT / "benchmarks/results").rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_without_a_gpu():
    result = benchmarks("gpu")
    assert result.returncode == 2
    assert "torch sees no GPU; run this on a machine with one, or with --dry-run" in result.stderr
    assert "Traceback" not in result.stderr


def test_dry_run_goes_with_gpu():
    result = benchmarks("ops", "--dry-run")
    assert result.returncode == 2
    assert "--dry-run goes with" in result.stderr
