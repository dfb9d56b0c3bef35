"""How sequences end: one or several end-of-sequence tokens, stop sequences; and what a decode needs of memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import golden_lm, prompt

import freedave


def test_example():
    """The decode ends with the block by which its answer contains the stop sequence; the rest is left open."""
    lm = golden_lm()
    whole = freedave.generate(lm, prompt(8), max_new_tokens=32, draft_steps=1)
    answer = whole.sequences[0, 8:].tolist()
    stop = answer[10:13]  # begins in the third block, ends in the fourth
    first = next(i for i in range(30) if answer[i : i + 3] == stop)
    length = (first + 2) // 4 * 4 + 4
    commits = []
    out = freedave.generate(
        lm, prompt(8), max_new_tokens=32, stop_sequences=[[62, 61], stop], check_lossless=True, on_step=commits.append
    )
    assert out.sequences[0, 8 : 8 + length].tolist() == answer[:length]
    assert (out.sequences[0, 8 + length :] == lm.mask_token_id).all() and (out.step_map[0, length:] == -1).all()
    assert out.stats.tokens == length == commits[-1].tokens and commits[-1].finished
    assert sorted(position for commit in commits for position in commit.positions) == list(range(length))


@pytest.mark.parametrize("draft_steps", [1, 3, 8])
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual")])
def test_several_ends_of_sequence(family, cache, draft_steps):
    """Any of them ends a sequence; the first one fills the rest."""
    options = {"max_new_tokens": 32, "block_length": 4, "cache": cache}
    whole = freedave.generate(golden_lm(family), prompt(8), draft_steps=1, **options)
    ends = whole.sequences[0, 8:].view(8, 4)[:, -1].tolist()
    absent = next(token for token in range(63) if token not in ends)
    length = 4 * (ends.index(ends[3]) + 1)
    out = freedave.generate(
        golden_lm(family, eos_token_id=[absent, ends[3]]),
        prompt(8),
        draft_steps=draft_steps,
        check_lossless=True,
        **options,
    )
    assert out.sequences[0, 8 : 8 + length].tolist() == whole.sequences[0, 8 : 8 + length].tolist()
    assert (out.sequences[0, 8 + length :] == absent).all() and out.stats.tokens == length
    unending = freedave.generate(
        golden_lm(family, eos_token_id=ends[3]), prompt(8), draft_steps=draft_steps, eos_token_id=[], **options
    )
    assert torch.equal(unending.sequences, whole.sequences)


def test_a_prompt_does_not_stop_its_answer():
    """Only what was generated can hold a stop sequence, even in the block that the prompt begins."""
    lm = golden_lm()
    start = prompt(7)
    plain = freedave.generate(lm, start, max_new_tokens=9)
    stop = start[0, 4:6].tolist()
    answer = plain.sequences[0, 7:].tolist()
    assert stop not in [answer[i : i + 2] for i in range(8)]
    assert torch.equal(freedave.generate(lm, start, 9, stop_sequences=[stop]).sequences, plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": [3, 64]}, "eos_token_id 64 is outside the model's vocabulary of 64 tokens"),
        ({"stop_sequences": [[1, -2]]}, "stop_sequences: -2 is outside"),
        ({"stop_sequences": [[1], []]}, "a stop sequence is empty"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        freedave.generate(golden_lm(), prompt(4), 8, **options)


@pytest.mark.parametrize(
    ("family", "cache", "new", "options"),
    [
        ("block_causal", "auto", 32, {}),
        ("full", "none", 32, {}),
        ("full", "dual", 32, {}),
        ("full", "dual", 128, {"block_length": 32}),
        ("full", "prefix", 32, {}),
        ("full", "prefix", 128, {}),
        ("full", "prefix", 256, {"block_length": 32, "tokens_per_step": 2}),
    ],
)
def test_eight_drafts_need_little_more_memory_than_one(family, cache, new, options):
    """A prompt of 1,024 tokens: the keys and values stand once, and few more tokens are computed at a time."""
    lm = golden_lm(family)
    lm.max_positions = None  # rotary positions: the configuration's 512 is no limit of the arithmetic
    options = {"block_length": 8, "cache": cache, "measure_memory": True} | options
    peaks = {}
    for draft_steps in (1, 8):
        out = freedave.generate(lm, prompt(1024), new, draft_steps, **options)
        peaks[draft_steps] = out.stats.peak_bytes
    one_layer = 2 * (1024 + new) * 2 * 16 * 4
    assert out.stats.cache_bytes == (0 if cache == "none" else 2 * one_layer) < peaks[1]
    assert peaks[8] <= 1.3 * peaks[1]


@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "dual"), ("full", "prefix")])
def test_the_logits_of_eight_drafts_need_no_memory(family, cache):
    """A large vocabulary and little else: all at once, they would need more than all the rest."""
    config = transformers.Qwen3Config(
        vocab_size=32768,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    lm = freedave.DiffusionLM(model, 32767, attention=family, block_length=32)
    static, drafted = (
        freedave.generate(lm, prompt(1024), 64, k, block_length=32, cache=cache, measure_memory=True) for k in (1, 8)
    )
    assert torch.equal(static.sequences, drafted.sequences)
    assert drafted.stats.peak_bytes <= 1.3 * static.stats.peak_bytes
