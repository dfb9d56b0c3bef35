"""Experts with rows by the four: the same answer as transformers' own."""

from __future__ import annotations

import pytest
import torch
from states import generator
from tiny_models import experts_lm
from transformers.integrations.moe import grouped_mm_experts_forward

from freedave.experts import experts_in_fours


@pytest.mark.parametrize("tokens", [1, 5, 64])
@torch.inference_mode()
def test_example(tokens):
    lm = experts_lm(64)
    assert lm.model.config._experts_implementation == "freedave"
    experts = lm.model.model.layers[1].mlp.experts
    hidden_states, weights = (torch.randn(tokens, n, generator=generator(0)) for n in (64, 2))
    index = torch.rand(tokens, 8, generator=generator(1)).argsort(1)[:, :2]
    ours = experts_in_fours(experts, hidden_states, index, weights)
    assert ours.shape == (tokens, 64)
    torch.testing.assert_close(ours, grouped_mm_experts_forward(experts, hidden_states, index, weights))
