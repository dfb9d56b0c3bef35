"""The attention that devices without a fused kernel take (GPUs), forced on a CPU: alone, and under whole decodes."""

from __future__ import annotations

import pytest
import torch
from states import generator
from tiny_models import golden_lm, prompt

import freedave
from freedave import attention, fixed_shape_decoder
from freedave.attention import attention_from_scores, attention_with_log_sum_exp
from freedave.fixed_shape_decoder import FixedShapeDecoder
from freedave.settings import resolve_settings

# The golden models have two key-value heads: with as many rows a mask that lines up with heads goes unnoticed.
LENGTHS = [3, 12, 8]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5], ids=["a mask a sequence", "a mask a token"])
def test_example(rows, batch, groups):
    """Each sequence has its own mask, whatever the number of heads; results are the kernel's."""
    random = generator(0)
    query, key, value = (torch.randn(batch, heads, 5, 16, generator=random) for heads in (4, groups, groups))
    hidden = torch.rand(batch, 1, rows, 5, generator=random) < 0.5
    hidden[..., 0] = False  # there is always a key to see
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    expected = attention_with_log_sum_exp(query, key, value, 0.3, mask.expand(-1, -1, 5, -1).contiguous())
    for ours, kernel in zip(attention_from_scores(query, key, value, 0.3, mask), expected, strict=True):
        assert ours.shape == kernel.shape
        torch.testing.assert_close(ours, kernel, rtol=1e-6, atol=1e-6)


@pytest.fixture
def from_scores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every attention is computed from the scores; how many sequences each call had."""
    batches: list[int] = []

    def record(query, *others):
        batches.append(len(query))
        return attention_from_scores(query, *others)

    monkeypatch.setattr(attention, "attention_with_log_sum_exp", record)
    monkeypatch.setattr(fixed_shape_decoder, "attention_with_log_sum_exp", record)
    return batches


@pytest.mark.parametrize("draft_steps", [1, 4])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("family", ["block_causal", "full"])
def test_steps_of_one_shape(family, slots, draft_steps, from_scores):
    lm = golden_lm(family, block_length=4)
    settings = resolve_settings(lm, prompt_length=1, max_new_tokens=16, draft_steps=draft_steps)
    decoder = FixedShapeDecoder(lm, settings, slots=slots, capacity=40)
    lengths = LENGTHS[:slots]
    for slot, length in enumerate(lengths):
        decoder.add(slot, prompt(length, slot)[0].tolist())
    while not all(decoder.poll()):
        decoder.step()
    assert max(from_scores) == slots * draft_steps
    for slot, length in enumerate(lengths):
        static = freedave.generate(lm, prompt(length, slot), max_new_tokens=16, draft_steps=1)
        assert torch.equal(decoder.tokens[slot, : length + 16], static.sequences[0])
        assert torch.equal(decoder.step_map[slot, length : length + 16], static.step_map[0])


@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual")])
def test_generate(family, cache, from_scores, monkeypatch):
    """Prompts of two lengths, some together, against each one alone with the CPU's kernel."""
    lm = golden_lm(family, block_length=4)
    batch = torch.cat([prompt(9, seed) for seed in range(3)])
    visible = torch.ones_like(batch)
    visible[1, :4] = 0
    together = freedave.generate(lm, batch, 16, cache=cache, attention_mask=visible)
    assert from_scores
    monkeypatch.undo()
    for row, begin in enumerate([0, 4, 0]):
        alone = freedave.generate(lm, batch[row : row + 1, begin:], 16, draft_steps=1, cache=cache)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, 9 - begin :])
        assert torch.equal(together.step_map[row], alone.step_map[0])
