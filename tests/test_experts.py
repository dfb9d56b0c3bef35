"""Experts with rows by the four: the same answer as transformers' own."""

from __future__ import annotations

import pytest
import torch
from published_layouts import write_published
from states import generator
from tiny_models import experts_lm
from transformers.integrations.moe import grouped_mm_experts_forward

import freedave
from freedave.models.experts import experts_in_fours


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


@pytest.mark.parametrize("tokens", [1, 5, 64])
@torch.inference_mode()
def test_compiled(tokens, monkeypatch):
    """No graph break, rows by the four for every expert, as many of them however tokens are routed; the same answer."""
    experts = experts_lm(64).model.model.layers[1].mlp.experts
    compiled = torch.compile(experts_in_fours, fullgraph=True, dynamic=False, backend="aot_eager")
    indices = []

    def record(module, rows, index, weights):
        indices.append(index[:, 0])
        return grouped_mm_experts_forward(module, rows, index, weights)

    for seed in range(4):
        hidden_states, weights = (torch.randn(tokens, n, generator=generator(seed)) for n in (64, 2))
        index = torch.rand(tokens, 8, generator=generator(seed)).argsort(1)[:, :2]
        ours = experts_in_fours(experts, hidden_states, index, weights)
        assert torch.equal(compiled(experts, hidden_states, index, weights), ours)
        with monkeypatch.context() as patch:
            patch.setattr("freedave.models.experts.grouped_mm_experts_forward", record)
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert torch.equal(experts_in_fours(experts, hidden_states, index, weights), ours)
    counts = torch.stack([index.bincount(minlength=8) for index in indices])
    assert (counts % 4 == 0).all() and len(set(counts.sum(1).tolist())) == 1


@pytest.mark.parametrize("family", ["sdar_moe", "llada_moe", "llada2"])
def test_a_checkpoint_that_was_loaded(family, tmp_path):
    """The model had no device before its weights were read."""
    lm = freedave.load_model(write_published(tmp_path, family)[0])
    assert lm.model.config._experts_implementation == "freedave"
