"""Functions with the signatures of published decoders, beside the rule of each one in plain PyTorch on random models."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import transformers
from random_models import Model, model_of, prompts
from tiny_models import MASK

import freedave
from freedave.integrations import fast_dllm, llada
from freedave.integrations.step_schedule import tokens_a_step


def counts(block: int, steps: int) -> list[int]:
    """How many positions each of `steps` steps fills: as equal as can be, the first ones more."""
    return [block // steps + (i < block % steps) for i in range(steps)]


def passing(ranked: torch.Tensor, factor: float) -> int:
    """How many positions, of these confidences, Fast-dLLM's factor fills: as many as reach their limits, the first always;
    where that leaves one, it is filled as well."""
    count = 1
    while count < len(ranked) and ranked[count] >= 1 - factor / (count + 2):
        count += 1
    return len(ranked) if count == len(ranked) - 1 else count


def chosen(confidence: torch.Tensor, count: int | None, threshold: float | None, factor: float | None) -> torch.Tensor:
    """The published rules: the `count` most confident positions; or all from the threshold on, and the most confident one;
    or those that pass by the factor."""
    take = torch.zeros_like(confidence, dtype=torch.bool)
    for row, values in enumerate(confidence):
        best = values.argsort(descending=True, stable=True)
        if factor is not None:
            ranked = values[best][values[best] > -torch.inf]
            take[row, best[: passing(ranked, factor) if len(ranked) else 0]] = True
        elif threshold is None:
            take[row, best[:count]] = True
        else:
            take[row] = values >= threshold
            take[row, best[0]] = True
    return take & (confidence > -torch.inf)


def other_keys(model: Model, x: torch.Tensor, begin: int, end: int, cache: str) -> list[tuple[torch.Tensor, ...]]:
    """Each layer's keys and values of what stands before a block, or around it, as a forward of everything leaves them."""
    kept = [*range(begin), *(range(end, x.shape[1]) if cache == "dual" else [])]
    layers = model(x, use_cache=True).past_key_values.layers
    return [(layer.keys[:, :, kept], layer.values[:, :, kept]) for layer in layers]


@torch.inference_mode()
def published(
    model: Model,
    prompt: torch.Tensor,
    gen: int,
    block: int,
    steps: int,
    cache: str = "none",
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[torch.Tensor, list[list[int]], int]:
    """Tokens, which positions each step of the first sequence filled, and the number of forwards."""
    x = torch.cat([prompt, torch.full((len(prompt), gen), MASK)], 1)
    filled, forwards = [], 0
    for begin in range(prompt.shape[1], x.shape[1], block):
        end, past = begin + block, None
        schedule = iter(counts(block, steps // (gen // block)))
        while (x[:, begin:end] == MASK).any():
            forwards += 1
            if past is None or cache == "none":
                logits = model(x).logits[:, begin:end]
                past = None if cache == "none" else other_keys(model, x, begin, end, cache)
            else:
                reused = transformers.DynamicCache(config=model.config)
                for n, pair in enumerate(past):
                    reused.update(*pair, n)
                until = end if cache == "dual" else x.shape[1]
                places = torch.arange(begin, until)[None]
                out = model(x[:, begin:until], past_key_values=reused, position_ids=places)
                logits = out.logits[:, :block]
            sure, tokens = logits.double().softmax(-1).max(-1)
            masked = x[:, begin:end] == MASK
            take = chosen(sure.masked_fill(~masked, -torch.inf), next(schedule, None), threshold, factor)
            x[:, begin:end][take] = tokens[take]
            if take[0].any():
                filled.append((take[0].nonzero()[:, 0] + begin).tolist())
    return x, filled, forwards


def outputs(monkeypatch: pytest.MonkeyPatch, door: ModuleType) -> list[freedave.DecodeOutput]:
    """What the loop returns to a door, which hands on the tokens alone."""
    decoded, decode = [], door.decode

    def noted(*arguments: object, **options: object) -> freedave.DecodeOutput:
        decoded.append(decode(*arguments, **options))
        return decoded[-1]

    monkeypatch.setattr(door, "decode", noted)
    return decoded


def order(out: freedave.DecodeOutput, prompt: torch.Tensor) -> list[list[int]]:
    """Which positions each step of the first sequence filled."""
    steps = out.step_map[0]
    return [((steps == step).nonzero()[:, 0] + prompt.shape[1]).tolist() for step in range(int(steps.max()) + 1)]


FUNCTIONS = {
    "none": fast_dllm.generate,
    "prefix": fast_dllm.generate_with_prefix_cache,
    "dual": fast_dllm.generate_with_dual_cache,
}
SCHEDULES = [(16, 8, 16), (16, 8, 8), (16, 8, 6), (24, 8, 48), (16, 8, 2)]  # answer, block, steps


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize(("gen", "block", "steps"), SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_llada(monkeypatch, seed, gen, block, steps, lossless):
    model, start, decoded = model_of(seed), prompts(seed, 2), outputs(monkeypatch, llada)
    expected, filled, _ = published(model, start, gen, block, steps)
    out = llada.generate(
        model, start, steps=steps, gen_length=gen, block_length=block, mask_id=MASK, lossless=lossless, draft_steps=4
    )
    assert torch.equal(out, expected)
    assert order(decoded[0], start) == filled


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize(
    ("steps", "threshold", "factor"),
    [(16, None, None), (8, None, None), (16, 0.6, None), (16, 0.3, None), (16, None, 1.0), (8, 0.9, 1.9)],
)
@pytest.mark.parametrize("cache", FUNCTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_fast_dllm(monkeypatch, seed, cache, steps, threshold, factor, lossless):
    model, start, told, decoded = model_of(seed), prompts(seed), [], outputs(monkeypatch, fast_dllm)
    expected, filled, forwards = published(model, start, 16, 8, steps, cache, threshold, factor)
    out, taken = FUNCTIONS[cache](
        model, start, steps=steps, gen_length=16, block_length=8, mask_id=MASK, threshold=threshold, factor=factor,
        step_callback=told.append, lossless=lossless, draft_steps=4,
    )  # fmt: skip
    assert torch.equal(out, expected)
    assert order(decoded[0], start) == filled
    assert told == list(range(len(filled)))
    assert taken <= forwards if lossless else taken == forwards


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_confidences_are_ranked_as_in_float64(seed, lossless):
    """Though most of them are 1.0 in float32, where the lowest position would come first."""
    model, start = Model(seed), prompts(seed, 2)
    model.sharpness = 8.0
    expected, filled, _ = published(model, start, 16, 16, 16)
    call = {"steps": 16, "gen_length": 16, "block_length": 16, "mask_id": MASK, "lossless": lossless}
    assert torch.equal(llada.generate(model, start, **call), expected)
    assert torch.equal(fast_dllm.generate(model, start, **call)[0], expected)
    assert filled != sorted(filled)


def test_drafts_take_fewer_forwards():
    for cache, function in FUNCTIONS.items():
        call = (model_of(3), prompts(3), 16, 16, 8)
        taken = [function(*call, mask_id=MASK, lossless=lossless)[1] for lossless in (False, True)]
        assert taken[1] < taken[0], cache


def test_padding_is_not_seen():
    model, start = model_of(1), prompts(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), start], 1)
    mask = torch.ones_like(padded).index_fill(1, torch.arange(3), 0)
    settings = {"steps": 8, "gen_length": 8, "block_length": 8, "mask_id": MASK}
    out = llada.generate(model, padded, mask, **settings)
    assert torch.equal(out[:, 3:], llada.generate(model, start, **settings)) and torch.equal(out[:, :3], padded[:, :3])


REFUSED = [
    (
        llada.generate,
        {"temperature": 0.5},
        r"llada.generate: temperature=0.5 cannot be honoured: .* draws anew in each step",
    ),
    (llada.generate, {"cfg_scale": 1.0}, "cfg_scale=1.0 cannot"),
    (llada.generate, {"remasking": "random"}, "remasking='random' cannot"),
    (llada.generate, {"logits_eos_inf": True}, "logits_eos_inf=True cannot"),
    (llada.generate, {"confidence_eos_eot_inf": True}, "confidence_eos_eot_inf=True cannot"),
    (llada.generate, {"gen_length": 20}, r"gen_length \(20\) must be a multiple of block_length \(8\)"),
    (llada.generate, {"steps": 7}, r"steps \(7\) must be a multiple of the number of blocks \(2\)"),
    (
        llada.generate,
        {"steps": 10},
        "with 10 steps, the steps of a block of 8 commit different numbers .*: take 16 steps",
    ),
    (fast_dllm.generate_with_dual_cache, {"steps": 0}, "fast_dllm.generate_with_dual_cache: steps must be at least 1"),
]


@pytest.mark.parametrize(("function", "options", "message"), REFUSED)
def test_what_is_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(
            Model(0), prompts(0), **({"gen_length": 16, "block_length": 8, "steps": 16, "mask_id": MASK} | options)
        )


@pytest.mark.parametrize("block", range(1, 20))
def test_steps_that_are_taken_commit_what_is_published(block):
    """And those for one token a step, or two, always are."""
    accepted = []
    for steps in range(1, 25):
        try:
            tokens = tokens_a_step("", steps, block, block)
        except ValueError:
            continue
        accepted.append(steps)
        theirs = [count for count in counts(block, steps) if count]
        assert theirs[:-1] == [tokens] * (len(theirs) - 1) and 1 <= theirs[-1] <= tokens
    assert {1, -(-block // 2), *range(block, 25)} <= {*accepted}
