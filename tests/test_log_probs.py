"""Log-probabilities of tokens as they were committed, beside those that the model's logits say at each static step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from graph_recorder import use_recorded_graphs
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.decoder import Committed, Decoder
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.output import DecodeOutput
from freedave.decode.settings import SequenceSettings, resolve_settings

FAMILIES = [("block_causal", "auto"), ("block_causal", "none"), ("full", "none"), ("full_shifted", "none")]
CACHES = [("full", "prefix"), ("full", "dual"), ("full_shifted", "prefix"), ("full_shifted", "dual")]
DRAFTINGS = ["nested", "recycled", "pooled", "pipelined"]
EXECUTORS = ["planned", "graph"]


@torch.inference_mode()
def expected_of(lm: freedave.DiffusionLM, out: DecodeOutput, block: int, temperature: float = 1.0) -> torch.Tensor:
    """By forwards of each static step's own state: whole sequences, of whole blocks, without a cache."""
    rows = []
    for tokens, steps in zip(out.sequences, out.step_map, strict=True):
        start = len(tokens) - len(steps)
        length = start + len(steps)
        own_block = torch.arange(length) // block
        visible = own_block[:, None] >= own_block if lm.attention == "block_causal" else None
        row = torch.full((len(steps),), math.nan)
        for step in range(int(steps.max()) + 1):
            state = tokens.clone()
            state[start:][(steps < 0) | (steps >= step)] = MASK
            at = (steps == step).nonzero()[:, 0]
            mask = None if visible is None else visible[None, None]
            logits = (
                lm.logits(state[None], start + at - int(lm.logits_shift), attention_mask=mask).double() / temperature
            )
            logits[:, MASK] = -torch.inf
            row[at] = logits.log_softmax(-1).gather(1, tokens[start + at][:, None])[:, 0].float()
        rows.append(row)
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor, measure: str) -> None:
    """The logarithm of a probability near 1 has the probability's error; log-odds have none there."""
    torch.testing.assert_close(found, expected, rtol=1e-4 if measure == "log_odds" else 1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_as_the_model_says(family, cache, drafting, executor):
    """Whichever forward has committed a token, and from whatever it was drafted."""
    lm = golden_lm(family)
    for number, measure in enumerate(("prob", "log_odds")):
        start = torch.cat([prompt(9, seed=2 * number + n) for n in range(2)])
        options = {"cache": cache, "drafting": drafting, "executor": executor, "measure": measure}
        if number:
            options |= {"tokens_per_step": 2}
        out = freedave.generate(lm, start, 23, 6, 8, log_probs=True, **options)
        close(out.log_probs, expected_of(lm, out, 8), measure)
        assert torch.equal(out.log_probs.isnan(), out.step_map < 0)
        assert out.num_forwards < 23


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize(("family", "cache"), CACHES)
def test_as_static_decoding_says(family, cache, drafting, executor):
    """Where a cache is refreshed once a block; the position that has to come first there has its own as well."""
    lm = golden_lm(family)
    start = torch.cat([prompt(9, seed=n) for n in range(2)])
    options = {"cache": cache, "executor": executor, "measure": "log_odds", "log_probs": True}
    static = freedave.generate(lm, start, 24, 1, 8, **options)
    out = freedave.generate(lm, start, 24, 6, 8, drafting=drafting, **options)
    close(out.log_probs, static.log_probs, "log_odds")
    assert not out.log_probs.isnan().any() and (out.log_probs < 0).all()
    refreshed = static.step_map % 8 == 0  # a block's first step is a forward of everything
    found = static.log_probs[refreshed]
    close(found, expected_of(lm, static, 8)[refreshed], "log_odds")


@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_thresholds(order, drafting):
    lm = golden_lm()
    out = freedave.generate(lm, prompt(9), 31, 6, 4, order=order, threshold=0.3, drafting=drafting, log_probs=True)
    close(out.log_probs, expected_of(lm, out, 4), "prob")
    assert (out.step_map.unique(return_counts=True)[1] > 1).any()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("draft_steps", [1, 6])
def test_drawn_tokens(draft_steps, executor):
    """Of what they were drawn from, at the temperature."""
    lm = golden_lm()
    options = {"temperature": 0.7, "seed": 3, "measure": "log_odds", "executor": executor}
    out = freedave.generate(lm, prompt(9), 23, draft_steps, 4, log_probs=True, **options)
    close(out.log_probs, expected_of(lm, out, 4, 0.7), "log_odds")
    assert (out.log_probs < -0.7).any()
    alone = freedave.generate(lm, prompt(9), 23, draft_steps, 4, log_probs=True, top_k=1, **options)
    assert (alone.log_probs > -1e-6).all()  # nothing else could have been drawn


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_engine_gets_them_with_each_commit(executor):
    """Sequences that come later, and one that ends early, included."""
    lm = golden_lm()
    settings = resolve_settings(
        lm, 1, 16, block_length=4, draft_steps=4, drafting="recycled", executor=executor, log_probs=True
    )
    decoder = Decoder(lm, settings, slots=2, capacity=64)
    starts = [prompt(6 + n, seed=n)[0].tolist() for n in range(4)]
    waiting, told = [*starts], {}
    while waiting or decoder.sequences:
        while waiting and decoder.free_slots:
            start = waiting.pop(0)
            alone = freedave.generate(lm, torch.tensor([start]), 16, 1, 4).sequences[0].tolist()
            decoder.add(start, SequenceSettings(eos_token_id=alone[len(start) + 6] if len(start) == 7 else None))
        decoder.launch()
        for commit in map(Committed.describe, decoder.poll()):
            told.setdefault(commit.sequence, {}).update(zip(commit.positions, commit.log_probs, strict=True))
    for index, start in enumerate(starts):
        out = freedave.generate(lm, torch.tensor([start]), 16, 1, 4, log_probs=True)
        row = out.log_probs[0]
        assert len(told[index]) == 16 or (len(start) == 7 and len(told[index]) < 8)
        close(torch.tensor([*told[index].values()]), row[[*told[index]]], "prob")


@pytest.mark.parametrize("drafting", ["recycled", "pooled"])
def test_a_captured_step_has_them(monkeypatch, drafting):
    """And one that was captured for others, who did not ask, is not taken for it."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm()
    settings = resolve_settings(
        lm, 9, 31, block_length=4, draft_steps=4, executor="graph", log_probs=True, drafting=drafting
    )
    decoder = Decoder(lm, settings, slots=1, capacity=64)
    executor = decoder._executor = GraphExecutor(lm, settings, slots=1, capacity=64, capture=True)
    assert not executor.serves(dataclasses.replace(settings, log_probs=False), 1, 64) and executor.serves(
        settings, 1, 64
    )
    sequence = decoder.add(prompt(9)[0])
    while decoder.sequences:
        decoder.launch()
        decoder.poll()
    expected = freedave.generate(lm, prompt(9), 31, 1, 4, log_probs=True)
    close(torch.tensor(sequence.generated(sequence.log_probs)), expected.log_probs[0], "prob")
    assert sum(graph.replays for graph in graphs) > 5


def test_nobody_asked():
    commits = []
    out = freedave.generate(golden_lm(), prompt(), 8, on_step=commits.append)
    assert out.log_probs is None and all(commit.log_probs is None for commit in commits)


def test_other_measures_do_not_say():
    with pytest.raises(ValueError, match="log_probs needs measure='prob' or 'log_odds', got measure='margin'"):
        freedave.generate(golden_lm(), prompt(), 8, measure="margin", log_probs=True)
