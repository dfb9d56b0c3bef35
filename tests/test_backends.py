"""Which implementation runs, and how a user forces one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import freedave_kernels as fk
from freedave_kernels import _C, _library, backends, contract, registry
from freedave_kernels.contract import OPS
from freedave_kernels.triton import registration

T = TypeVar("T")
NAMES = ", ".join([*registry.BACKENDS, "auto"])  # those of this session: with the emulated kernels where they are built
CONFIDENCE, MASKED = torch.tensor([0.5, 0.9]), torch.tensor([True, True])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def in_thread(function: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Records the calls that backend `name` serves."""
    calls: list[str] = []
    original = registry.kernel

    def kernel(op: str, backend: str, device_type: str) -> Callable[..., object]:
        found = original(op, backend, device_type)
        return (lambda *call: calls.append(name) or found(*call)) if backend == name else found

    monkeypatch.setattr(registry, "kernel", kernel)
    return calls


def test_example(monkeypatch):
    calls = spy(monkeypatch, "reference")
    fk.rank_positions(CONFIDENCE, MASKED)
    assert calls == []
    with fk.use_backend("reference"):
        fk.rank_positions(CONFIDENCE, MASKED)
        assert calls == ["reference"]
        with fk.use_backend("cpu"):
            fk.rank_positions(CONFIDENCE, MASKED)
        with fk.use_backend("auto"):
            fk.rank_positions(CONFIDENCE, MASKED)
        assert calls == ["reference"]
    fk.rank_positions(CONFIDENCE, MASKED)
    assert calls == ["reference"]


def test_the_native_library_is_there():
    """The suite means nothing without it: every contract test would run on the reference alone."""
    available = fk.available_backends()
    assert set(available) == set(registry.BACKENDS)
    assert available["reference"] is None
    assert available["cpu"] is None


def test_unavailable_backends_say_why():
    for name, reason in fk.available_backends().items():
        if reason is not None:
            with pytest.raises(fk.BackendUnavailableError, match=name), fk.use_backend(name):
                pass
            assert ";" in reason  # the reason; the remedy


def test_unknown_names():
    with pytest.raises(ValueError, match=f"use_backend: expected one of {NAMES}, got 'gpu'"):
        fk.use_backend("gpu")


@pytest.fixture
def process_default() -> Iterator[None]:
    """Statements of a test hold for the test alone."""
    before = backends._statements
    yield
    backends._set_statements(before)


@pytest.mark.usefixtures("process_default")
def test_as_a_statement(monkeypatch):
    """For the whole process, from then on; a block has the last word inside of it."""
    calls = spy(monkeypatch, "reference")
    fk.use_backend("reference")
    fk.rank_positions(CONFIDENCE, MASKED)
    assert calls == ["reference"]
    in_thread(lambda: fk.rank_positions(CONFIDENCE, MASKED))
    assert calls == ["reference"] * 2
    with fk.use_backend("cpu"):
        fk.rank_positions(CONFIDENCE, MASKED)
        in_thread(lambda: fk.rank_positions(CONFIDENCE, MASKED))
    assert calls == ["reference"] * 3
    with fk.use_backend("auto"):
        assert backends.forced() is None
    fk.use_backend("cpu")
    assert backends.forced() == "cpu"
    fk.use_backend("auto")
    assert backends.forced() is None


@pytest.mark.usefixtures("process_default")
def test_a_statement_that_is_refused_changes_nothing(monkeypatch):
    fk.use_backend("cpu")
    with pytest.raises(ValueError, match="use_backend: expected one of .*, got 'nonsense'"):
        fk.use_backend("nonsense")
    monkeypatch.setattr(registry, "unavailable", lambda name: f"no {name}; get one")
    with pytest.raises(fk.BackendUnavailableError, match="'reference' is not available: no reference; get one"):
        fk.use_backend("reference")
    assert backends.forced() == "cpu"


@pytest.mark.usefixtures("process_default")
def test_blocks_that_begin_in_between_each_other():
    """As in several threads, with a statement meanwhile: its choice is what stays."""
    first, second = fk.use_backend("reference"), fk.use_backend("cpu")
    with first:
        fk.use_backend("auto")
        with second:
            assert backends.forced() == "cpu"
            assert in_thread(backends.forced) is None
        assert backends.forced() == "reference"
    assert backends.forced() is None


@pytest.mark.usefixtures("process_default")
def test_statements_do_not_pile_up():
    for _ in range(100):
        fk.use_backend("cpu")
        with fk.use_backend("reference"):
            pass
    assert len(backends._statements) <= 3 and backends.forced() == "cpu"


@pytest.mark.usefixtures("process_default")
def test_a_block_ends_with_an_error():
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert backends.forced() is None


@pytest.mark.usefixtures("process_default")
def test_a_statement_and_torch_compile():
    fk.use_backend("reference")
    compiled = torch.compile(lambda *row: fk.rank_positions(*row) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(CONFIDENCE, MASKED).tolist() == [2, 1]


def test_a_compiled_function_keeps_its_backend():
    """And is not compiled again because other backends and ops have been used since."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *row: fk.rank_positions(*row) + 1, fullgraph=True, backend="aot_eager")
    with fk.use_backend("cpu"):
        compiled(CONFIDENCE, MASKED)
    with fk.use_backend("reference"), torch._dynamo.config.patch(error_on_recompile=True):
        fk.rank_positions(CONFIDENCE, MASKED)
        fk.select_transfer(CONFIDENCE, MASKED)
        with torch.profiler.profile() as profile:
            compiled(CONFIDENCE, MASKED)
    assert "freedave::rank_positions" in {event.name for event in profile.events() or ()}


def test_a_forced_backend_never_falls_back():
    with fk.use_backend("cpu"), pytest.raises(fk.BackendUnavailableError, match="serves cpu tensors.*on meta"):
        fk.rank_positions(CONFIDENCE.to("meta"), MASKED.to("meta"))


def test_other_threads_keep_their_choice(monkeypatch):
    calls = spy(monkeypatch, "reference")
    with fk.use_backend("reference"):
        in_thread(lambda: fk.rank_positions(CONFIDENCE, MASKED))
    assert calls == []


def test_environment_sets_the_default():
    code = "import freedave_kernels as fk; from freedave_kernels import backends; print(backends.forced())"
    assert run_python(code, FREEDAVE_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, FREEDAVE_BACKEND="auto").stdout.strip() == "None"
    call = "import torch, freedave_kernels as fk; fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool))"
    failed = run_python(call, FREEDAVE_BACKEND="fast")
    assert failed.returncode != 0
    assert f"ValueError: FREEDAVE_BACKEND: expected one of {NAMES}, got 'fast'" in failed.stderr


def test_importing_the_ops_does_not_import_transformers():
    code = "import freedave_kernels, sys; print('transformers' in sys.modules, 'freedave' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "False"]


def test_a_library_that_does_not_load_is_reported():
    """Importing still works, `cpu` says why it cannot run, and a call raises instead of using the reference."""
    code = (
        "import torch, freedave_kernels as fk\n"
        "print(fk.available_backends()['cpu'])\n"
        "try:\n"
        "    fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool))\n"
        "except fk.BackendUnavailableError as error:\n"
        "    print('raised', error.__cause__ is not None)\n"
        "with fk.use_backend('reference'):\n"
        "    print(fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool)).tolist())\n"
    )
    result = run_python(code, FREEDAVE_LIBRARY="/nowhere/libfreedave_ops.so")
    lines = result.stdout.strip().splitlines()
    assert "did not load" in lines[0] and "pip install" in lines[0]
    assert lines[1:] == ["raised True", "[0, 1]"]


def test_the_library_and_the_package_state_the_same():
    assert _library.differences(_C.contract) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ops", [*contract.NATIVE_OPS, "max_logits"]),
        ("measures", [*contract.MEASURES, "max_logit"]),
        ("counters", list(reversed(contract.COUNTERS))),
        ("max_length", 2048),
        ("state_fields", None),
        ("unheard_of", 1),
    ],
)
def test_every_difference_is_named(name, value):
    assert _library.differences(_C.contract | {name: value}) == [name]
    assert _library.differences({}) == list(contract.STATED_IN_CPP)


@pytest.mark.parametrize("doctoring", ["_C.contract['measures'].reverse()", "del _C.contract"])
def test_a_library_of_another_version_is_not_used(doctoring):
    """Where C++ and Python do not state the same, a native call is refused, rather than answered wrongly."""
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('freedave_kernels._C', {_C.__file__!r})\n"
        "_C = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
        f"{doctoring}\n"
        "import freedave_kernels as fk\n"
        "print(fk.available_backends()['cpu'])\n"
        "try:\n"
        "    fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool))\n"
        "except fk.BackendUnavailableError:\n"
        "    print('raised', hasattr(torch.ops.freedave, 'rank_positions'))\n"
        "with fk.use_backend('reference'):\n"
        "    print(fk.rank_positions(torch.ones(2), torch.ones(2, dtype=torch.bool)).tolist())\n"
    )
    lines = run_python(code).stdout.strip().splitlines()
    assert re.search("not of one version: they differ in .*measures.*; rebuild with `pip install", lines[0])
    assert lines[1:] == ["raised False", "[0, 1]"]


@pytest.mark.parametrize("op", OPS)
def test_ops_are_registered_with_the_dispatcher(op):
    assert hasattr(torch.ops.freedave, op)
    schema = str(getattr(torch.ops.freedave, op).default._schema)
    assert schema.startswith(f"freedave::{op}(")


def test_the_list_of_ops_is_what_there_is():
    """What is public, and what has a file in each room."""
    package = Path(fk.__file__).parent
    assert set(OPS) == {path.stem for path in (package / "ops").glob("*.py")} - {"__init__"}
    assert {rooms.called_by or op for op, rooms in OPS.items()} < set(fk.__all__)
    for op, rooms in OPS.items():
        for room in ("reference", "cpu", "triton"):
            assert (package / room / f"{op}.py").exists() == (room in rooms.python), (op, room)
        assert not set(rooms.native) & set(rooms.python), op


def test_backends_of_an_op_stand_in_their_order():
    assert registry.backends_with("draft_attention") == ("reference", "cpu", "triton")
    assert registry.backends_with("draft_step") == registry.backends_with("keep") == registry.BACKENDS


def test_a_backend_may_lack_an_op(monkeypatch):
    """The error says who has it."""
    monkeypatch.setattr(registry, "unavailable", lambda name: None)
    registry.kernel.cache_clear()
    with pytest.raises(
        fk.BackendUnavailableError,
        match="backend 'cuda' has no draft_attention; 'reference', 'cpu', 'triton' have it",
    ):
        registry.kernel("draft_attention", "cuda", "cuda")


def test_limits_hold_where_no_backend_is_forced(monkeypatch):
    """What CUDA tensors meet by default."""
    monkeypatch.setattr(registry, "unavailable", lambda name: None)
    kernel = registry.kernel.__wrapped__("rank_positions", "cuda", "cuda")  # not kept: there may be no such kernel here
    length = contract.MAX_LENGTH + 1
    with pytest.raises(fk.BackendUnavailableError, match=f"at most 1024 positions, got {length}; use the backend 'ref"):
        kernel(torch.zeros(length), torch.zeros(length, dtype=torch.bool), "confidence", None)


def test_threads_may_ask_for_the_same_kernel_at_once():
    """An op of Triton's can be defined once."""

    def rank_twice(confidence: torch.Tensor) -> torch.Tensor:
        return confidence + 1

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: registration.register("rank_twice", rank_twice, rank_twice, ()), range(64)))
    assert len(found) == 1
