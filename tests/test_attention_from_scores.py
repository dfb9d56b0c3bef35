"""The attention of planned forwards where there is no fused kernel (GPUs), forced on a CPU under whole decodes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import golden_lm, prompt

import freedave
from freedave.forward import attention
from freedave.forward.attention import attention_from_scores


@pytest.fixture
def from_scores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every attention is computed from the scores; how many sequences each call had."""
    batches: list[int] = []

    def record(query, *others):
        batches.append(len(query))
        return attention_from_scores(query, *others)

    monkeypatch.setattr(attention, "attention_with_log_sum_exp", record)
    return batches


@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual")])
def test_example(family, cache, from_scores, monkeypatch):
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
