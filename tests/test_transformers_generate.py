"""`model.generate(custom_generate=freedave.custom_generate)` is `freedave.generate` in transformers' clothes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import MASK, golden_lm, golden_model, prompt

import freedave

BLOCK_CAUSAL = {"mask_token_id": MASK, "attention": "block_causal", "block_length": 4}


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    """A model that nothing has switched to bidirectional attention."""
    model = copy.deepcopy(golden_model("block_causal"))
    model.set_attn_implementation("sdpa")
    return model


def decode(model: transformers.PreTrainedModel, input_ids: torch.Tensor, **arguments: object) -> object:
    return model.generate(input_ids, custom_generate=freedave.custom_generate, **(BLOCK_CAUSAL | arguments))


def test_the_same_as_freedave_generate(model):
    expected = freedave.generate(golden_lm(), prompt(8), max_new_tokens=24, draft_steps=4)
    assert torch.equal(decode(model, prompt(8), max_new_tokens=24, draft_steps=4), expected.sequences)
    out = decode(model, prompt(8), max_length=32, draft_steps=4, return_dict_in_generate=True, check_lossless=True)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out["step_map"], expected.step_map)
    assert torch.equal(out.forward_map, expected.forward_map)
    assert out.num_forwards == expected.num_forwards < 24
    assert out.stats.accepted_lengths == expected.stats.accepted_lengths


def test_settings_arrive(model):
    statically = decode(model, prompt(8), max_new_tokens=24, draft_steps=1, return_dict_in_generate=True)
    assert statically.num_forwards == 24
    nested = decode(model, prompt(8), max_new_tokens=24, drafting="nested", return_dict_in_generate=True)
    expected = freedave.generate(golden_lm(), prompt(8), max_new_tokens=24, drafting="nested")
    assert nested.num_forwards == expected.num_forwards
    steps = []
    decode(model, prompt(8), max_new_tokens=8, on_step=steps.append, order="left_to_right", tokens_per_step=2)
    assert steps[-1].finished and steps[-1].tokens == 8


def test_what_the_config_says(model):
    for name, value in BLOCK_CAUSAL.items():
        setattr(model.config, name, value)
    out = model.generate(prompt(8), max_new_tokens=24, custom_generate=freedave.custom_generate)
    assert torch.equal(out, decode(model, prompt(8), max_new_tokens=24))


def test_full_attention():
    lm = golden_lm("full_shifted", block_length=8)
    settings = {"mask_token_id": MASK, "attention": "full", "block_length": 8, "logits_shift": True, "cache": "dual"}
    out = lm.model.generate(prompt(8), max_new_tokens=24, custom_generate=freedave.custom_generate, **settings)
    assert torch.equal(out, freedave.generate(lm, prompt(8), max_new_tokens=24, cache="dual").sequences)


def test_padded_batches(model):
    short, long = prompt(5), prompt(9, seed=1)
    input_ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1), long])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    out = decode(model, input_ids, attention_mask=attention_mask, max_new_tokens=12)
    for row, one in zip(out, (short, long), strict=True):
        assert torch.equal(row[9:], decode(model, one, max_new_tokens=12)[0, one.shape[1] :])


def test_ends_of_sequence(model):
    whole = decode(model, prompt(8), max_new_tokens=32)[0, 8:]
    end = int(whole[7])  # the last token of a block
    out = decode(model, prompt(8), max_new_tokens=32, eos_token_id=[end, 0], pad_token_id=0)[0, 8:]
    expected = freedave.generate(golden_lm(), prompt(8), max_new_tokens=32, eos_token_id=[end, 0])
    assert torch.equal(out, expected.sequences[0, 8:])
    stopped = decode(model, prompt(8), max_new_tokens=32, stop_sequences=[whole[9:11].tolist()])[0, 8:]
    assert torch.equal(stopped[:11], whole[:11])


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = model(prompt(8)).logits
    decode(model, prompt(8), max_new_tokens=8)
    assert model.training and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(prompt(8)).logits, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="draft_steps must be at least 1"):
        decode(model, prompt(8), max_new_tokens=8, draft_steps=0)
    assert model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True}, "do_sample=True, but FreeDave decodes greedily"),
        ({"num_beams": 2}, "num_beams=2, but FreeDave"),
        ({"repetition_penalty": 1.2}, r"logits processors \(RepetitionPenaltyLogitsProcessor\)"),
        ({"stop_strings": ["a"], "tokenizer": object()}, "stop"),
        ({"max_time": 1.0}, r"stopping criteria \(MaxTimeCriteria\)"),
        ({"mask_token_id": None}, "names no mask_token_id; pass it"),
        ({"mask_token_id": 64}, "outside the model's vocabulary of 64"),
        ({"draft_stepz": 3}, "draft_stepz"),
    ],
)
def test_what_cannot_be_honoured_is_refused(model, arguments, message):
    with pytest.raises((ValueError, AttributeError, TypeError), match=message):
        decode(model, prompt(8), max_new_tokens=8, **arguments)


def test_a_filled_cache_is_refused(model):
    past = model(prompt(8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds tokens already"):
        decode(model, prompt(12), max_new_tokens=8, past_key_values=past)
