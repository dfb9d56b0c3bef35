"""The public FreeDave's methods: its own recorded decodes, and its published rules in plain PyTorch on random models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from random_models import Model, model_of, prompts
from test_published_functions import published as published_with_cache
from tiny_models import MASK, golden_lm

from freedave import NonFiniteLogitsError
from freedave.integrations.public_freedave import DLMGeneration

DECODES = json.loads((GOLDEN / "decodes.json").read_text())
STATES = 200


@pytest.mark.parametrize("draft_steps", [None, 1, 4, 8])
@pytest.mark.parametrize("number", range(len(DECODES)))
def test_recorded_decodes(number, draft_steps):
    """What the public implementation returned, tokens and steps, in no more forwards than it took."""
    case = DECODES[number]
    start = torch.tensor([case["prompt"]])
    options: dict[str, Any] = {
        "block_length": case["block_length"],
        "max_gen_length": case["max_new_tokens"],
        "alg_temp": -1 if case["order"] == "left_to_right" else None,
        "mask_token_id": MASK,
    }
    attention = "block" if case["family"] == "block_causal" else "full"
    if attention == "full":
        options["dual_cache"] = case["cache"] == "dual"
    method = f"block_decode_with_{attention}_attention" + ("" if draft_steps is None else "_FreeDave")
    if draft_steps is not None:
        options["draft_steps"] = draft_steps
    lm = golden_lm(case["family"], **({"block_length": case["block_length"]} if attention == "block" else {}))
    out = getattr(DLMGeneration(), method)(lm, start, **options)
    assert out.sequences[0].tolist() == case["sequence"]
    assert out.trajectory_step_map[0].tolist() == case["step"]
    assert out.num_forwards <= case["public_static_forwards"]


def taken(
    sure: torch.Tensor, masked: torch.Tensor, count: int, threshold: float | None, in_order: bool
) -> torch.Tensor:
    """Which positions `[L]` a step commits. Equal confidences go to the lowest position."""
    take = torch.zeros_like(masked)
    ranked = masked.nonzero()[:, 0]
    if not in_order:
        ranked = ranked[sure[ranked].argsort(descending=True, stable=True)]
    if threshold is not None:
        high = sure[ranked] >= threshold
        several = int(high.long().cumprod(0).sum()) if in_order else int(high.sum())
        count = several or count
    take[ranked[:count]] = True
    return take


@torch.inference_mode()
def published(
    model: Model,
    prompt: torch.Tensor,
    gen: int,
    block: int,
    count: int,
    threshold: float | None,
    in_order: bool,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Static decoding with block-causal attention: tokens `[T]`, and the step that committed each position of the answer."""
    start = len(prompt)
    total = -(-(start + gen) // block) * block
    x = torch.cat([prompt, torch.full((total - start,), MASK)])
    step_map, step = torch.full((total,), -1), 0
    own_block = torch.arange(total) // block
    hidden = torch.where(own_block[:, None] >= own_block, 0.0, -torch.inf)
    for begin in range(start // block * block, total, block):
        until = begin + block
        while (x[begin:until] == MASK).any():
            logits = model(x[None, :until], attention_mask=hidden[None, None, :until, :until]).logits[0, begin:]
            sure, tokens = logits.softmax(-1).max(-1)
            take = taken(sure, x[begin:until] == MASK, count, threshold, in_order)
            x[begin:until][take] = tokens[take]
            step_map[begin:until][take] = step
            step += 1
        if (x[begin:until] == end).all():
            x[until:] = end
            break
    return x, step_map[start:]


@pytest.mark.parametrize("lossless", [False, True])
def test_block_attention(lossless):
    """Thresholds, several tokens a step, both orders, and answers that end early with a block of end tokens."""
    fewer = ended = 0
    for seed in range(STATES):
        model, start = model_of(seed % 10), prompts(seed)[0]
        block, gen = (4, 2, 8)[seed % 3], 9 + seed % 5
        count, threshold, in_order = 1 + seed % 2, (None, 0.3, 0.6)[seed // 2 % 3], seed % 7 in (2, 5)
        free, _ = published(model, start, gen, block, count, threshold, in_order, -1)
        blocks = free[len(start) // block * block :].unflatten(0, (-1, block))[:-1]
        alike = blocks[(blocks == blocks[:, :1]).all(1)]
        end = int(alike[0, 0]) if len(alike) else 5
        expected, step_map = published(model, start, gen, block, count, threshold, in_order, end)
        method, options = "block_decode_with_block_attention", {}
        if lossless:
            method, options = f"{method}_FreeDave", {"draft_steps": 4}
        out = getattr(DLMGeneration(token_per_step=count), method)(
            model, start[None], alg_temp=-1 if in_order else 0, block_length=block, max_gen_length=gen,
            mask_token_id=MASK, eos_token_id=end, confidence_threshold=threshold, early_exit=True, **options,
        )  # fmt: skip
        assert torch.equal(out.sequences[0], expected), seed
        assert torch.equal(out.trajectory_step_map[0], step_map), seed
        ended += int((step_map < 0).any())
        fewer += out.num_forwards < int(step_map.max()) + 1
    assert ended > 10 and (fewer > STATES / 4) == lossless


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("dual_cache", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.6])
def test_full_attention(threshold, dual_cache, lossless):
    """Prompts of a batch beside each other."""
    generation = DLMGeneration()
    for seed in range(5):
        model, start = model_of(seed), prompts(seed, 2)
        options: dict[str, Any] = {
            "block_length": 8, "max_gen_length": 16, "dual_cache": dual_cache, "mask_token_id": MASK,
            "confidence_threshold": threshold,
        }  # fmt: skip
        cache = "dual" if dual_cache else "prefix"
        expected = torch.cat([published_with_cache(model, row[None], 16, 8, 16, cache, threshold)[0] for row in start])
        if lossless:
            out = generation.block_decode_with_full_attention_FreeDave(model, start, draft_steps=4, **options)
        else:
            out = generation.block_decode_with_full_attention(model, start, decoding_steps=16, **options)
        assert torch.equal(out.sequences, expected), seed


def test_full_attention_ends_early():
    """With a block of the end token or of the padding token, and each sequence by itself."""
    model, start = model_of(0), prompts(0, 3)
    call: dict[str, Any] = {"block_length": 2, "max_gen_length": 16, "mask_token_id": MASK, "decoding_steps": 16}
    decode = DLMGeneration().block_decode_with_full_attention
    free = decode(model, start, **call).sequences[:, start.shape[1] :].unflatten(1, (-1, 2))
    alike = free[..., 0] == free[..., 1]
    row, block = alike.nonzero()[0].tolist()
    token = int(free[row, block, 0])
    for name, other in (("eos_token_id", "pad_token_id"), ("pad_token_id", "eos_token_id")):
        out = decode(model, start, **call, **{name: token, other: 62}, early_exit=True)
        for b, answer in enumerate(out.sequences[:, start.shape[1] :]):
            ends = [n for n in range(8) if alike[b, n] and free[b, n, 0] == token]
            last = 2 * (ends[0] + 1) if ends else 16
            assert torch.equal(answer[:last], free[b].flatten()[:last]) and (answer[last:] == token).all()
            assert (out.trajectory_step_map[b] >= 0).tolist() == [i < last for i in range(16)]


def test_draws_are_those_of_the_seed():
    """With drafts the same ones; the published methods' are anew in each step."""
    start, call = prompts(1), {"max_gen_length": 16, "block_length": 8, "mask_token_id": MASK, "temperature": 1.0}
    static = DLMGeneration(seed=5).block_decode_with_block_attention(model_of(1), start, **call)
    drafted = DLMGeneration(seed=5).block_decode_with_block_attention_FreeDave(
        model_of(1), start, draft_steps=4, **call
    )
    other = DLMGeneration(seed=6).block_decode_with_block_attention(model_of(1), start, **call)
    assert torch.equal(static.sequences, drafted.sequences)
    assert torch.equal(static.trajectory_step_map, drafted.trajectory_step_map)
    assert not torch.equal(static.sequences, other.sequences)
    few = [
        DLMGeneration(seed=5).block_decode_with_block_attention(model_of(1), start, **call, top_k=top_k, top_p=top_p)
        for top_k, top_p in ((None, 0.3), (3, None), (0, 1.0))
    ]
    assert torch.equal(few[2].sequences, static.sequences)
    assert not any(torch.equal(out.sequences, static.sequences) for out in few[:2])


def test_a_broken_model_is_reported():
    model = Model(0)
    model.sharpness = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="the logits of position"):
        DLMGeneration().block_decode_with_block_attention(model, prompts(0), mask_token_id=MASK, max_gen_length=4)


STATIC, BLOCK = "block_decode_with_full_attention", "block_decode_with_block_attention"
REFUSED = [
    (BLOCK, {"temperature": 1.0, "top_p": 1.9}, "top_p must be"),
    (BLOCK, {"temperature": 1.0, "top_k": -5}, "top_k must be at least 1, got -5"),
    (BLOCK, {"alg_temp": 0.5}, "alg_temp must be None, 0 or -1, got 0.5"),
    (BLOCK, {"block_length": 0}, "block_length must be at least 1"),
    (f"{BLOCK}_FreeDave", {"draft_mode": "tree"}, "draft_mode must be one of batch_expanding, tree_attention, debug"),
    (f"{BLOCK}_FreeDave", {"draft_steps": 0}, "draft_steps must be at least 1"),
    (BLOCK, {"model": golden_lm("full")}, "has full attention"),
    (STATIC, {"model": golden_lm()}, "has block-causal attention"),
    (STATIC, {"max_gen_length": 20}, r"max_gen_length \(20\) must be a multiple of block_length \(32\)"),
    (STATIC, {"decoding_steps": 64}, "with decoding_steps=64, masks may be left: take 128"),
    (f"{STATIC}_FreeDave", {"max_gen_length": 20}, r"max_gen_length \(20\) must be a multiple"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(method, options, message):
    call = {"model": model_of(0), "input_ids": prompts(0), "mask_token_id": MASK} | options
    with pytest.raises(ValueError, match=message):
        getattr(DLMGeneration(), method)(**call)
