"""Segments: which blocks of which drafts a cached forward computes."""

from __future__ import annotations

from tiny_models import MASK

from freedave.forward.segments import plan_segments

M = MASK


def test_example():
    """Three drafts, two blocks: the last two share the finished first block; the first needs no second one."""
    drafts = [[1, M, M, M], [1, 2, M, M], [1, 2, 3, M]]
    segments = plan_segments(drafts, reach=[2, 4, 4], block_length=2, mask_token_id=M)
    assert list(zip(segments.draft, segments.block, strict=True)) == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert segments.of_draft == [[0], [1, 2], [1, 3]]
    assert segments.chain == [[0], [1], [1, 2], [1, 3]]


def test_unfinished_blocks_are_not_shared():
    """Positions of an unfinished block are predicted for each draft, even where two drafts are equal."""
    segments = plan_segments([[1, M], [1, M]], reach=[2, 2], block_length=2, mask_token_id=M)
    assert segments.of_draft == [[0], [1]]


def test_blocks_after_a_difference_are_not_shared():
    """Block 1 is the same in both drafts but sees different blocks 0 (as recycled drafts of a rejected chain may have)."""
    segments = plan_segments([[1, 2, 3, 4, M], [5, 2, 3, 4, M]], reach=[4, 4], block_length=2, mask_token_id=M)
    assert segments.of_draft == [[0, 1], [2, 3]]
