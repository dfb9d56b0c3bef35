"""Token ids as int32, which other engines hold: the results are those of int64 ids, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import generator

import freedave_kernels as fk

MASK = 9
LOGITS = torch.randn(2, 3, 12, generator=generator(0))
IDS = torch.tensor([[MASK, 4, MASK], [MASK, MASK, 5]])
SCORED, SUPPRESS = torch.tensor([[1, 2, 3], [4, -1, 12]]), torch.tensor([3, 9])
TOKENS, CONFIDENCE = fk.predict_tokens(LOGITS, IDS, MASK, suppress_tokens=SUPPRESS)
DRAFTS = fk.build_drafts(IDS, TOKENS, CONFIDENCE, MASK, 2)[0]
TARGETS = TOKENS[:, None].repeat(1, 2, 1)
PREDICTED = CONFIDENCE[:, None].repeat(1, 2, 1)
ACTIVE = torch.tensor([2, 2], dtype=torch.int32)


def pooled(drafts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    rest = (PREDICTED, ACTIVE, MASK, 2)
    return fk.draft_step(drafts, tokens, *rest, drafting="pooled", pool=fk.draft_pool(2, 4, 3)).record


CALLS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "predict_tokens": (
        lambda ids, scored, suppress: fk.predict_tokens(
            LOGITS, ids, MASK, scored_ids=scored, suppress_tokens=suppress, suppress="forbid", temperature=0.5, seed=1
        ),
        (IDS, SCORED, SUPPRESS),
    ),
    "partial_predictions": (
        lambda ids, scored, suppress: fk.partial_predictions(
            LOGITS, ids, MASK, scored_ids=scored, suppress_tokens=suppress, suppress="forbid"
        ).nan_to_num(7.0),
        (IDS, SCORED, SUPPRESS),
    ),
    "merge_predictions": (
        lambda ids: fk.merge_predictions(fk.partial_predictions(LOGITS, IDS, MASK), ids),
        (IDS,),
    ),
    "logit_floor": (lambda suppress: fk.logit_floor(LOGITS, top_k=2, suppress_tokens=suppress), (SUPPRESS,)),
    "build_drafts": (lambda ids, tokens: fk.build_drafts(ids, tokens, CONFIDENCE, MASK, 2), (IDS, TOKENS)),
    "verify_drafts": (lambda drafts, targets: fk.verify_drafts(drafts, targets), (DRAFTS, TARGETS)),
    "draft_step": (
        lambda drafts, tokens: fk.draft_step(drafts, tokens, PREDICTED, ACTIVE, MASK, 2).record,
        (DRAFTS, TARGETS),
    ),
    "draft_step of a pool": (pooled, (DRAFTS, TARGETS)),
}


@pytest.mark.parametrize("op", CALLS)
def test_give_what_int64_ids_give(backend: str, op: str) -> None:
    call, ids = CALLS[op]
    expected = call(*ids)
    for narrow in range(len(ids)):
        given = [each.int() if n == narrow else each for n, each in enumerate(ids)]
        found = call(*given)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert given[narrow].dtype == torch.int32  # (the caller's own is left alone)


def test_what_is_written_in_place_is_int64(backend: str) -> None:
    pool = fk.draft_pool(2, 4, 3)
    with pytest.raises(TypeError, match="memory must be int64, got int32"):
        fk.DraftPool(pool.memory.int(), 4, 3)
