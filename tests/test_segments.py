"""Segments: a cached forward computes what the drafts need, once, and gets the numbers of a plain forward."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MASK, golden_lm

from freedave.draft_forward import CachedForward, DraftWindow, UncachedForward
from freedave.segments import plan_segments

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


def chain(length: int, steps: int, seed: int) -> list[list[int]]:
    """Nested drafts, filled from the left with a little disorder, so that some finish blocks and some do not."""
    random = torch.Generator().manual_seed(seed)
    order = (torch.arange(length) + 3 * torch.rand(length, generator=random)).argsort().tolist()
    tokens = torch.randint(MASK, (length,), generator=random).tolist()
    return [[tokens[i] if i in order[: 2 + step] else M for i in range(length)] for step in range(steps)]


@pytest.mark.parametrize("prompt_length", [0, 4, 12])
@pytest.mark.parametrize("seed", range(5))
def test_bitwise_the_same_as_each_draft_alone(prompt_length, seed):
    """The logits of all drafts' segments together are those of a forward of each draft alone, to the last bit."""
    size, length, steps = 4, 12, 7
    lm = golden_lm(block_length=size)
    states = chain(length, steps, seed)
    sequence = torch.full((prompt_length + length,), M)
    sequence[:prompt_length] = torch.randint(MASK, (prompt_length,), generator=torch.Generator().manual_seed(seed))

    with torch.inference_mode():
        together, alone = forwards(lm, sequence, size, prompt_length, states, [length] * steps)
    assert torch.equal(together, alone)


def forwards(lm, sequence, size, start, states, reach):
    def predict(states, reach):
        forward = CachedForward(lm, sequence, size)
        if start:  # the first forward stores the prompt
            forward.logits(DraftWindow(torch.full((1, size), M), start, [[M] * size], [size]))
        logits, position = forward.logits(DraftWindow(torch.tensor(states), start, states, reach))
        full = torch.full((len(states) * len(states[0]), logits.shape[1]), float("nan"))
        full[position] = logits
        return full.view(len(states), len(states[0]), -1)[torch.tensor(states) == M]

    together = predict(states, reach)
    alone = torch.cat([predict([state], [r]) for state, r in zip(states, reach, strict=True)])
    assert not together.isnan().any()
    return together, alone


@pytest.mark.parametrize("seed", range(3))
def test_the_same_as_recomputing_everything(seed):
    """Against one masked forward of the whole sequence: equal up to rounding."""
    size, start, length = 4, 8, 12
    lm = golden_lm(block_length=size)
    states = chain(length, 5, seed)
    sequence = torch.full((start + length,), M)
    sequence[:start] = torch.randint(MASK, (start,), generator=torch.Generator().manual_seed(seed))
    window = DraftWindow(torch.tensor(states), start, states, [length] * len(states))
    with torch.inference_mode():
        cached, uncached = CachedForward(lm, sequence, size), UncachedForward(lm, sequence, size)
        cached.logits(DraftWindow(torch.full((1, size), M), start, [[M] * size], [size]))
        ours, plain = cached.logits(window), uncached.logits(window)
    order = ours.position.argsort()
    assert torch.equal(ours.position[order], plain.position)
    torch.testing.assert_close(ours.logits[order], plain.logits, rtol=1e-5, atol=1e-5)
    assert cached.computed < uncached.computed
