"""SDAR's function beside its published rule in plain PyTorch, on random models in blocks."""

from __future__ import annotations

import pytest
import torch
from random_models import Model, model_of, prompts
from tiny_models import MASK

import freedave
from freedave.integrations import sdar
from freedave.integrations.step_schedule import as_torch_compares
from freedave_kernels import select_transfer

STATES = 200


def filled_by(sure: torch.Tensor, masked: torch.Tensor, strategy: str, count: int, threshold: float) -> torch.Tensor:
    """Which positions `[L]` a step fills. Equal confidences go to the lowest position."""
    take = torch.zeros_like(masked)
    if strategy == "entropy_bounded":  # then `sure` are entropies
        ranked = sure.masked_fill(~masked, torch.inf).argsort(stable=True)
        sums = sure[ranked][: int(masked.sum())].cumsum(0)
        take[ranked[: max(int((sums < threshold).sum()), 1)]] = True
        return take
    if strategy == "sequential":
        take[masked.nonzero()[:count, 0]] = True
        return take
    above = masked & (sure > threshold)
    if strategy == "low_confidence_dynamic" and above.sum() >= count:
        return above
    ranked = sure.masked_fill(~masked, -torch.inf).argsort(descending=True, stable=True)
    take[ranked[:count]] = True
    return take & masked


@torch.inference_mode()
def published(
    model: Model,
    prompt: torch.Tensor,
    gen: int,
    block: int,
    steps: int,
    strategy: str,
    threshold: float,
    stops: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[T]`, masks where nothing was decoded, and the step that filled each position of the answer."""
    start = len(prompt)
    total = -(-(start + gen) // block) * block
    x = torch.cat([prompt, torch.full((total - start,), MASK)])
    step_map, step = torch.full((total,), -1), 0
    own_block = torch.arange(total) // block
    hidden = torch.where(own_block[:, None] >= own_block, 0.0, -torch.inf)
    counts = [block // steps + (i < block % steps) for i in range(steps)]
    for begin in range(start // block * block, total, block):
        end = begin + block
        for count in counts:
            masked = x[begin:end] == MASK
            if not masked.any():
                break
            logits = model(x[None, :end], attention_mask=hidden[None, None, :end, :end]).logits[0, begin:]
            sure, tokens = logits.softmax(-1).max(-1)
            if strategy == "entropy_bounded":
                sure = torch.distributions.Categorical(logits=logits).entropy()
            take = filled_by(sure, masked, strategy, count, threshold)
            x[begin:end][take] = tokens[take]
            step_map[begin:end][take] = step
            step += int(take.any())
        if any(stop in x[start:] for stop in stops):
            break
    return x, step_map[start:]


RULES = [
    ("low_confidence_dynamic", 1, 0.3),
    ("low_confidence_dynamic", 1, 0.6),
    ("low_confidence_dynamic", 1, 1.0),
    ("low_confidence_static", 1, 0.85),
    ("low_confidence_static", 2, 0.85),
    ("low_confidence_static", 3, 0.85),
    ("entropy_bounded", 1, 0.35),
    ("entropy_bounded", 1, 2.5),
    ("entropy_bounded", 1, 6.0),
    ("sequential", 1, 0.85),
    ("sequential", 2, 0.85),
]  # and how many positions a step fills


@pytest.mark.parametrize("lossless", [False, True])
def test_published_rule(monkeypatch, lossless):
    """Tokens and steps, in blocks of 4 and 8, prompts that end in a block, answers that do, and stopping tokens."""
    outs, fewer, stopped = [], 0, 0
    monkeypatch.setattr(sdar, "decode", lambda *a, **b: outs.append(freedave.generate(*a, **b)) or outs[-1])
    for seed in range(STATES):
        model, start = model_of(seed % 10), prompts(seed)[0]
        strategy, several, threshold = RULES[seed % len(RULES)]
        block, gen = (4, 8)[seed % 3 % 2], 9 + seed % 5
        steps = -(-block // several)
        free, _ = published(model, start, gen, block, steps, strategy, threshold, [])
        stops = free[len(start) + 3 : len(start) + 6 : 2].tolist() if seed % 4 == 0 else []
        expected, step_map = published(model, start, gen, block, steps, strategy, threshold, stops)
        out = sdar.block_diffusion_generate(
            model, {"input_ids": start[None]}, MASK, gen, block, steps, 0.0, 0, 1.0, strategy, threshold,
            stops or None, lossless=lossless, draft_steps=4, eb_threshold=threshold,
        )  # fmt: skip
        reached = len(expected)
        if stops:  # behind the first stopping token stand masks
            reached = (
                len(start) + min(i for i, token in enumerate(expected[len(start) :].tolist()) if token in stops) + 1
            )
            stopped += reached < len(expected)
        assert out[0, :reached].tolist() == expected[:reached].tolist(), seed
        assert (out[0, reached:] == MASK).all() and out.shape[1] == len(expected), seed
        new = reached - len(start)
        assert outs[-1].step_map[0, :new].tolist() == step_map[:new].tolist(), seed
        fewer += outs[-1].num_forwards < int(step_map.max()) + 1
    assert stopped > 20 and (fewer > STATES / 2) == lossless


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.85, 1.0, 1 / 3])
def test_thresholds_as_the_host_compares(threshold):
    """The float32 confidences around a threshold pass where torch, which rounds it to float32, says so."""
    nearest = torch.tensor(threshold, dtype=torch.float32)
    confidence = torch.stack([nearest.nextafter(torch.tensor(0.0)), nearest, nearest.nextafter(torch.tensor(2.0))])
    masked, limit = torch.ones(3, dtype=torch.bool), as_torch_compares(threshold)
    chosen = select_transfer(
        confidence, masked, num_transfer=0, threshold=limit, rule="strict", fallback="top_if_fewer"
    )
    assert torch.equal(chosen, confidence > threshold)
    chosen = select_transfer(confidence, masked, num_transfer=0, threshold=limit, fallback="top_if_fewer")
    assert torch.equal(chosen, confidence >= threshold)


def test_one_model_for_all():
    """What `load_model` returns, prompts of several lengths beside each other."""
    lm = freedave.DiffusionLM(Model(3), MASK, block_length=4)
    one, other = prompts(0)[0], prompts(2)[0]
    width = max(len(one), len(other))
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.int64), row]) for row in (one, other)])
    mask = torch.tensor([[i >= width - len(row) for i in range(width)] for row in (one, other)]).long()
    call = {"mask_id": MASK, "gen_length": 8, "block_length": 4, "denoising_steps": 4, "temperature": 0}
    out = sdar.block_diffusion_generate(lm, {"input_ids": padded, "attention_mask": mask}, **call)
    for row, start in zip(out, (one, other), strict=True):
        alone = sdar.block_diffusion_generate(lm, {"input_ids": start[None]}, **call)[0]
        count = min(len(alone) - len(start), len(row) - width)
        assert count >= 8 and row[width : width + count].tolist() == alone[len(start) : len(start) + count].tolist()


def test_draws_follow_from_the_seed():
    """By default, tokens are drawn; with drafts the same ones."""
    prompt = {"input_ids": prompts(1)}
    call = {"mask_id": MASK, "gen_length": 16, "block_length": 8}
    outs = [
        sdar.block_diffusion_generate(model_of(1), prompt, **call, seed=seed, lossless=lossless)
        for seed, lossless in ((5, False), (5, True), (6, False))
    ]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    few = [
        sdar.block_diffusion_generate(model_of(1), prompt, **call, seed=5, top_k=top_k, top_p=top_p)
        for top_k, top_p in ((0, 0.3), (3, 1.0), (3, 0.3), (1, 1.0))
    ]
    assert len({tuple(out[0].tolist()) for out in (outs[0], *few)}) >= 4


def test_the_likeliest_token_alone_has_probability_1():
    """So that, as published, a step of the default strategy fills its whole block."""
    model, start = model_of(3), prompts(3)[0]
    call = {"mask_id": MASK, "gen_length": 16, "block_length": 8, "temperature": 1.0, "top_k": 1}
    out = sdar.block_diffusion_generate(model, {"input_ids": start[None]}, **call)
    expected, step_map = published(model, start, 16, 8, 8, "low_confidence_dynamic", -1.0, [])
    assert torch.equal(out[0], expected) and int(step_map.max()) == len(expected) // 8 - 1


REFUSED = [
    ({"top_k": 3, "temperature": 0}, ValueError, "top_k: these say what is drawn from, but nothing is drawn"),
    ({"top_p": 1.5}, ValueError, "top_p must be"),
    ({"remasking_strategy": "random"}, ValueError, "remasking_strategy must be one of .*sequential"),
    ({"remasking_strategy": "entropy_bounded"}, ValueError, "temperature=1.0 cannot be honoured: .* no entropies here"),
    (
        {"remasking_strategy": "entropy_bounded", "denoising_steps": 4, "temperature": 0},
        ValueError,
        "with 'entropy_bounded', .* fills one position here, and 2 with denoising_steps=4: take 8",
    ),
    ({"denoising_steps": 4}, ValueError, "fills one position here, and 2 with denoising_steps=4: take 8"),
    ({"denoising_steps": 5}, ValueError, "with 5 denoising_steps, .* different numbers .*: take 8 denoising_steps"),
    ({"denoising_steps": 0}, ValueError, "denoising_steps must be at least 1"),
    ({"gen_length": 0}, ValueError, "gen_length must be at least 1"),
    ({"prompt": torch.ones(1, 3, dtype=torch.int64)}, TypeError, "prompt must map 'input_ids' to token ids"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        sdar.block_diffusion_generate(model_of(0), **({"prompt": {"input_ids": prompts(0)}, "mask_id": MASK} | options))
