"""Block-causal attention with shifted logits (Fast-dLLM v2): a block's first position is predicted by the block before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_wrapped_modules import Wrapper, inner_model
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.decoder import Decoder
from freedave.decode.settings import resolve_settings
from freedave.forward.attention import block_causal_mask

EXECUTORS = ["planned", "graph"]
CACHES = ["auto", "none"]


def shifted_lm(block_length: int = 4) -> freedave.DiffusionLM:
    return golden_lm("block_causal", logits_shift=True, block_length=block_length)


def published_decode(lm: freedave.DiffusionLM, tokens: list[int], new: int) -> tuple[list[int], list[int]]:
    """(tokens, the step of each) as Fast-dLLM v2 decodes with one token a step and sub-blocks as long as blocks.

    The last row of what is complete decides the next block's first token. Then, as long as the block has masks: each of its
    rows predicts the position behind it, and the most certain one is committed. Nothing is cached. (As everywhere here, the
    mask itself is never predicted.)
    """
    size, sequence, steps = lm.block_length or 0, list(tokens), [-1] * len(tokens)

    def rows(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            mask = block_causal_mask(len(ids), size, torch.device("cpu"))
            logits = lm.logits(torch.tensor([ids]), torch.arange(len(ids)), attention_mask=mask)
        logits[:, MASK] = -torch.inf
        return logits.softmax(-1)

    step = 0
    while len(sequence) < len(tokens) + new:
        if len(sequence) % size == 0:
            sequence.append(int(rows(sequence)[-1].argmax()))
            steps.append(step)
            step += 1
        begin = len(sequence) // size * size
        block = sequence[begin:] + [MASK] * (begin + size - len(sequence))
        order = steps[begin:] + [-1] * (begin + size - len(sequence))
        while MASK in block:
            best = rows(sequence[:begin] + block)[begin:].max(-1)
            masked = [i for i, token in enumerate(block) if token == MASK]
            chosen = max(masked, key=lambda i: (float(best.values[i - 1]), -i))
            block[chosen], order[chosen] = int(best.indices[chosen - 1]), step
            step += 1
        sequence, steps = sequence[:begin] + block, steps[:begin] + order
    return sequence, steps


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("block", "length"), [(4, 8), (4, 6), (8, 3), (8, 16)])  # on and off a block's boundary
def test_example(block, length, cache, executor):
    """Tokens and steps of the published decoding, statically and with drafts."""
    lm = shifted_lm(block)
    new = 24 - length % block
    ids, steps = published_decode(lm, prompt(length)[0].tolist(), new)
    for drafts in (1, 4, 8):
        out = freedave.generate(lm, prompt(length), new, draft_steps=drafts, cache=cache, executor=executor)
        assert out.sequences[0].tolist() == ids
        assert out.step_map[0].tolist() == steps[length:]
        if drafts == 1:
            assert out.num_forwards == new  # one a token: nothing is computed twice


def test_it_is_another_model_with_aligned_logits():
    plain = freedave.generate(golden_lm("block_causal"), prompt(), 16, draft_steps=1)
    assert not torch.equal(freedave.generate(shifted_lm(), prompt(), 16, draft_steps=1).sequences, plain.sequences)


OPTIONS: list[dict[str, Any]] = [
    {"drafting": "nested"},
    {"drafting": "recycled"},
    {"drafting": "pooled"},
    {"drafting": "pipelined"},
    {"tokens_per_step": 2},
    {"tokens_per_step": 3, "drafting": "recycled"},
    {"threshold": 0.05},
    {"order": "left_to_right"},
    {"measure": "margin"},
    {"prefill_chunk": 4},
    {"draft_steps": 13},
    {"draft_steps": "auto"},
    {"eos_token_id": 5},
    {"max_new_tokens": 21},
]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lossless(options, cache, executor):
    """A batch of prompts that end anywhere in a block."""
    batch = torch.cat([prompt(13, seed) for seed in range(3)])
    visible = torch.ones_like(batch)
    visible[1, :4] = visible[2, :5] = 0
    lm = shifted_lm()
    options = {"max_new_tokens": 24, "draft_steps": 6} | options
    out = freedave.generate(
        lm, batch, attention_mask=visible, cache=cache, executor=executor, check_lossless=True, **options
    )
    static = freedave.generate(
        lm, batch, attention_mask=visible, cache="none", executor="planned", **(options | {"draft_steps": 1})
    )
    assert torch.equal(out.sequences, static.sequences) and torch.equal(out.step_map, static.step_map)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cache", CACHES)
def test_drawn_tokens(cache, executor):
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": 16, "cache": cache, "executor": executor}
    out = freedave.generate(shifted_lm(), prompt(9), draft_steps=5, check_lossless=True, **options)
    assert torch.equal(out.sequences, freedave.generate(shifted_lm(), prompt(9), draft_steps=1, **options).sequences)


@pytest.mark.parametrize("cache", CACHES)
def test_a_module_that_does_its_own_attention(cache):
    wrapped = freedave.DiffusionLM(
        Wrapper(inner_model("block_causal", "sdpa")), MASK, block_length=4, logits_shift=True
    )
    expected = freedave.generate(shifted_lm(), prompt(7), 16, draft_steps=1)
    out = freedave.generate(wrapped, prompt(7), 16, draft_steps=4, cache=cache, check_lossless=True)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_decoder_that_sequences_enter_and_leave(executor):
    """What was in a slot before leaves no trace."""
    lm = shifted_lm()
    decoder = Decoder(lm, resolve_settings(lm, 12, 12, draft_steps=4, executor=executor), slots=2, capacity=32)
    lengths = [8, 5, 12, 3]
    waiting = [prompt(length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    found: dict[int, list[int]] = {}
    entered: list[tuple[int, Any]] = []
    while waiting or decoder.sequences:
        while waiting and len(decoder.sequences) < 2:
            index = len(lengths) - len(waiting)
            entered.append((index, decoder.add(waiting.pop(0))))
        decoder.launch()
        decoder.poll()
    for index, sequence in entered:
        found[index] = sequence.generated(sequence.tokens)
    for index, length in enumerate(lengths):
        alone = freedave.generate(lm, prompt(length, index), 12, draft_steps=1).sequences[0, length:].tolist()
        assert found[index] == alone
    decoder.close()
