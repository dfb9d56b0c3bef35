"""Long prompts are computed in chunks, so that the sequences beside them need not wait."""

from __future__ import annotations

import pytest
import torch
from test_decoding import Plain
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.decoder import Decoder
from freedave.decode.settings import resolve_settings
from freedave.forward import packed_forward


def ids(length: int, seed: int = 0) -> list[int]:
    return prompt(length, seed)[0].tolist()


def counted_forwards(lm, monkeypatch) -> list[int]:
    """The tokens of each call of the model, from now on."""
    packed_features, tokens = lm.packed_features, []

    def counted(forward, rows):
        tokens.append(forward.input_ids.shape[1])
        return packed_features(forward, rows)

    monkeypatch.setattr(lm, "packed_features", counted)
    return tokens


def test_example(monkeypatch):
    """A prompt that joins is stored 32 tokens a forward, while the one that was there goes on."""
    lm = golden_lm(block_length=8)
    tokens = counted_forwards(lm, monkeypatch)
    alone = [
        freedave.generate(lm, prompt(start, seed), 40, 4, drafting="recycled") for seed, start in enumerate((6, 250))
    ]
    drafts_alone = tokens[: alone[0].num_forwards]
    tokens.clear()
    settings = resolve_settings(lm, 1, 40, draft_steps=4, drafting="recycled", prefill_chunk=32)
    engine = Decoder(lm, settings, slots=2, capacity=512)
    first = engine.add(ids(6))
    for _ in range(2):
        engine.launch()
        engine.poll()
    second = engine.add(ids(250, 1))
    waiting = 0
    while engine.sequences:
        engine.launch()
        committed = [commit.sequence for commit in engine.poll()]
        assert first in committed or first.finished
        waiting += second not in committed
    assert waiting == 7 and second.accepted_lengths[:7] == [0] * 7  # 224 of the 248 tokens in whole blocks
    assert tokens[:9] == [*drafts_alone[:2], *(32 + drafts for drafts in drafts_alone[2:9])]
    for sequence, expected in zip((first, second), alone, strict=True):
        length = sequence.prompt_length
        assert sequence.generated(sequence.tokens) == expected.sequences[0, length:].tolist()
        assert sequence.generated(sequence.step_map) == expected.step_map[0].tolist()
    assert first.accepted_lengths == alone[0].stats.accepted_lengths
    assert second.accepted_lengths[7:] == alone[1].stats.accepted_lengths


@pytest.mark.parametrize("joined_keys", [0, 128])
@pytest.mark.parametrize("draft_steps", [1, 5])
@pytest.mark.parametrize("chunk", [1, 8, 20, 64, 99, 100])
def test_the_same_with_and_without_chunks(monkeypatch, chunk, draft_steps, joined_keys):
    """Tokens, steps and forwards, but for those that only store; no forward holds more than the chunk and the drafts."""
    monkeypatch.setattr(packed_forward, "JOINED_KEYS", joined_keys)
    lm = golden_lm(block_length=8)
    whole = freedave.generate(lm, prompt(102), 30, draft_steps, drafting="recycled", prefill_chunk=None)
    plain = freedave.DiffusionLM(Plain(lm.model), MASK, block_length=8)
    for model in (lm, plain):
        with monkeypatch.context() as patch:
            tokens = counted_forwards(model, patch)
            out = freedave.generate(
                model,
                prompt(102),
                30,
                draft_steps,
                drafting="recycled",
                prefill_chunk=chunk,
                check_lossless=draft_steps > 1,
            )
        assert torch.equal(out.sequences, whole.sequences) and torch.equal(out.step_map, whole.step_map)
        before = -(-96 // max(chunk // 8 * 8, 8)) - 1
        assert out.num_forwards == whole.num_forwards + before
        assert torch.equal(out.forward_map, whole.forward_map + before)
        assert out.stats.accepted_lengths == [0] * before + whole.stats.accepted_lengths
        assert out.stats.forwards_by_sequence == [out.num_forwards]
        assert out.stats.positions_computed == whole.stats.positions_computed
        drafts = sorted(tokens)[-1] - max(chunk // 8 * 8, 8)
        assert drafts <= draft_steps * 16


def test_a_forward_stores_no_more_however_many_prompts_come(monkeypatch):
    """They take turns; where a chunk ends depends on its own prompt alone, so each decodes as it does alone."""
    lm = golden_lm(block_length=8)
    lengths = [40, 3, 200, 64, 90, 17, 24]
    width = max(lengths)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for b, length in enumerate(lengths):
        input_ids[b, width - length :], mask[b, width - length :] = prompt(length, b)[0], 1
    options = {"max_new_tokens": 20, "draft_steps": 3, "prefill_chunk": 64}
    with monkeypatch.context() as patch:
        tokens = counted_forwards(lm, patch)
        out = freedave.generate(lm, input_ids, attention_mask=mask, **options)
    assert max(tokens) <= 64 + len(lengths) * 3 * 16 and tokens[0] <= 64 + len(lengths) * 8
    for b, length in enumerate(lengths):
        alone = freedave.generate(lm, prompt(length, b), check_lossless=True, **options)
        assert torch.equal(out.sequences[b, width:], alone.sequences[0, length:])
        assert torch.equal(out.step_map[b], alone.step_map[0])
        assert out.stats.accepted_by_sequence[b] == alone.stats.accepted_lengths


EXECUTORS = pytest.mark.parametrize("executor", ["planned", "graph"])


@EXECUTORS
def test_no_prompt_waits_for_ever(executor):
    """Short prompts that keep coming do not keep a long one from being stored."""
    lm = golden_lm(block_length=8)
    engine = Decoder(
        lm, resolve_settings(lm, 1, 4, draft_steps=4, prefill_chunk=16, executor=executor), slots=6, capacity=128
    )
    long, steps = engine.add(ids(96)), 0
    while not long.finished:
        while engine.free_slots:
            engine.add(ids(17))
        engine.launch()
        engine.poll()
        steps += 1
    assert steps <= 10


@EXECUTORS
def test_a_prompt_may_be_dropped_before_it_is_stored(executor):
    lm = golden_lm(block_length=8)
    engine = Decoder(
        lm, resolve_settings(lm, 1, 12, draft_steps=4, prefill_chunk=16, executor=executor), slots=2, capacity=128
    )
    kept, dropped = engine.add(ids(9)), engine.add(ids(100, 1))
    engine.launch()
    engine.drop(dropped)
    engine.poll()
    later = engine.add(ids(50, 2))
    engine.launch()
    engine.poll()
    engine.drop(later)
    last = engine.add(ids(33, 3))
    while engine.sequences:
        engine.launch()
        engine.poll()
    for sequence, length, seed in ((kept, 9, 0), (last, 33, 3)):
        alone = freedave.generate(lm, prompt(length, seed), 12, 4)
        assert sequence.generated(sequence.tokens) == alone.sequences[0, length:].tolist()
    assert engine.free_slots == 2


@pytest.mark.parametrize(
    ("family", "cache"), [("block_causal", "none"), ("full", "none"), ("full", "prefix"), ("full", "dual")]
)
@EXECUTORS
def test_what_computes_whole_sequences_is_not_divided(family, cache, executor):
    lm = golden_lm(family)
    options = {"block_length": 8, "cache": cache, "executor": executor}
    whole = freedave.generate(lm, prompt(60), 16, 4, prefill_chunk=None, **options)
    out = freedave.generate(lm, prompt(60), 16, 4, prefill_chunk=8, **options)
    assert torch.equal(out.forward_map, whole.forward_map) and torch.equal(out.sequences, whole.sequences)


@EXECUTORS
def test_a_prompt_of_one_chunk_takes_no_forward_of_its_own(executor):
    """512 tokens by default; static decoding takes one forward a step, the prompt included."""
    lm = golden_lm()
    lm.max_positions = None
    assert freedave.generate(lm, prompt(515), 9, 1, executor=executor).num_forwards == 9
    assert freedave.generate(lm, prompt(516), 8, 1, executor=executor).num_forwards == 9
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        freedave.generate(lm, prompt(8), 8, prefill_chunk=0)
