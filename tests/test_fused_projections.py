"""Projections of one input as one product: the same results, the same model before, during and after."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import golden_model

from freedave.forward.fused_projections import FusedProjections

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def model_of(family: str):
    return copy.deepcopy(golden_model(family)).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["block_causal", "full", "full_shifted"])  # the last has biases
def test_example(family):
    model = model_of(family)
    before, names = logits(model), dict(model.named_parameters()).keys()
    fused = FusedProjections(model)
    layer = model.base_model.layers[0]
    with fused.fused():
        assert layer.self_attn.q_proj is not layer.self_attn.k_proj and type(layer.mlp.up_proj) is not torch.nn.Linear
        torch.testing.assert_close(logits(model), before)
    assert type(layer.self_attn.q_proj) is torch.nn.Linear and dict(model.named_parameters()).keys() == names
    torch.testing.assert_close(logits(model), before)


def test_weights_take_no_more_memory_and_can_be_saved(tmp_path):
    model = model_of("block_causal")
    FusedProjections(model)
    attention = model.base_model.layers[0].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(saved.get(name, parameter), parameter)


def test_a_layer_that_was_replaced_stays():
    """As adapters replace it, with the layer and its weights inside."""
    model = model_of("block_causal")
    fused = FusedProjections(model)
    assert fused.holds
    attention = model.base_model.layers[0].self_attn
    attention.k_proj = torch.nn.Sequential(attention.k_proj, torch.nn.Dropout())
    assert not fused.holds


def test_weights_that_were_changed_in_place_are_seen():
    model = model_of("block_causal")
    fused = FusedProjections(model)
    with torch.no_grad():
        model.base_model.layers[0].self_attn.k_proj.weight.mul_(2)
    changed = logits(model)
    with fused.fused():
        torch.testing.assert_close(logits(model), changed)
    assert fused.holds


def test_a_model_that_was_converted_is_no_longer_fused():
    model = model_of("block_causal")
    fused = FusedProjections(model)
    assert fused.holds
    model.double()
    assert not fused.holds


def test_layers_that_do_more_than_multiply_stay():
    model = model_of("block_causal")
    first, second = (layer.self_attn for layer in model.base_model.layers)
    first.k_proj.register_forward_hook(lambda module, inputs, out: out + 1)
    expected = logits(model)
    with FusedProjections(model).fused():
        assert type(first.q_proj) is torch.nn.Linear and type(second.q_proj) is not torch.nn.Linear
        torch.testing.assert_close(logits(model), expected)


def test_an_error_leaves_the_model_as_it_was():
    model = model_of("block_causal")
    with pytest.raises(RuntimeError, match="stop"), FusedProjections(model).fused():
        raise RuntimeError("stop")
    assert type(model.base_model.layers[1].mlp.gate_proj) is torch.nn.Linear
