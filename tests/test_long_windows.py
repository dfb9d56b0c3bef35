"""Every op on a window of several hundred positions, where a GPU kernel's warps have to agree, against the

The other op tests draw short windows, which give more cases a second. draft_step has its long windows in test_draft_step.py.
"""

from __future__ import annotations

import pytest
import torch
from conftest import unless_interpreted
from states import CONFIDENCES, INF, MASK, choose, generator
from test_predict_tokens import MEASURES, assert_close

import freedave_kernels as fk
from freedave_kernels.reference.build_drafts import build_drafts
from freedave_kernels.reference.predict_tokens import predict_tokens
from freedave_kernels.reference.rank_positions import rank_positions
from freedave_kernels.reference.select_transfer import select_transfer
from freedave_kernels.reference.verify_drafts import verify_drafts

ORDERS = pytest.mark.parametrize("order", ["confidence", "left_to_right"])
WINDOWS = pytest.mark.parametrize(("length", "block_length"), [(33, None), (96, 7), (257, 100), (1024, None)])


def rows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Few distinct confidences, so that every rank is decided by ties across warps, and a broken position here and there."""
    random = generator(length)
    confidence = choose([*CONFIDENCES, *CONFIDENCES, -INF], (3, length), random)
    mask_index = torch.rand(3, length, generator=random) < torch.tensor([[0.1], [0.6], [1.0]])
    return confidence, mask_index


@pytest.mark.parametrize("measure", MEASURES)
def test_predict_tokens(native_backend, measure):
    """More rows than a small GPU starts blocks for, so that a block does several, masked and not."""
    random, count = generator(0), unless_interpreted(native_backend, 1024, 64)
    logits = torch.randint(-4, 5, (count, 40), generator=random).float()
    input_ids = torch.where(torch.rand(count, generator=random) < 0.6, MASK, 1)
    result = fk.predict_tokens(logits, input_ids, MASK, measure=measure)
    rest = (None, measure, None, False, None, None, None, None, None, "exclude")
    assert_close(result, predict_tokens(logits, input_ids, MASK, *rest), measure)


@ORDERS
@WINDOWS
def test_rank_positions(native_backend, order, length, block_length):
    row = rows(length)
    rank = fk.rank_positions(*row, order=order, block_length=block_length)
    assert torch.equal(rank, rank_positions(*row, order, block_length))


@pytest.mark.parametrize(("threshold", "fallback"), [(None, "top"), (0.75, "top_always"), (0.5, "top_if_fewer")])
@ORDERS
@WINDOWS
def test_select_transfer(native_backend, order, length, block_length, threshold, fallback):
    row = rows(length)
    chosen = fk.select_transfer(
        *row, num_transfer=9, threshold=threshold, fallback=fallback, order=order, block_length=block_length
    )
    expected = select_transfer(*row, 9, None, threshold, None, "threshold", fallback, order, block_length)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("threshold", [None, 0.75])
@ORDERS
@WINDOWS
def test_build_drafts(native_backend, order, length, block_length, threshold):
    confidence, mask_index = rows(length)
    token_ids = torch.randint(MASK, confidence.shape, generator=generator(length))
    input_ids = torch.where(mask_index, MASK, 1)
    call = (input_ids, token_ids, confidence, MASK, 6)
    drafts, num_drafts = fk.build_drafts(
        *call, tokens_per_step=3, threshold=threshold, order=order, block_length=block_length
    )
    expected = build_drafts(*call, 3, None, threshold, None, "threshold", order, block_length)
    assert torch.equal(drafts, expected[0])
    assert torch.equal(num_drafts, expected[1])


@ORDERS
@WINDOWS
def test_verify_drafts(native_backend, order, length, block_length):
    """Chains of several hops, and drafts that differ from a target in their last position only."""
    confidence, mask_index = rows(length)
    token_ids = torch.randint(MASK, confidence.shape, generator=generator(length))
    drafts, _ = build_drafts(
        torch.where(mask_index, MASK, 1),
        token_ids,
        confidence,
        MASK,
        12,
        1,
        None,
        None,
        None,
        "threshold",
        order,
        block_length,
    )
    targets = drafts.roll(-2, dims=1)
    targets[1, 4, -1] = MASK + 1
    accepted = fk.verify_drafts(drafts, targets)
    assert torch.equal(accepted, verify_drafts(drafts, targets, None, "exact", None))
