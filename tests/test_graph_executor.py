"""The graph executor, launch by launch: what it decodes is what static decoding decodes, in as few forwards as planned."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import golden_lm, prompt

import freedave
from freedave.decode import shapes
from freedave.decode.decoder import Decoder
from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.sequence import Sequence
from freedave.decode.settings import SequenceSettings, Settings, resolve_settings
from freedave.decode.shapes import Shapes, window_blocks

LENGTHS = [3, 12, 8, 5]
EXACT = [("block_causal", "auto"), ("block_causal", "none"), ("full", "none"), ("full_shifted", "none")]
REFRESHED = [(family, cache) for family in ("full", "full_shifted") for cache in ("prefix", "dual")]
DRAFTINGS = pytest.mark.parametrize("drafting", ["recycled", "pooled", "pipelined"])
FAMILIES = pytest.mark.parametrize(("family", "cache"), EXACT + REFRESHED)


def settings_for(lm, draft_steps: int | str = 4, new: int = 16, **options) -> Settings:
    return resolve_settings(lm, 1, new, draft_steps=draft_steps, executor="graph", **options)


def ids(length: int, seed: int = 0) -> list[int]:
    return prompt(length, seed)[0].tolist()


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    width = max(lengths)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for b, length in enumerate(lengths):
        input_ids[b, width - length :], mask[b, width - length :] = prompt(length, b)[0], 1
    return {"input_ids": input_ids, "attention_mask": mask}


def expect_static(lm, sequence: Sequence, start: list[int], new: int = 16, **options) -> None:
    """The sequence has ended with the tokens and steps that static decoding by the planned executor finds."""
    static = freedave.generate(lm, torch.tensor([start]), new, draft_steps=1, executor="planned", **options)
    assert sequence.finished and sequence.error is None
    assert sequence.generated(sequence.tokens) == static.sequences[0, len(start) :].tolist()
    assert sequence.generated(sequence.step_map) == static.step_map[0].tolist()


def test_example():
    """Prompts arrive while others are being decoded; each decodes as it does alone, in two slots."""
    lm = golden_lm()
    engine = Decoder(lm, settings_for(lm), slots=2, capacity=40)
    waiting = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    sequences = []
    while waiting or engine.sequences:
        while waiting and engine.free_slots:
            sequences.append(engine.add(waiting.pop(0)))
        engine.launch()
        engine.poll()
    for seed, length in enumerate(LENGTHS):
        expect_static(lm, sequences[seed], ids(length, seed))
    assert engine.forwards < 2 * 16
    assert set(engine.shapes) == {
        "a first forward: 1 x 1 drafts x 76 tokens, window 12",  # a prompt of up to 64 tokens, filled up
        "step: 2 x 4 drafts x 12 tokens, window 12",
    }


OPTIONS = [
    {},
    {"drafting": "nested", "prefill_chunk": 4},
    {"tokens_per_step": 2},
    {"threshold": 0.1},
    {"order": "left_to_right", "eos_token_id": [5, 9]},
    {"lookahead_steps": 1, "stop_sequences": [[3], [7, 1]]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block_length", [4, 8])
@FAMILIES
def test_lossless_and_in_as_few_forwards(family, cache, block_length, options):
    """Answers of 15 tokens, so that last blocks are cut short. With an exact cache, or none, the window shows all that the
    drafts can reach, so that there is no forward more than planned; static decoding takes one a step as well. (Pooled drafts
    are counted in tests/test_pooled_decoding.py.)
    """
    lm = golden_lm(family, block_length=block_length)
    common = {"max_new_tokens": 15, "cache": cache, "drafting": "recycled", **batch_of(LENGTHS), **options}
    static = freedave.generate(lm, draft_steps=1, executor="planned", **common)
    for draft_steps in (1, 3, 8):
        out = freedave.generate(lm, draft_steps=draft_steps, executor="graph", check_lossless=True, **common)
        for found in (out, out.static):
            assert torch.equal(found.sequences, static.sequences) and torch.equal(found.step_map, static.step_map)
        if (family, cache) in EXACT:
            planned = freedave.generate(lm, draft_steps=draft_steps, executor="planned", **common)
            pairs = zip(out.stats.forwards_by_sequence, planned.stats.forwards_by_sequence, strict=True)
            assert all(ours <= others for ours, others in pairs)


@pytest.mark.parametrize("slots", [1, 2, 3])
@DRAFTINGS
@FAMILIES
def test_slots_are_used_again(family, cache, drafting, slots):
    """The golden models have two key-value heads: with as many slots, a mask that lined up with heads would go unnoticed."""
    lm = golden_lm(family, block_length=4)
    engine = Decoder(lm, settings_for(lm, cache=cache, drafting=drafting), slots=slots, capacity=40)
    starts = [ids(length, seed) for seed, length in enumerate((9, 4, 6, 1, 12))]
    waiting, sequences = starts.copy(), []
    while waiting or engine.sequences:
        while waiting and engine.free_slots:
            sequences.append(engine.add(waiting.pop(0)))
        engine.launch()
        engine.poll()
    for sequence, start in zip(sequences, starts, strict=True):
        expect_static(lm, sequence, start, cache=cache)


@pytest.mark.parametrize("draft_steps", [1, 6])
@FAMILIES
def test_answers_of_different_lengths(family, cache, draft_steps):
    """Some begin within a block or end within one; the last comes when all others are well ahead."""
    lm = golden_lm(family, block_length=8)
    settings = settings_for(lm, draft_steps, new=30, cache=cache)
    engine = Decoder(lm, settings, slots=4, capacity=64)
    requests = [(ids(7), 13), (ids(4, 1), 6), (ids(16, 2), 30), (ids(11, 3), 1)]
    sequences = [engine.add(start, SequenceSettings(new)) for start, new in requests[:3]]
    for _ in range(3):
        engine.launch()
        engine.poll()
    start, new = requests[3]
    sequences.append(engine.add(start, SequenceSettings(new)))
    while engine.sequences:
        engine.launch()
        engine.poll()
    for sequence, (start, new) in zip(sequences, requests, strict=True):
        expect_static(lm, sequence, start, new, cache=cache)


@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_one_block_may_be_the_whole_answer(cache, block_length):
    """With full attention blocks begin where the prompt ends; without a length of its own, a block is the answer."""
    lm = golden_lm("full", block_length=block_length)
    common = {"max_new_tokens": 13, "cache": cache, **batch_of([7, 4])}
    out = freedave.generate(lm, draft_steps=3, executor="graph", **common)
    static = freedave.generate(lm, draft_steps=1, executor="planned", **common)
    assert torch.equal(out.sequences, static.sequences) and torch.equal(out.step_map, static.step_map)


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("new", [17, 30])
def test_the_models_positions_may_end_within_a_block(monkeypatch, cache, new):
    lm = golden_lm(block_length=32)
    monkeypatch.setattr(lm, "max_positions", 60)
    common = {"max_new_tokens": new, "cache": cache, **batch_of([30, 9])}
    out = freedave.generate(lm, draft_steps=5, executor="graph", check_lossless=True, **common)
    planned = freedave.generate(lm, draft_steps=1, executor="planned", **common)
    assert torch.equal(out.sequences, planned.sequences) and torch.equal(out.step_map, planned.step_map)


@pytest.mark.parametrize("longest", [512, 4], ids=["filled up", "as long as it is"])
def test_a_prompts_forward_is_a_shape_that_comes_again_unless_it_is_long(monkeypatch, longest):
    monkeypatch.setattr(shapes, "_LONGEST_PROMPT", longest)
    lm = golden_lm()
    engine = Decoder(lm, settings_for(lm), slots=1, capacity=40)
    for seed, length in enumerate((9, 14, 22)):
        start = ids(length, seed)
        sequence = engine.add(start)
        while engine.sequences:
            engine.launch()
            engine.poll()
        expect_static(lm, sequence, start)
    first = [runs for shape, runs in engine.shapes.items() if shape.startswith("a first forward")]
    assert first == ([3] if longest == 512 else [])


@DRAFTINGS
@pytest.mark.parametrize("chunk", [1, 8, 20, 64])
def test_long_prompts_are_stored_in_chunks(chunk, drafting):
    """Each chunk is a forward, while the sequences beside it go on."""
    lm = golden_lm(block_length=8)
    engine = Decoder(lm, settings_for(lm, prefill_chunk=chunk, drafting=drafting), slots=3, capacity=140)
    starts = [ids(6), ids(102, 1), ids(59, 2)]
    sequences = [engine.add(start) for start in starts]
    before = -(-96 // max(chunk // 8 * 8, 8)) - 1
    while engine.sequences:
        engine.launch()
        committed = [commit.sequence for commit in engine.poll()]
        assert sequences[0] in committed or sequences[0].finished
    assert sequences[1].accepted_lengths[:before] == [0] * before and sequences[1].accepted_lengths[before] > 0
    for sequence, start in zip(sequences, starts, strict=True):
        expect_static(lm, sequence, start)


@FAMILIES
def test_what_follows_the_end_is_the_end_token(family, cache):
    """In every slot of a batch, at its own place; drafts may have run ahead of it."""
    lm = golden_lm(family, block_length=4)
    common = {"max_new_tokens": 16, "cache": cache, **batch_of([6, 6, 6])}
    whole = freedave.generate(lm, draft_steps=1, executor="planned", **common).sequences[:, 6:].tolist()
    ends = 0
    for token in whole[1][::3]:
        out = freedave.generate(lm, draft_steps=6, executor="graph", eos_token_id=[62, token], **common)
        for answer, row in zip(whole, out.sequences[:, 6:].tolist(), strict=True):
            cuts = [i + 1 for i, other in enumerate(answer) if other in (62, token)]
            length = cuts[0] if cuts else 16
            assert row == answer[:length] + [62] * (16 - length)
            ends += length < 16
    assert ends


@DRAFTINGS
@FAMILIES
def test_a_slot_forgets_what_was_not_finite(family, cache, drafting):
    """NaN keys of a broken request, and of one that was dropped, lie in slots that others get."""
    lm = golden_lm(family, block_length=4)
    weight = lm.model.model.embed_tokens.weight
    kept = weight[57].clone()
    starts = [[1, 57, *ids(14)], [57, *ids(15, 1)], ids(7, 2), ids(3, 3)]
    try:
        weight.data[57] = float("nan")
        engine = Decoder(lm, settings_for(lm, cache=cache, drafting=drafting), slots=2, capacity=40)
        broken, dropped = map(engine.add, starts[:2])
        engine.launch()
        engine.drop(dropped)
        assert [commit.sequence for commit in engine.poll()] == [broken] and broken.error is not None
        healthy = [engine.add(start) for start in starts[2:]]
        assert {sequence.slot for sequence in healthy} == {broken.slot, dropped.slot}
        while engine.sequences:
            engine.launch()
            engine.poll()
        for sequence, start in zip(healthy, starts[2:], strict=True):
            expect_static(lm, sequence, start, cache=cache)
    finally:
        weight.data[57] = kept


@DRAFTINGS
@FAMILIES
def test_arrivals_and_cancellations_within_a_step(family, cache, drafting):
    """A step under way does not mind: whoever was dropped commits nothing more, whoever came waits for the next one."""
    lm = golden_lm(family, block_length=4)
    engine = Decoder(lm, settings_for(lm, cache=cache, drafting=drafting), slots=3, capacity=40)
    first, second = engine.add(ids(6)), engine.add(ids(9, 1))
    for n in itertools.count():
        engine.launch()
        if n == 0:
            third = engine.add(ids(5, 2))
        if n == 1:
            engine.drop(second)
            assert engine.free_slots == 0
        committed = {commit.sequence for commit in engine.poll()}
        if n < 2:
            assert committed == ({first, second} if n == 0 else {first, third})
        assert n == 0 or second not in committed
        if n == 1:
            fourth = engine.add(ids(12, 3))
            assert fourth.slot == second.slot
        if not engine.sequences:
            break
    for sequence, start in ((first, ids(6)), (third, ids(5, 2)), (fourth, ids(12, 3))):
        expect_static(lm, sequence, start, cache=cache)


def test_shapes_are_few_and_reported():
    """A block of 32 runs windows of one block until a draft can finish it; how often each shape ran is known."""
    lm = golden_lm(block_length=32)
    engine = Decoder(lm, settings_for(lm, draft_steps=8, new=96), slots=2, capacity=160)
    for seed in range(2):
        engine.add(ids(40, seed))
    while engine.sequences:
        engine.launch()
        engine.poll()
    steps = {f"step: 2 x 8 drafts x {length} tokens, window {length}" for length in (32, 64)}
    assert set(engine.shapes) == {"a first forward: 1 x 1 drafts x 128 tokens, window 64", *steps}
    assert engine.shapes["step: 2 x 8 drafts x 32 tokens, window 32"] > 1


def test_window_blocks():
    lm = golden_lm()
    assert [window_blocks(settings_for(lm, steps), steps) for steps in (1, 2, 4, 8, 16)] == [2, 2, 3, 5, 5]
    pooled = [settings_for(lm, steps, new=64, drafting="pooled") for steps in (1, 2, 4, 8, 16)]
    assert [window_blocks(settings, settings.draft_steps) for settings in pooled] == [2, 2, 3, 5, 9]
    whole = golden_lm("full")  # one block is the answer
    assert window_blocks(settings_for(whole, 8), 8) == window_blocks(settings_for(whole, 8, threshold=0.5), 8) == 1


@pytest.mark.parametrize("drafting", ["recycled", "pooled"])
def test_chosen_drafts_take_the_shapes_of_fixed_ones(drafting):
    lm = golden_lm()
    chosen = settings_for(lm, "auto", new=64, drafting=drafting)
    sequences = [DeviceSequence(0, 0, ids(9), chosen, lm.mask_token_id)]
    for steps in (2, 4, 8):
        fixed = settings_for(lm, steps, new=64, drafting=drafting)
        shape = Shapes(fixed, 1, 96).together(sequences, steps)
        assert Shapes(chosen, 1, 96).together(sequences, steps) == shape
        assert shape.window < Shapes(chosen, 1, 96).longest_window


def test_the_window_of_few_chosen_drafts_holds_what_many_have_committed():
    lm = golden_lm()
    chosen = settings_for(lm, "auto", new=64, drafting="pooled")
    shapes = Shapes(chosen, 1, 96)
    sequence = DeviceSequence(0, 0, ids(8), chosen, lm.mask_token_id)
    assert sequence.start == 8 and shapes.longest_window == 36
    for complete in range(9):  # blocks of 4, and a position of the one behind them
        sequence.tokens[8 : 8 + 4 * complete] = [1] * (4 * complete)
        sequence.tokens[8 + 4 * complete + 2] = 1
        for drafts in (1, 2, 4, 8, 16):
            window = shapes.together([sequence], drafts).window
            assert 4 * (complete + 1) <= window <= shapes.longest_window
        sequence.tokens[8 + 4 * complete + 2] = lm.mask_token_id
    sequence.tokens[8:44] = [1] * 36  # all that a window shows is complete
    assert {shapes.together([sequence], drafts).window for drafts in (1, 2, 4, 8, 16)} == {shapes.longest_window}


def test_what_is_wrong_is_named():
    lm = golden_lm()
    engine = Decoder(lm, settings_for(lm), slots=1, capacity=40)
    with pytest.raises(ValueError, match="need 56 positions, but a slot has 40"):
        engine.add([1] * 40)
    engine.add([1, 2, 3])
    with pytest.raises(RuntimeError, match="every slot is taken"):
        engine.add([1])
    wrapped = freedave.DiffusionLM(torch.nn.Linear(1, 1), 63, block_length=4)
    with pytest.raises(ValueError, match="executor='graph' needs a transformers model.*use executor='planned'"):
        settings_for(wrapped)
