"""The step API as an engine uses it: arrivals and cancellations at any time, and requests that nothing can be done with."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.decoder import Committed, Decoder
from freedave.decode.metrics import DecoderMetrics
from freedave.decode.sequence import Sequence
from freedave.decode.settings import SequenceSettings, resolve_settings
from freedave.forward import packed_forward
from freedave_kernels import DraftPool

FAMILIES = [("block_causal", "auto"), ("block_causal", "none"), ("full", "none"), ("full", "prefix"), ("full", "dual")]
EXECUTORS = ["planned", "graph"]


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
    options = {"draft_steps": 4, "block_length": 8} | options | {"executor": "planned"}
    alone = freedave.generate(lm, torch.tensor([start]), max_new_tokens, **options)
    assert sequence.finished and sequence.error is None
    assert sequence.generated(sequence.tokens) == alone.sequences[0, len(start) :].tolist()
    assert sequence.generated(sequence.step_map) == alone.step_map[0].tolist()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_requests_arrive_while_a_step_is_under_way(family, cache, executor):
    """They wait for the next launch."""
    lm = golden_lm(family)
    engine = engine_for(lm, slots=3, cache=cache, executor=executor)
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


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_requests_are_cancelled_while_a_step_is_under_way(family, cache, executor):
    """Nothing is committed of them, the others do not mind, and the slot is taken again."""
    lm = golden_lm(family)
    engine = engine_for(lm, slots=2, cache=cache, executor=executor)
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
    ([1.5], 8, TypeError, r"the prompt: a token id must be an integer, got 1\.5"),
    ("text", 8, TypeError, "the prompt: a token id must be an integer, got 'text'"),
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
        engine.add(start, SequenceSettings(new))
    assert engine.free_slots == 1 and engine.sequences == [healthy]
    finish(engine)
    expect_as_alone(lm, healthy, ids(6))


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"slots": 0}, ValueError, "Decoder: slots must be at least 1, got 0"),
        ({"slots": -1}, ValueError, "Decoder: slots must be at least 1, got -1"),
        ({"slots": 1.5}, TypeError, "Decoder: slots must be an int, got float"),
        ({"capacity": 0}, ValueError, "Decoder: capacity must be at least 1, got 0"),
        ({"capacity": 2**70}, ValueError, "Decoder: capacity must be at most 9223372036854775807, got"),
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_sizes_of_a_decoder(executor, sizes, error, message):
    with pytest.raises(error, match=message):
        engine_for(golden_lm(), executor=executor, **sizes)


def test_integers_of_other_libraries():
    """Wherever an int is expected; what only looks like one is refused."""
    lm, n = golden_lm(), np.int64
    expected = freedave.generate(lm, prompt(8), 16, 4, block_length=8)
    out = freedave.generate(lm, prompt(8), n(16), np.int32(4), n(8), n(1), lookahead_steps=torch.tensor(4))
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)
    engine = engine_for(lm)
    sequences = [engine.add(start, SequenceSettings(n(16))) for start in (np.array(ids(8)), prompt(8)[0])]
    finish(engine)
    for sequence in sequences:
        assert sequence.generated(sequence.tokens) == expected.sequences[0, 8:].tolist()
    with pytest.raises(TypeError, match="draft_steps must be an int, got bool"):
        freedave.generate(lm, prompt(8), 16, draft_steps=True)


BROKEN = 57


@pytest.fixture(params=[(*family, executor) for family in FAMILIES for executor in EXECUTORS], ids="-".join)
def broken_token(request, monkeypatch):
    """A model in which one token, that is in no answer, breaks what it is in; and how it is decoded."""
    family, cache, executor = request.param
    lm = golden_lm(family)
    weight = lm.model.model.embed_tokens.weight
    kept = weight[BROKEN].clone()
    weight.data[BROKEN] = float("nan")
    monkeypatch.setattr(packed_forward, "JOINED_KEYS", 8)
    yield lm, {"cache": cache, "block_length": 8, "draft_steps": 4, "executor": executor}
    weight.data[BROKEN] = kept


def test_a_broken_sequence_leaves_the_others_alone(broken_token):
    """It is reported and dropped; whoever gets its slot next knows nothing of it."""
    lm, options = broken_token
    engine = engine_for(lm, slots=3, **options)
    starts = [ids(20), [*ids(18, 1), BROKEN], ids(11, 2)]
    first, broken, third = map(engine.add, starts)
    engine.launch()
    commits = engine.poll()
    assert [commit.sequence for commit in commits] == [first, broken, third]
    assert broken.finished and broken.error.sequences == (1,) and broken.accepted_lengths == [0]
    assert "sequence 1: the logits of position" in str(broken.error)
    report = commits[1].describe()
    assert report.finished and report.positions == [] and report.steps == report.tokens == 0
    assert engine.sequences == [first, third] and engine.free_slots == 1
    later = engine.add(ids(7, 3))
    assert later.slot == broken.slot
    finish(engine)
    for sequence, start in ((first, starts[0]), (third, starts[2]), (later, ids(7, 3))):
        expect_as_alone(lm, sequence, start, **options)


def test_a_slot_forgets_a_request_that_was_cancelled_before_it_broke(broken_token):
    lm, options = broken_token
    engine = engine_for(lm, slots=2, **options)
    kept, broken = engine.add(ids(9)), engine.add([BROKEN, *ids(18, 1)])
    engine.launch()
    engine.drop(broken)
    assert len(engine.poll()) == 1 and broken.error is None
    later = engine.add(ids(5, 2))
    finish(engine)
    expect_as_alone(lm, kept, ids(9), **options)
    expect_as_alone(lm, later, ids(5, 2), **options)


def test_generate_names_the_broken_ones_and_keeps_the_others(broken_token):
    lm, options = broken_token
    healthy = torch.cat([prompt(12, seed) for seed in range(4)])
    input_ids, commits = healthy.clone(), []
    input_ids[1, 3] = input_ids[3, 11] = BROKEN
    with pytest.raises(freedave.NonFiniteLogitsError, match="^sequence 1: .*; the same happened to 3$") as caught:
        freedave.generate(lm, input_ids, 16, on_step=commits.append, check_lossless=True, **options)
    error, expected = caught.value, freedave.generate(lm, healthy[::2], 16, **options)
    assert error.sequences == (1, 3)
    assert torch.equal(error.output.sequences[::2], expected.sequences)
    assert torch.equal(error.output.step_map[::2], expected.step_map)
    assert (error.output.step_map[1::2] == -1).all() and (error.output.sequences[1::2, 12:] == MASK).all()
    assert error.output.stats.accepted_by_sequence == [
        expected.stats.accepted_by_sequence[0], [0], expected.stats.accepted_by_sequence[1], [0]
    ]  # fmt: skip
    assert {commit.sequence for commit in commits if commit.finished} == {0, 1, 2, 3}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_what_is_final_is_never_taken_back(family, cache, executor):
    """Handed on as it is reported, an answer's beginning grows into the answer, wherever an end token or a stop is found."""
    lm = golden_lm(family)
    free = freedave.generate(lm, prompt(6), 16, 4, block_length=8, cache=cache).sequences[0, 6:].tolist()
    ends = [{}, {"eos_token_id": free[9]}, {"eos_token_id": free[3]}, {"stop_sequences": [free[9:11]]}]
    for end in ends:
        engine = engine_for(lm, cache=cache, executor=executor, drafting="recycled", **end)
        sequence, streamed, reported = engine.add(ids(6)), [], {}
        while not sequence.finished:
            engine.launch()
            for commit in map(Committed.describe, engine.poll()):
                reported |= dict(zip(commit.positions, commit.token_ids, strict=True))
                assert len(streamed) <= commit.final <= commit.length
                streamed += [reported[position] for position in range(len(streamed), commit.final)]
        assert commit.final == commit.length == len(streamed)
        assert streamed == free[: len(streamed)] and (end == {}) == (len(streamed) == 16)
    assert len(ends) == 4


@pytest.mark.parametrize("executor", EXECUTORS)
def test_metrics(executor):
    lm = golden_lm()
    engine = engine_for(lm, slots=2, executor=executor)
    assert engine.metrics() == DecoderMetrics() and engine.metrics().tokens_per_forward == 0
    sequences = [engine.add(ids(6)), engine.add(ids(9, 1))]
    engine.launch()
    engine.poll()
    early = engine.metrics()
    engine.drop(sequences[1])
    finish(engine)
    metrics, kept = engine.metrics(), sequences[0]
    assert early.added == 2 and early.forwards == 1 and early.finished == early.dropped == 0  # it is no view
    assert (metrics.added, metrics.finished, metrics.dropped, metrics.failed) == (2, 1, 1, 0)
    assert metrics.forwards == engine.forwards == len(kept.accepted_lengths)
    lengths = kept.accepted_lengths + sequences[1].accepted_lengths
    assert metrics.accepted == Counter(lengths) and metrics.mean_accepted == sum(lengths) / len(lengths)
    assert metrics.tokens == kept.committed + sequences[1].committed
    assert metrics.tokens_per_forward == metrics.tokens / metrics.forwards
    assert metrics.positions_computed == engine.positions_computed > 0
    assert metrics.forward_seconds == engine.forward_seconds > 0


def test_metrics_count_what_broke(broken_token):
    lm, options = broken_token
    engine = engine_for(lm, slots=2, **options)
    sequences = [engine.add(ids(9)), engine.add([BROKEN, *ids(18, 1)])]
    finish(engine)
    metrics = engine.metrics()
    assert (metrics.added, metrics.finished, metrics.failed, metrics.dropped) == (2, 1, 1, 0)
    assert metrics.accepted.total() == len([steps for steps in sequences[0].accepted_lengths if steps])


OUT_OF_MEMORY = [
    ("planned", "recycled", (Sequence, "__init__")),
    ("planned", "pooled", (DraftPool, "clear")),
    ("graph", "recycled", (torch, "tensor")),
    ("graph", "pooled", (DraftPool, "clear")),  # the last thing that is done for a sequence
]


@pytest.mark.parametrize(("executor", "drafting", "where"), OUT_OF_MEMORY)
def test_running_out_of_memory_changes_nothing(monkeypatch, executor, drafting, where):
    """The others go on, and once there is memory the request is taken."""
    lm = golden_lm()
    engine = engine_for(lm, slots=2, executor=executor, drafting=drafting)
    first = engine.add(ids(6))
    engine.launch()
    engine.poll()
    before = engine.metrics()

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(*where, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            engine.add(ids(9, 1))
    assert engine.free_slots == 1 and engine.sequences == [first] and engine.metrics() == before
    engine.launch()
    assert [commit.sequence for commit in engine.poll()] == [first]
    later = engine.add(ids(9, 1))
    assert later.index == 1
    finish(engine)
    expect_as_alone(lm, first, ids(6))
    expect_as_alone(lm, later, ids(9, 1))


@pytest.mark.parametrize("drafting", ["recycled", "pooled", "pipelined"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual")])
def test_each_sequence_has_its_own_ends(family, cache, executor, drafting):
    """Beside others that end where the settings say, or nowhere."""
    lm = golden_lm(family)
    options = {"cache": cache, "drafting": drafting}
    free = freedave.generate(lm, prompt(6), 16, 4, block_length=8, cache=cache).sequences[0, 6:].tolist()
    engine = engine_for(lm, executor=executor, eos_token_id=free[11], **options)
    ends = [{"stop_sequences": [free[2:4]]}, {}, {"eos_token_id": [free[11], free[1]]}]
    ends += [{"eos_token_id": ()}, {"eos_token_id": free[5], "stop_sequences": ()}]
    sequences = []
    for end in ends:
        while not engine.free_slots:
            engine.launch()
            engine.poll()
        sequences.append(engine.add(ids(6), SequenceSettings(**end)))
    finish(engine)
    lengths = set()
    for sequence, end in zip(sequences, ends, strict=True):
        expect_as_alone(lm, sequence, ids(6), **({"eos_token_id": free[11], "cache": cache} | end))
        lengths.add(sequence.answer_end)
    assert len(lengths) > 1


@pytest.mark.parametrize("measure", ["prob", "log_odds"])
@pytest.mark.parametrize("drafting", ["nested", "recycled", "pooled", "pipelined"])
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_each_sequence_has_its_own_threshold(executor, family, cache, drafting, measure):
    """Beside others that have the settings' or none, whichever comes and goes."""
    lm = golden_lm(family)
    options = {"cache": cache, "drafting": drafting, "measure": measure}
    engine = engine_for(lm, slots=3, executor=executor, threshold=0.5, **options)
    thresholds = [None, 0.2, 2.0, 0.2, None, 0.8, 0.35]
    sequences = []
    for seed, threshold in enumerate(thresholds):
        while not engine.free_slots:
            engine.launch()
            engine.poll()
        sequences.append(engine.add(ids(5 + seed % 3, seed), SequenceSettings(threshold=threshold)))
    finish(engine)
    steps = Counter()
    for seed, (sequence, threshold) in enumerate(zip(sequences, thresholds, strict=True)):
        own = {None: 0.5, 2.0: None}.get(threshold, threshold)
        expect_as_alone(lm, sequence, ids(5 + seed % 3, seed), threshold=own, cache=cache, measure=measure)
        steps[threshold] = sequence.steps_taken
    assert steps[2.0] >= 16 > steps[0.2]


BAD_THRESHOLDS = [
    ({"executor": "planned"}, "high", TypeError, "threshold must be a float, got str"),
    ({"executor": "planned"}, float("nan"), ValueError, "threshold must be a number, got nan"),
    ({"executor": "planned", "measure": "margin"}, 0.5, ValueError, "threshold is a probability: it needs measure="),
    ({"executor": "graph"}, float("nan"), ValueError, "threshold must be a number, got nan"),
]


@pytest.mark.parametrize(("options", "threshold", "error", "message"), BAD_THRESHOLDS, ids=str)
def test_bad_thresholds_of_a_sequence(options, threshold, error, message):
    engine = engine_for(golden_lm(), slots=1, **options)
    with pytest.raises(error, match=message):
        engine.add(ids(6), SequenceSettings(threshold=threshold))
    assert engine.free_slots == 1 and engine.metrics() == DecoderMetrics()


@pytest.mark.parametrize("given", [64, {"max_new_tokens": 64}], ids=str)
def test_settings_of_another_kind(given):
    """Such as the length itself, where `generate` takes it."""
    engine = engine_for(golden_lm(), slots=1)
    with pytest.raises(TypeError, match=f"Decoder.add: settings must be SequenceSettings, got {type(given).__name__}"):
        engine.add(ids(6), given)
    assert engine.free_slots == 1 and engine.metrics() == DecoderMetrics()


BAD_ENDS = [
    ({"eos_token_id": 64}, ValueError, "eos_token_id 64 is outside the model's vocabulary of 64 tokens"),
    ({"stop_sequences": [[]]}, ValueError, "a stop sequence is empty"),
    ({"stop_sequences": [[1.5]]}, TypeError, r"a token id must be an integer, got 1\.5"),
]


@pytest.mark.parametrize(("ends", "error", "message"), BAD_ENDS, ids=str)
def test_bad_ends_of_a_sequence(ends, error, message):
    engine = engine_for(golden_lm(), slots=1)
    with pytest.raises(error, match=message):
        engine.add(ids(6), SequenceSettings(**ends))
    assert engine.free_slots == 1 and engine.metrics() == DecoderMetrics()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_a_model_that_predicts_the_mask(family, cache, executor):
    """The mask is no token: the likeliest other one is. Where there is no other one, decoding ends, and says where."""
    lm = golden_lm(family)
    options = {"cache": cache, "block_length": 8, "draft_steps": 4, "executor": executor}
    expected = freedave.generate(lm, prompt(8), 16, **options)
    others = torch.arange(64) != MASK
    likes_masks, knows_nothing_else = (torch.where(others, *values) for values in ((0.0, 50.0), (-torch.inf, 0.0)))
    for bias in (likes_masks, knows_nothing_else):
        hook = lm.model.lm_head.register_forward_hook(lambda _, __, logits, bias=bias: logits + bias)
        try:
            if bias is likes_masks:
                out = freedave.generate(lm, prompt(8), 16, **options)
                assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)
            else:
                with pytest.raises(freedave.NonFiniteLogitsError, match="sequence 0: the logits of position 8 are not"):
                    freedave.generate(lm, prompt(8), 16, **options)
        finally:
            hook.remove()
