"""What a decode step costs a GPU, counted without one: launches, and that nothing waits."""

from __future__ import annotations

import ctypes
import os
import re

import pytest
import torch

import freedave_kernels as fk

pytestmark = pytest.mark.skipif(
    "cuda_emulated" not in fk.available_backends(), reason="the emulator is not built; run `make simt`"
)
MASK = 50


@pytest.fixture
def emulator():
    library = ctypes.CDLL(os.environ["FREEDAVE_EMULATED_LIBRARY"])
    library.simt_launches.restype = ctypes.c_ulonglong
    library.simt_launch.restype = ctypes.c_char_p
    yield library
    library.simt_multiprocessors(1)


def decode_step(batch: int, num_drafts: int, length: int = 20, vocab: int = 48):
    generator = torch.Generator().manual_seed(batch * 100 + num_drafts)
    drafts = torch.randint(0, vocab, (batch, num_drafts, length), generator=generator)
    drafts[:, :, length // 2 :] = MASK
    logits = torch.randn(batch, num_drafts, length, vocab, generator=generator)
    active = torch.full((batch,), num_drafts, dtype=torch.int32)
    with fk.use_backend("cuda_emulated"):
        token_ids, confidence = fk.predict_tokens(logits, drafts, MASK)
        step = fk.draft_step(drafts, token_ids, confidence, active, MASK, draft_steps=num_drafts)
    return token_ids, confidence, step.drafts, step.counters


@pytest.mark.parametrize(("batch", "num_drafts"), [(1, 1), (1, 32), (5, 8)])
def test_launches_of_a_step(emulator, batch, num_drafts):
    """Three, whatever the batch and the drafts: predict_tokens has two stages, all the rest is one kernel. Nothing waits: the
    emulator's <cuda_runtime.h> has no function that would, so a launcher that calls one does not compile."""
    before = emulator.simt_launches()
    decode_step(batch, num_drafts)
    assert emulator.simt_launches() - before == 3
    names = [emulator.simt_launch(back).decode() for back in (2, 1, 0)]
    for kernel, name in zip(("scan_chunks", "merge_chunks", "step_sequences"), names, strict=True):
        assert kernel in name.partition("grid=")[0]
        assert "programmatic=1" in name  # each may begin while the one before it ends


def test_results_do_not_depend_on_the_machine(emulator):
    """The grid depends on the number of multiprocessors, no bit of a result does; nor on the order of threads and blocks."""
    expected = None
    grids = set()
    for multiprocessors in (1, 4, 132):
        for schedule in (b"forward", b"reverse", b"random:7"):
            emulator.simt_multiprocessors(multiprocessors)
            assert emulator.simt_schedule(schedule) == 0
            results = decode_step(2, 8)
            grids.add(re.search("grid=[0-9,]+", emulator.simt_launch(2).decode())[0])
            expected = expected or results
            for result, reference in zip(results, expected, strict=True):
                assert torch.equal(result, reference)
    assert len(grids) > 1
