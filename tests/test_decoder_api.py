"""The step API as an engine uses it: arrivals and cancellations at any time, and requests that nothing can be done with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decoder import Decoder
from freedave.sequence import Sequence
from freedave.settings import resolve_settings

FAMILIES = [("block_causal", "auto"), ("block_causal", "none"), ("full", "none"), ("full", "prefix"), ("full", "dual")]


def engine_for(lm, slots: int = 4, capacity: int = 64, max_new_tokens: int = 16, **options) -> Decoder:
    settings = resolve_settings(lm, 1, max_new_tokens, **({"draft_steps": 4, "block_length": 8} | options))
    return Decoder(lm, settings, slots=slots, capacity=capacity)


def ids(length: int, seed: int = 0) -> list[int]:
    return prompt(length, seed)[0].tolist()


def finish(engine: Decoder) -> None:
    while engine.sequences:
        engine.launch()
        engine.poll()


def expect_as_alone(lm, sequence: Sequence, start: list[int], max_new_tokens: int = 16, **options) -> None:
    options = {"draft_steps": 4, "block_length": 8} | options
    alone = freedave.generate(lm, torch.tensor([start]), max_new_tokens, **options)
    assert sequence.finished
    assert sequence.generated(sequence.tokens) == alone.sequences[0, len(start) :].tolist()
    assert sequence.generated(sequence.step_map) == alone.step_map[0].tolist()


@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_requests_arrive_while_a_step_is_under_way(family, cache):
    """They wait for the next launch."""
    lm = golden_lm(family)
    engine = engine_for(lm, slots=3, cache=cache)
    sequences = [engine.add(ids(6))]
    engine.launch()
    sequences.append(engine.add(ids(9, 1)))
    assert [commit.sequence.index for commit in engine.poll()] == [0]
    while len(sequences) < 6 or engine.sequences:
        engine.launch()
        if engine.free_slots and len(sequences) < 6:
            sequences.append(engine.add(ids(5 + len(sequences), len(sequences))))
        engine.poll()
    for seed, sequence in enumerate(sequences):
        start = ids([6, 9, 7, 8, 9, 10][seed], seed)
        expect_as_alone(lm, sequence, start, cache=cache)
    assert engine.free_slots == 3


@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_requests_are_cancelled_while_a_step_is_under_way(family, cache):
    """Nothing is committed of them, the others do not mind, and the slot is taken again."""
    lm = golden_lm(family)
    engine = engine_for(lm, slots=2, cache=cache)
    kept, cancelled = engine.add(ids(6)), engine.add(ids(12, 1))
    for _ in range(2):
        engine.launch()
        engine.poll()
    tokens = cancelled.tokens.copy()
    engine.launch()
    engine.drop(cancelled)
    with pytest.raises(ValueError, match="not being decoded"):
        engine.drop(cancelled)
    assert engine.free_slots == 0  # the step still uses it
    assert [commit.sequence for commit in engine.poll()] == [kept]
    assert cancelled.tokens == tokens and engine.sequences == [kept] and engine.free_slots == 1
    later = engine.add(ids(9, 2))
    finish(engine)
    expect_as_alone(lm, kept, ids(6), cache=cache)
    expect_as_alone(lm, later, ids(9, 2), cache=cache)


def test_a_request_may_come_and_go_within_a_step():
    lm = golden_lm()
    engine = engine_for(lm, slots=2)
    first = engine.add(ids(6))
    engine.launch()
    engine.drop(engine.add(ids(7)))
    assert engine.free_slots == 1
    assert len(engine.poll()) == 1 and engine.sequences == [first] and engine.free_slots == 1
    engine.launch()
    engine.drop(first)
    assert engine.poll() == [] and engine.free_slots == 2
    with pytest.raises(RuntimeError, match="nothing to decode"):
        engine.launch()


BAD_REQUESTS = [
    ([1, 64], 8, ValueError, "the prompt holds token ids from 1 to 64, but the model's vocabulary has 64 tokens"),
    ([-1], 8, ValueError, "the prompt holds token ids from -1 to -1"),
    ([1, MASK, 2], 8, ValueError, r"the prompt holds the mask token \(id 63\) at position 1"),
    ([], 8, ValueError, "the prompt is empty"),
    ([1.5], 8, TypeError, r"the prompt must be token ids, whole numbers, got \[1.5\]"),
    ("text", 8, TypeError, "the prompt must be token ids, whole numbers, got 'text'"),
    ([1] * 4, -3, ValueError, "Decoder.add: max_new_tokens must be at least 1, got -3"),
    ([1] * 4, 0, ValueError, "max_new_tokens must be at least 1, got 0"),
    ([1] * 4, 2.5, TypeError, "Decoder.add: max_new_tokens must be an int, got float"),
    ([1] * 505, 8, ValueError, r"the prompt \(505 tokens\) and max_new_tokens \(8\) need .* but the model has 512"),
    ([1] * 90, 16, ValueError, r"the prompt \(90 tokens\).*need 112 positions, but a slot has 100"),
]


@pytest.mark.parametrize(("start", "new", "error", "message"), BAD_REQUESTS, ids=lambda value: str(value)[:20])
def test_a_bad_request_is_refused_and_changes_nothing(start, new, error, message):
    lm = golden_lm()
    engine = engine_for(lm, slots=2, capacity=512 if len(start) > 500 else 100)
    healthy = engine.add(ids(6))
    with pytest.raises(error, match=message):
        engine.add(start, new)
    assert engine.free_slots == 1 and engine.sequences == [healthy]
    finish(engine)
    expect_as_alone(lm, healthy, ids(6))


def test_integers_of_other_libraries():
    """Wherever an int is expected; what only looks like one is refused."""
    lm = golden_lm()
    whole = freedave.generate(lm, prompt(8), 16, 4, block_length=8)
    end = int(whole.sequences[0, 20])
    expected = freedave.generate(lm, prompt(8), 16, 4, block_length=8, eos_token_id=end)
    n = np.int64
    for ends in (n(end), np.array([end]), torch.tensor(end), torch.tensor([end]), [n(end)]):
        out = freedave.generate(
            lm, prompt(8), n(16), np.int32(4), n(8), n(1), eos_token_id=ends, lookahead_steps=torch.tensor(4)
        )
        assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)
    model = freedave.DiffusionLM(lm.model, n(MASK), block_length=n(8), eos_token_id=n(end))
    assert model.eos_token_ids == (end,) and type(model.mask_token_id) is int
    engine = engine_for(model)
    sequences = [engine.add(start, n(16)) for start in (np.array(ids(8)), prompt(8)[0])]
    finish(engine)
    for sequence in sequences:
        assert sequence.generated(sequence.tokens) == expected.sequences[0, 8:].tolist()
    for value in (3.5, [3.5], True, "3", [[3]], np.array([0.5])):
        with pytest.raises(TypeError, match="eos_token_id must be token ids, whole numbers, got"):
            freedave.generate(lm, prompt(8), 16, eos_token_id=value)
        with pytest.raises(TypeError, match="eos_token_id must be token ids"):
            freedave.DiffusionLM(lm.model, MASK, block_length=8, eos_token_id=value)
    with pytest.raises(TypeError, match="a stop sequence must be token ids, whole numbers, got"):
        freedave.generate(lm, prompt(8), 16, stop_sequences=["ab"])
    with pytest.raises(TypeError, match="draft_steps must be an int, got bool"):
        freedave.generate(lm, prompt(8), 16, draft_steps=True)
