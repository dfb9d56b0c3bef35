"""Dream's method beside its published rule in plain PyTorch, on random models."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from random_models import Model, model_of, prompts
from tiny_models import MASK, golden_lm

import freedave
from freedave.integrations.dream import Schedule, diffusion_generate

STATES = 200
ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy")


def measured(probs: torch.Tensor, alg: str) -> torch.Tensor:
    """How sure an algorithm is of each row's token."""
    if alg == "topk_margin":
        best = probs.sort(-1, descending=True).values
        return best[:, 0] - best[:, 1]
    return (probs * torch.log(probs + 1e-10)).sum(-1) if alg == "entropy" else probs.max(-1).values


@torch.inference_mode()
def published(
    model: Model,
    start: torch.Tensor,
    new: int,
    steps: int,
    eps: float,
    alg: str,
    hook: Any = lambda step, x, logits: logits,
) -> list[torch.Tensor]:
    """All tokens `[B, T]` after each step. Equal confidences go to the lowest position."""
    x = torch.nn.functional.pad(start, (0, new), value=MASK)
    times = torch.linspace(1, eps, steps + 1)
    history = []
    for i in range(steps):
        masked = x == MASK
        logits = model(x).logits
        logits = hook(i, x, torch.cat([logits[:, :1], logits[:, :-1]], 1))
        average = masked.sum() / len(x)
        count = int(average * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(average)
        x = x.clone()
        for row in range(len(x)):
            places = masked[row].nonzero()[:, 0]
            probs = logits[row, places].softmax(-1)
            best = measured(probs, alg).argsort(descending=True, stable=True)[:count]
            x[row, places[best]] = probs.max(-1).indices[best]
        history.append(x)
    return history


@pytest.mark.parametrize("lossless", [False, True])
def test_published_rule(monkeypatch, lossless):
    """The tokens after each step, in more steps than there are positions, in as many and in fewer."""
    steps_taken = uneven = 0
    forwards: list[int] = []
    logits = freedave.DiffusionLM.logits
    monkeypatch.setattr(freedave.DiffusionLM, "logits", lambda *a, **b: forwards.append(1) or logits(*a, **b))
    for seed in range(STATES):
        model, start = model_of(seed % 10), prompts(seed, 1 + seed % 2)
        alg, new = ALGORITHMS[seed % 3], 10 + seed % 7
        steps, eps = (new, 2 * new, new // 2, 3, 1)[seed % 5], (1e-3, 0.0, 0.1)[seed // 5 % 3]
        expected = published(model, start, new, steps, eps, alg)
        out = diffusion_generate(
            model, start, max_new_tokens=new, steps=steps, eps=eps, alg=alg, mask_token_id=MASK,
            return_dict_in_generate=True, output_history=True, lossless=lossless, draft_steps=4,
        )  # fmt: skip
        assert torch.equal(out.sequences, expected[-1]), seed
        assert len(out.history) == steps and all(map(torch.equal, out.history, expected)), seed
        counts = [count for count in Schedule(steps, eps).counts(new) if count]
        uneven += len({*counts}) > 1
        steps_taken += len(counts)
    assert uneven > STATES / 4
    assert len(forwards) < 0.85 * steps_taken if lossless else len(forwards) == steps_taken


def test_prompts_of_several_lengths():
    """What `load_model` returns; padding is not seen."""
    lm = golden_lm("full_shifted")
    one, other = prompts(0)[0], prompts(2)[0]
    width = max(len(one), len(other))
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.int64), row]) for row in (one, other)])
    mask = torch.tensor([[i >= width - len(row) for i in range(width)] for row in (one, other)]).long()
    for lossless in (False, True):
        call = {"max_new_tokens": 12, "steps": 12, "alg": "entropy", "lossless": lossless}
        out = diffusion_generate(lm, padded, attention_mask=mask, **call)
        assert torch.equal(out[:, :width], padded)
        for row, start in zip(out, (one, other), strict=True):
            assert torch.equal(row[width:], diffusion_generate(lm, start[None], **call)[0, len(start) :])


def test_equal_probabilities_in_16_bits():
    """They are ranked as bfloat16 has them, the lowest position first; "first" in float32 is another one."""
    model, differing = Model(4), 0
    model.to(torch.bfloat16)
    for seed in range(10):
        expected = published(model, prompts(seed), 16, 16, 1e-3, "maskgit_plus")
        out = diffusion_generate(
            model, prompts(seed), max_new_tokens=16, steps=16, alg="maskgit_plus", mask_token_id=MASK,
            return_dict_in_generate=True, output_history=True,
        )  # fmt: skip
        assert all(map(torch.equal, out.history, expected)), seed
        in_float32 = freedave.generate(
            freedave.DiffusionLM(model, MASK, attention="full", logits_shift=True), prompts(seed), 16, 1
        )
        differing += not torch.equal(out.sequences, in_float32.sequences)
    assert differing


def test_hooks():
    """As published: logits before they are used, and tokens after each step, which go on as the hook returns them."""
    model, start, told = model_of(2), prompts(2, 2), []
    call = {"max_new_tokens": 8, "steps": 8, "alg": "entropy", "mask_token_id": MASK}

    def logits_hook(step, x, logits):
        return logits.index_fill(-1, torch.tensor([7, 9, MASK]), -50.0) if step % 2 else -logits

    def without_mask(step, x, logits):  # which is never predicted
        return logits_hook(step, x, logits).index_fill(-1, torch.tensor([MASK]), -50.0)

    def tokens_hook(step, x, logits):
        told.append((step, None if logits is None else logits.shape))
        return x

    hooks = {"generation_logits_hook_func": logits_hook, "generation_tokens_hook_func": tokens_hook}
    expected = published(model, start, 8, 8, 1e-3, "entropy", without_mask)
    assert torch.equal(diffusion_generate(model, start, **call, **hooks), expected[-1])
    assert told == [(None, None), *((step, (2, start.shape[1] + 8, 64)) for step in range(8))]

    def given(step, x, logits):
        x = x.clone()
        x[:, start.shape[1] + 3] = 11
        return x

    out = diffusion_generate(model, start, **call, generation_tokens_hook_func=given)
    assert (out[:, start.shape[1] + 3] == 11).all() and (out != MASK).all()
    assert torch.equal(out[:, : start.shape[1]], start)


def test_a_configuration():
    """Its attributes are taken where nothing is given by name; 20 tokens where nobody says how many."""
    model, start = model_of(1), prompts(1)
    configuration = types.SimpleNamespace(alg="entropy", steps=8, max_length=20, mask_token_id=MASK)
    out = diffusion_generate(model, start, configuration)
    assert torch.equal(out, published(model, start, 20, 8, 1e-3, "entropy")[-1])
    configuration.max_length = start.shape[1] + 6
    assert diffusion_generate(model, start, configuration).shape == (1, start.shape[1] + 6)
    assert diffusion_generate(model, start, configuration, max_new_tokens=5).shape == (1, start.shape[1] + 5)
    out = diffusion_generate(model, start, configuration, max_length=20, steps=4)
    assert torch.equal(out, published(model, start, 20 - start.shape[1], 4, 1e-3, "entropy")[-1])


@pytest.mark.parametrize("lossless", [False, True])
def test_a_broken_model_is_reported(lossless):
    model = Model(0)
    model.sharpness = float("nan")
    with pytest.raises(freedave.NonFiniteLogitsError, match="the logits of position 0 of the answer are not finite"):
        diffusion_generate(model, prompts(0), alg="entropy", mask_token_id=MASK, lossless=lossless)


REFUSED = [
    ({}, ValueError, "alg='origin' fills positions at random; take one of maskgit_plus, topk_margin, entropy"),
    ({"alg": "random"}, ValueError, "alg must be one of"),
    ({"temperature": 0.2}, ValueError, r"dream.diffusion_generate: temperature=0.2 cannot be honoured: .*draws anew"),
    ({"alg_temp": 0.1}, ValueError, "alg_temp=0.1 cannot be honoured"),
    ({"top_p": 0.9}, ValueError, "top_p=0.9 cannot be honoured"),
    ({"top_k": 5}, ValueError, "top_k=5 cannot be honoured"),
    ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2 cannot be honoured"),
    ({"max_tokens": 5}, TypeError, "no such setting: max_tokens; there are max_new_tokens, "),
    ({"alg": "entropy", "steps": 0}, ValueError, "steps must be at least 1"),
    ({"alg": "entropy", "eps": 1.0}, ValueError, "eps must be at least 0 and below 1"),
    ({"alg": "entropy", "max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
    ({"alg": "entropy", "max_length": 4}, ValueError, "max_length must be at least 5, got 4"),
    ({"alg": "entropy", "max_new_tokens": 600}, ValueError, "604 positions are needed, but the model has 512"),
    ({"alg": "entropy", "lossless": True, "draft_steps": 33}, ValueError, "draft_steps must be at most 32"),
    ({"alg": "entropy", "lossless": True, "generation_tokens_hook_func": print}, ValueError, "hooks see whole steps"),
    ({"alg": "entropy", "model": golden_lm()}, ValueError, "block-causal attention"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(options, error, message):
    call = {"model": model_of(0), "inputs": prompts(0), "mask_token_id": MASK} | options
    with pytest.raises(error, match=message):
        diffusion_generate(**call)
