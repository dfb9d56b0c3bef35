"""Fixtures shared by all tests. An op test that takes `backend` runs once on every backend this machine can run."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# The CUDA kernels, executed on the CPU (tests/simt; `make simt` builds it): one more backend, for CPU tensors.
EMULATED = Path(__file__).parents[1] / "build/simt/libfreedave_ops_emulated.so"
if EMULATED.exists():
    os.environ.setdefault("FREEDAVE_EMULATED_LIBRARY", str(EMULATED))

import freedave_kernels as fk  # noqa: E402  (the variable is read on import)

# The models of the tests are tiny: a second thread costs more than it brings, above all where other jobs share the machine.
torch.set_num_threads(1)

BACKENDS = [name for name, reason in fk.available_backends().items() if reason is None]
NATIVE_BACKENDS = [name for name in BACKENDS if name != "reference"]

# The backend fixture is entered once for all examples of a test, which is what is wanted; machines are noisy, so no deadline.
hypothesis.settings.register_profile(
    "contract",
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("contract")


@pytest.fixture(autouse=True)
def schedule_of_emulated_kernels() -> None:
    """Launches take turns in three orders of threads and blocks, forward, reverse and random, the same in every run."""
    if "cuda_emulated" in BACKENDS:
        assert ctypes.CDLL(os.environ["FREEDAVE_EMULATED_LIBRARY"]).simt_schedule(b"mixed:1") == 0


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend but the oracle."""
    with fk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def golden_ops() -> list[Any]:
    """The op vectors recorded from the public implementation, one pytest parameter a case."""
    arrays = np.load(GOLDEN / "ops.npz")
    cases = json.loads((GOLDEN / "ops.json").read_text())["cases"]
    for case in cases:
        prefix = case["name"] + "/"
        case |= {
            key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(prefix)
        }
    return [pytest.param(case, id=case["name"]) for case in cases]
