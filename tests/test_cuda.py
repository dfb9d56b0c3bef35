"""The CUDA kernels beyond the contract that every backend is held to: launches, limits, schedules, sources."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from states import MASK, generator

import freedave_kernels as fk
from freedave_kernels import _library, registry
from freedave_kernels.contract import MAX_DRAFTS, MAX_LENGTH, MAX_POOL_STATES

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture
def emulator() -> Iterator[ctypes.CDLL]:
    """The library that executes the kernels on the CPU, with its counters and switches."""
    library = ctypes.CDLL(os.environ["FREEDAVE_EMULATED_LIBRARY"])
    library.simt_launches.restype = ctypes.c_ulonglong
    library.simt_launch.restype = ctypes.c_char_p
    with fk.use_backend("cuda_emulated"):
        yield library
    library.simt_multiprocessors(4)


def step(batch: int, count: int, length: int = 16, vocab: int = 40) -> tuple[Callable[[], object], torch.Tensor]:
    """What a decoder does between two forwards, and the drafts that it gives it."""
    random = generator(batch * 100 + count)
    drafts = torch.where(torch.rand(batch, count, length, generator=random) < 0.6, MASK, 1)
    logits = torch.randn(batch, count, length, vocab, generator=random)
    active = torch.full((batch,), count, dtype=torch.int32)

    def run() -> tuple[torch.Tensor, ...]:
        token_ids, confidence = fk.predict_tokens(logits, drafts, MASK)
        return (token_ids, confidence, fk.draft_step(drafts, token_ids, confidence, active, MASK, count).record)

    return run, drafts


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("count", [1, 8, MAX_DRAFTS])
def test_a_decoding_step_is_three_launches(emulator, batch, count):
    """Two for predict_tokens, one for draft_step, whatever the batch and the number of drafts; nothing waits for them.

    That no launcher synchronises, copies or allocates needs no counting: the emulator has no function for it, so one that
    did would not compile.
    """
    run, _ = step(batch, count)
    before = emulator.simt_launches()
    run()
    assert emulator.simt_launches() - before == 3
    names = [emulator.simt_launch(back).decode() for back in (2, 1, 0)]
    assert [re.search(r"(scan_chunks|merge_states|step_sequences)", name)[0] for name in names] == [
        "scan_chunks",
        "merge_states",
        "step_sequences",
    ]


@pytest.mark.parametrize("suppress", ["exclude", "forbid"])
def test_single_logits_of_a_row_take_no_further_launch(emulator, suppress):
    """What reads them merges as well."""
    ids = torch.full((3,), MASK)
    before = emulator.simt_launches()
    fk.predict_tokens(torch.randn(3, 20000), ids, MASK, suppress_tokens=[5], suppress=suppress, scored_ids=ids)
    assert emulator.simt_launches() - before == 2
    assert "merge_and_read" in emulator.simt_launch(0).decode()
    assert all("programmatic=1" in emulator.simt_launch(back).decode() for back in range(2))


def pooled_step(
    drafts: torch.Tensor, draft_steps: int = 1, states: int = 2, columns: int | None = None
) -> fk.DraftStep:
    pool = fk.draft_pool(len(drafts), states, columns or drafts.shape[-1])
    num_drafts = torch.ones(len(drafts), dtype=torch.int64)
    return fk.draft_step(drafts, drafts, drafts.float(), num_drafts, MASK, draft_steps, drafting="pooled", pool=pool)


def test_every_other_op_is_one_launch(emulator):
    state, masked = torch.full((3, 8), MASK), torch.ones(3, 8, dtype=torch.bool)
    confidence = torch.rand(3, 8)
    states = fk.partial_predictions(torch.randn(3, 8, 9000), state, MASK)
    windows, stored, numbers = torch.randn(2, 5, 3, 2, 8, 2, 16), torch.zeros(2, 5, 3, 20, 2, 16), torch.ones(3).long()
    for run in (
        lambda: fk.partial_predictions(torch.randn(3, 8, 9000), state, MASK),
        lambda: fk.merge_predictions(states, state),
        lambda: fk.logit_floor(torch.randn(3, 9000), top_k=5, top_p=0.9, min_p=0.1),
        lambda: fk.rank_positions(confidence, masked),
        lambda: fk.select_transfer(confidence, masked, threshold=0.5),
        lambda: fk.build_drafts(state, torch.ones_like(state), confidence, MASK, 4),
        lambda: fk.verify_drafts(state[:, None], state[:, None]),
        lambda: pooled_step(state[:, None]),
        lambda: fk.keep(*windows, *[numbers] * 3, *stored),
    ):
        before = emulator.simt_launches()
        run()
        assert emulator.simt_launches() - before == 1


@pytest.mark.parametrize(
    ("size", "offset", "unit"), [(8, 0, "uint4"), (8, 8, "uint4"), (8, 1, "unsigned short"), (12, 0, "unsigned short")]
)
def test_features_are_copied_16_bytes_at_a_time_where_addresses_allow_it(emulator, size, offset, unit):
    """By a kernel of its own."""
    window = torch.ones(2 * 6 * size, dtype=torch.bfloat16).view(2, 1, 1, 6, 1, size)
    stored = torch.zeros(2, 8 + 2 * 9 * size, dtype=torch.bfloat16)[:, offset : offset + 2 * 9 * size]
    fk.keep(window, window, *torch.tensor([[0], [2], [6]]), *stored.unflatten(1, (2, 1, 9, 1, size)))
    assert f"keep_rows<{unit}>" in emulator.simt_launch(0).decode()


def test_launches_may_overlap_where_the_device_can(emulator):
    """Programmatic dependent launch (the emulated device is an sm_90)."""
    step(1, 4)[0]()
    assert all("programmatic=1" in emulator.simt_launch(back).decode() for back in range(3))


@pytest.mark.parametrize("schedule", ["reverse", "random:1", "random:2"])
@pytest.mark.parametrize("processors", [1, 132])
def test_results_do_not_depend_on_the_order_of_threads_or_the_size_of_the_device(emulator, schedule, processors):
    """Bitwise, in windows of several warps, with rows of several chunks."""
    run, _ = step(2, 9, length=70, vocab=20000)
    expected = run()
    assert emulator.simt_schedule(schedule.encode()) == 0
    emulator.simt_multiprocessors(processors)
    for ours, theirs in zip(run(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_to_do_launches_nothing(emulator):
    before = emulator.simt_launches()
    empty = torch.zeros(0, 3, 8, dtype=torch.int64)
    fk.predict_tokens(torch.zeros(0, 3, 8, 5), empty, MASK)
    states = fk.partial_predictions(torch.zeros(0, 3, 8, 5), empty, MASK)
    fk.merge_predictions(states, empty)
    fk.logit_floor(torch.zeros(0, 3, 8, 5), top_k=1)
    fk.draft_step(empty, empty, torch.zeros(0, 3, 8), torch.zeros(0, dtype=torch.int32), MASK, 4)
    pooled_step(empty)
    fk.rank_positions(torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.bool))
    fk.rank_positions(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    fk.keep(*torch.zeros(2, 5, 0, 2, 8, 2, 16), *[empty[:, 0, 0]] * 3, *torch.zeros(2, 5, 0, 20, 2, 16))
    assert emulator.simt_launches() == before


LONG, MANY = MAX_LENGTH + 1, MAX_DRAFTS + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fk.rank_positions(x(LONG).float(), x(LONG).bool()), f"positions, got {LONG}"),
        (lambda x: fk.select_transfer(x(LONG).float(), x(LONG).bool()), f"positions, got {LONG}"),
        (lambda x: fk.build_drafts(x(1, LONG), x(1, LONG), x(1, LONG).float(), 0, 2), f"positions, got {LONG}"),
        (lambda x: fk.build_drafts(x(1, 4), x(1, 4), x(1, 4).float(), 0, MANY), f"drafts, got {MANY}"),
        (lambda x: fk.verify_drafts(x(1, 2, LONG), x(1, 2, LONG)), f"positions, got {LONG}"),
        (lambda x: fk.verify_drafts(x(1, MANY, 4), x(1, MANY, 4)), f"drafts, got {MANY}"),
        (lambda x: fk.draft_step(*[x(1, 1, LONG)] * 2, x(1, 1, LONG).float(), x(1), 0, 2), f"positions, got {LONG}"),
        (lambda x: fk.draft_step(*[x(1, MANY, 4)] * 2, x(1, MANY, 4).float(), x(1), 0, 2), f"drafts, got {MANY}"),
        (lambda x: fk.draft_step(*[x(1, 1, 4)] * 2, x(1, 1, 4).float(), x(1), 0, MANY), f"drafts, got {MANY}"),
        (lambda x: pooled_step(x(1, 1, 4), columns=LONG), f"positions, got {LONG}"),
        (lambda x: pooled_step(x(1, MANY, 4)), f"drafts, got {MANY}"),
        (lambda x: pooled_step(x(1, 1, 4), draft_steps=MANY), f"drafts, got {MANY}"),
        (lambda x: pooled_step(x(1, 1, 4), states=MAX_POOL_STATES + 1), f"states, got {MAX_POOL_STATES + 1}"),
    ],
)
def test_limits(cuda_backend, call, message):
    """Windows and drafts beyond what the kernels serve: a clear error, and the name of a backend that does."""
    with pytest.raises(fk.BackendUnavailableError, match=f"at most .*{message}; use the backend 'reference'"):
        call(lambda *shape: torch.zeros(shape, dtype=torch.int64))


def test_the_kernels_are_there():
    """The suite means little without them: every contract test would pass without having run a CUDA kernel."""
    assert fk.available_backends().get("cuda_emulated", "not built") is None


def test_the_native_library_registers_them_where_it_was_built_with_nvcc():
    from freedave_kernels._C import build

    assert build["cuda"] == registry.CUDA_KERNELS
    if build["cuda"]:
        library = ctypes.CDLL(str(_library.PATH))
        library.freedave_finds_cuda_streams.restype = ctypes.c_bool
        assert library.freedave_finds_cuda_streams() == (torch.version.cuda is not None)


@pytest.mark.parametrize("room", ["cuda", "cpu", "freedave"])
def test_kernels_know_no_tensors(room):
    """So each compiles in seconds, against any version of torch."""
    for source in (CSRC / room).iterdir():
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", source.read_text()), source
