"""Fixtures shared by all tests. An op test that takes `backend` runs once on every backend this machine can run."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import triton_interpreter

import freedave  # noqa: F401  (before the first matrix product, whose mode it sets)

# Inputs that are drawn while tests are collected are the same in every process that shares them out.
torch.manual_seed(0)

GOLDEN = Path(__file__).parent / "golden"

# The CUDA kernels, executed on the CPU (tests/simt; `make simt` builds it): one more backend, for CPU tensors.
EMULATED = Path(__file__).parents[1] / "build/simt/libfreedave_ops_emulated.so"
if EMULATED.exists():
    os.environ.setdefault("FREEDAVE_EMULATED_LIBRARY", str(EMULATED))

triton_interpreter.use_where_there_is_no_gpu()

from on_gpu import on_device  # noqa: E402  (the variable is read when freedave_kernels is imported)
from states import few_combinations  # noqa: E402

import freedave_kernels as fk  # noqa: E402
from freedave.decode import experience  # noqa: E402
from freedave.decode.graph_executor import GraphExecutor  # noqa: E402
from freedave.decode.planned_executor import PlannedExecutor  # noqa: E402

# The models of the tests are tiny: a second thread costs more than it brings, above all where other jobs share the machine.
# Programs that tests start have one as well.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

BACKENDS = [name for name, reason in fk.available_backends().items() if reason is None]
NATIVE_BACKENDS = [name for name in BACKENDS if name != "reference"]
CUDA_BACKENDS = [name for name in BACKENDS if name in ("cuda", "cuda_emulated")]

INTERPRETED = fk.triton.interpreting() and "triton" in BACKENDS
if INTERPRETED:
    triton_interpreter.keep_language_patched()

# The backend fixture is entered once for all examples of a test, which is what is wanted; machines are noisy, so no deadline.
hypothesis.settings.register_profile(
    "contract",
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("contract")


def on_backend(name: str) -> Iterator[str]:
    """Every op on backend `name`, which gets its tensors on a GPU where it runs on one."""
    compiling = name == "triton" and not INTERPRETED
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    with (
        fk.use_backend(name),
        on_device("cuda") if on_gpu else contextlib.nullcontext(),
        few_combinations(compiling),
    ):
        yield name


# The interpreter takes milliseconds where a kernel takes microseconds, and has no threads.
EXAMPLES_INTERPRETED = 0.15


def unless_interpreted(backend: str, usual: int, interpreted: int) -> int:
    """`usual`, or the other number where `backend` runs in the interpreter."""
    return interpreted if INTERPRETED and backend == "triton" else usual


def interpreted(item: pytest.Item) -> bool:
    """Whether a test runs Triton kernels in the interpreter."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return INTERPRETED and "triton" in (parameters.get("backend"), parameters.get("native_backend"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if interpreted(item)]
    decodes = [
        item for item in slow if item.path.name == "test_decoding.py"
    ]  # whole decodes, seconds each: every eleventh
    left_out = {item for item in slow if item.callspec.params.get("threads", 1) > 1} | set(decodes) - set(decodes[::11])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fewer Hypothesis examples where the interpreter runs them; every other backend keeps its own number."""
    settings = getattr(item.obj, "_hypothesis_internal_use_settings", None)
    if settings is None or not interpreted(item):
        return (yield)
    fewer = hypothesis.settings(settings, max_examples=max(20, int(settings.max_examples * EXAMPLES_INTERPRETED)))
    item.obj._hypothesis_internal_use_settings = fewer
    try:
        return (yield)
    finally:
        item.obj._hypothesis_internal_use_settings = settings


@pytest.fixture(autouse=True)
def seed_of_the_test() -> None:
    """What a test draws, the key of tokens that it draws without one too, does not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def clock_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What executors choose depends on this test alone: each look at the clock finds it a tick further, and nothing is known
    from tests before.
    """
    monkeypatch.setattr(experience, "_experience", {})
    for executor in (GraphExecutor, PlannedExecutor):
        monkeypatch.setattr(executor, "clock", itertools.count().__next__)


@pytest.fixture(autouse=True)
def schedule_of_emulated_kernels() -> None:
    """Launches take turns in three orders of threads and blocks, forward, reverse and random, the same in every run."""
    if "cuda_emulated" in BACKENDS:
        assert ctypes.CDLL(os.environ["FREEDAVE_EMULATED_LIBRARY"]).simt_schedule(b"mixed:1") == 0


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_backend(request.param)


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend but the oracle."""
    yield from on_backend(request.param)


@pytest.fixture(params=CUDA_BACKENDS)
def cuda_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CUDA kernels, on a GPU or emulated: they serve windows of at most 1024 positions and 32 drafts."""
    yield from on_backend(request.param)


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
