"""Several sequences at a time: each decodes as it would alone, at its own pace; and the step API that does it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MASK, golden_lm, golden_model, prompt

import freedave
from freedave.decode.decoder import Decoder
from freedave.decode.settings import SequenceSettings, resolve_settings
from freedave.forward import packed_forward, prediction

FAMILIES = [
    ("block_causal", "auto"),
    ("block_causal", "none"),
    *((family, cache) for family in ("full", "full_shifted") for cache in ("none", "prefix", "dual")),
]
EXECUTORS = ["planned", "graph"]
WAYS = pytest.mark.parametrize(
    ("executor", "drafting"),
    [(executor, drafting) for executor in EXECUTORS for drafting in ("recycled", "pooled", "pipelined")],
)


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths as one batch; the padding is token 0."""
    width = max(lengths)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for b, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(length)
        input_ids[b, where], mask[b, where] = prompt(length, seed=b)[0], 1
    return input_ids, mask


def test_example():
    """Prompts of different lengths, padded on the left as tokenizers do."""
    input_ids, attention_mask = padded([3, 9, 6], "left")
    out = freedave.generate(
        golden_lm(), input_ids, attention_mask=attention_mask, max_new_tokens=24, draft_steps=8, check_lossless=True
    )
    assert out.sequences.shape == (3, 9 + 24) and out.step_map.shape == (3, 24)
    assert torch.equal(out.sequences[:, :9], input_ids)  # as they were given
    assert out.num_forwards == max(out.stats.forwards_by_sequence) < out.static.num_forwards


@pytest.mark.parametrize(
    "options", [{}, {"tokens_per_step": 2}, {"threshold": 0.1}, {"order": "left_to_right"}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
@WAYS
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_each_sequence_decodes_as_it_does_alone(monkeypatch, family, cache, executor, drafting, side, options):
    """Tokens, steps, and even the forwards that committed them."""
    monkeypatch.setattr(packed_forward, "JOINED_KEYS", 0 if side == "left" else 128)
    lm = golden_lm(family)
    lengths = [5, 12, 1, 8]
    input_ids, attention_mask = padded(lengths, side)
    options = {
        "max_new_tokens": 18,
        "draft_steps": 5,
        "block_length": 8,
        "cache": cache,
        "executor": executor,
        "drafting": drafting,
    } | options
    out = freedave.generate(lm, input_ids, attention_mask=attention_mask, check_lossless=True, **options)
    for b, length in enumerate(lengths):
        alone = freedave.generate(lm, prompt(length, seed=b), **options)
        assert torch.equal(out.sequences[b, 12:], alone.sequences[0, length:])
        assert torch.equal(out.step_map[b], alone.step_map[0])
        assert torch.equal(out.forward_map[b], alone.forward_map[0])
        assert out.stats.accepted_by_sequence[b] == alone.stats.accepted_lengths


@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_logits_may_be_made_some_rows_at_a_time(monkeypatch, family, cache):
    lm = golden_lm(family)
    input_ids, attention_mask = padded([5, 12, 1], "left")
    options = {"block_length": 8, "cache": cache, "attention_mask": attention_mask}
    whole = freedave.generate(lm, input_ids, 24, 4, **options)
    project, rows = lm.project, []

    def counted(features):
        rows.append(len(features))
        return project(features)

    monkeypatch.setattr(lm, "project", counted)
    monkeypatch.setattr(prediction, "ROWS", 4)
    monkeypatch.setattr(prediction, "WHOLE_BYTES", 0)
    parts = freedave.generate(lm, input_ids, 24, 4, **options)
    assert max(rows) == 4 and len(rows) > whole.num_forwards
    assert torch.equal(parts.sequences, whole.sequences) and torch.equal(parts.step_map, whole.step_map)
    assert torch.equal(parts.forward_map, whole.forward_map)


@pytest.mark.parametrize(("family", "cache"), FAMILIES[1:])
def test_a_forward_may_be_several_calls_of_the_model(monkeypatch, family, cache):
    """Drafts that are many tokens are computed in groups, not much larger than what static decoding computes at a time."""
    lm = golden_lm(family)
    input_ids, attention_mask = padded([5, 12, 1], "left")
    packed_features, calls = lm.packed_features, []

    def counted(forward, rows):
        calls.append(forward.input_ids.shape[1])
        return packed_features(forward, rows)

    monkeypatch.setattr(lm, "packed_features", counted)

    def decode(draft_steps: int, call_tokens: int):
        monkeypatch.setattr("freedave.decode.planned_executor.CALL_TOKENS", call_tokens)
        calls.clear()
        options = {"block_length": 8, "cache": cache, "attention_mask": attention_mask}
        return freedave.generate(lm, input_ids, 24, draft_steps, **options), list(calls)

    static, static_calls = decode(1, 0)
    limit = max(static_calls) * 5 // 4
    assert len(static_calls) == static.num_forwards
    for draft_steps in (2, 8):
        (whole, whole_calls), (divided, divided_calls) = decode(draft_steps, 10**6), decode(draft_steps, 0)
        assert torch.equal(divided.sequences, static.sequences) and torch.equal(divided.step_map, static.step_map)
        assert torch.equal(divided.forward_map, whole.forward_map)
        assert len(whole_calls) == whole.num_forwards == divided.num_forwards
        assert sum(whole_calls) == sum(divided_calls) == divided.stats.positions_computed
        assert max(divided_calls) <= limit
    if cache != "dual":  # whose drafts are short
        assert max(whole_calls) > limit


@pytest.mark.parametrize("executor", EXECUTORS)
def test_commits_name_their_sequence(executor):
    input_ids, attention_mask = padded([4, 7], "right")
    commits = []
    out = freedave.generate(
        golden_lm(),
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=12,
        draft_steps=4,
        on_step=commits.append,
        executor=executor,
    )
    for b in range(2):
        mine = [commit for commit in commits if commit.sequence == b]
        assert [commit.steps for commit in mine] == out.stats.accepted_by_sequence[b]
        assert [commit.finished for commit in mine] == [False] * (len(mine) - 1) + [True]
        tokens = {
            position: token
            for commit in mine
            for position, token in zip(commit.positions, commit.token_ids, strict=True)
        }
        assert [tokens[i] for i in range(12)] == out.sequences[b, 7:].tolist()
    assert sum(out.stats.accepted_lengths) == sum(map(sum, out.stats.accepted_by_sequence))


def test_a_finished_sequence_costs_nothing():
    """One sequence ends after its first block: from then on, the batch computes what the other one needs alone."""
    lm = golden_lm()
    input_ids = torch.cat([prompt(8, 0), prompt(8, 1)])
    first, second = (freedave.generate(lm, row[None], max_new_tokens=32, draft_steps=4) for row in input_ids)
    end = int(first.sequences[0, 11])
    assert end not in second.sequences[0, 8:].view(8, 4)[:, -1]
    shapes = []
    hook = lm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        freedave.generate(lm, input_ids[1:], max_new_tokens=32, draft_steps=4)
        alone = shapes.copy()
        shapes.clear()
        out = freedave.generate(lm, input_ids, max_new_tokens=32, draft_steps=4, eos_token_id=end)
    finally:
        hook.remove()
    taken = out.stats.forwards_by_sequence[0]
    assert taken <= 4 and shapes[taken:] == alone[taken:]
    assert (out.sequences[0, 12:] == end).all() and torch.equal(out.sequences[1], second.sequences[0])


def test_one_call_of_each_op_a_step(monkeypatch):
    import freedave.decode.planned_executor as stepping

    calls = []
    for module, name in ((prediction, "predict_tokens"), (stepping, "draft_step")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k)
        )
    out = freedave.generate(golden_lm("full"), torch.cat([prompt(6), prompt(6, 1)]), 16, cache="dual", block_length=8)
    assert calls == ["predict_tokens", "draft_step"] * out.num_forwards


def test_one_read_a_step(monkeypatch):
    """Whatever waits for a device: one tensor says all that the host has to know."""
    reads = []
    for name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name, original=original: reads.append(name) or original(*a)
        )
    lm = golden_lm("full")
    driver = decoder(lm, slots=2, block_length=8, cache="dual")
    for start in (6, 9):
        driver.add(prompt(start)[0].tolist())
    reads.clear()
    steps = 0
    while driver.sequences:
        driver.launch()
        assert not reads
        driver.poll()
        assert reads == ["tolist"]
        reads.clear()
        steps += 1
    assert steps > 4


def decoder(lm, slots: int, capacity: int = 64, draft_steps: int = 4, **options) -> Decoder:
    settings = resolve_settings(lm, prompt_length=1, max_new_tokens=16, draft_steps=draft_steps, **options)
    return Decoder(lm, settings, slots=slots, capacity=capacity)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "dual"), ("full_shifted", "prefix")])
def test_an_engine_adds_and_drops_sequences_between_steps(family, cache, executor):
    """Five prompts through two slots, one of them dropped on the way; the slots are used again."""
    lm = golden_lm(family)
    prompts = [prompt(3 + 2 * b, seed=b) for b in range(5)]
    engine = decoder(lm, slots=2, cache=cache, block_length=8, executor=executor)
    waiting = [row[0].tolist() for row in prompts]
    running, finished, dropped = [], [], None
    while waiting or engine.sequences:
        while waiting and engine.free_slots:
            running.append(engine.add(waiting.pop(0)))
        engine.launch()
        committed = engine.poll()
        assert {commit.sequence for commit in committed} <= set(running)
        finished += [commit.sequence for commit in committed if commit.sequence.finished]
        if dropped is None and len(engine.sequences) == 2 and engine.forwards == 2:
            dropped = running[1]
            engine.drop(dropped)
    assert dropped is not None and len(finished) == 4
    for sequence in finished:
        alone = freedave.generate(
            lm, prompts[sequence.index], max_new_tokens=16, draft_steps=4, cache=cache, block_length=8
        )
        assert sequence.generated(sequence.tokens) == alone.sequences[0, sequence.prompt_length :].tolist()
        assert sequence.generated(sequence.step_map) == alone.step_map[0].tolist()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("draft_steps", [1, 6])
def test_prompts_join_while_others_finish_blocks(draft_steps, executor):
    """A prompt is computed in the forward whose keys and values another sequence keeps."""
    lm = golden_lm(block_length=4)
    engine = decoder(lm, slots=8, draft_steps=draft_steps, executor=executor)
    sequences = []
    while len(sequences) < 8 or engine.sequences:
        if len(sequences) < 8:
            n = len(sequences)
            sequences.append(engine.add(prompt(8 + n, seed=n)[0].tolist(), SequenceSettings(max_new_tokens=9 + n)))
        engine.launch()
        engine.poll()
    for seed, sequence in enumerate(sequences):
        alone = freedave.generate(lm, prompt(8 + seed, seed), max_new_tokens=9 + seed, draft_steps=draft_steps)
        assert sequence.generated(sequence.tokens) == alone.sequences[0, 8 + seed :].tolist()
        assert sequence.accepted_lengths == alone.stats.accepted_lengths


def test_the_step_api_says_what_is_wrong():
    engine = decoder(golden_lm(), slots=1)
    with pytest.raises(RuntimeError, match="nothing to decode"):
        engine.launch()
    with pytest.raises(ValueError, match=r"the prompt \(60 tokens\).*need 76 positions, but a slot has 64"):
        engine.add([1] * 60)
    sequence = engine.add([1, 2, 3])
    with pytest.raises(RuntimeError, match="every slot is taken"):
        engine.add([1])
    with pytest.raises(RuntimeError, match="no step is under way"):
        engine.poll()
    engine.launch()
    with pytest.raises(RuntimeError, match="a step is under way"):
        engine.launch()
    engine.poll()
    engine.drop(sequence)
    with pytest.raises(ValueError, match="not being decoded"):
        engine.drop(sequence)
    assert engine.free_slots == 1


def test_non_finite_logits_name_the_sequence():
    model = golden_model("block_causal")
    kept = model.model.embed_tokens.weight[7].clone()
    try:
        model.model.embed_tokens.weight.data[7] = float("nan")
        with pytest.raises(freedave.NonFiniteLogitsError, match="sequence 1: the logits of position"):
            freedave.generate(golden_lm(), torch.tensor([[1, 2, 3, 4], [1, 7, 3, 4]]), max_new_tokens=4, draft_steps=2)
    finally:
        model.model.embed_tokens.weight.data[7] = kept


@pytest.mark.parametrize(
    ("attention_mask", "message"),
    [
        (torch.ones(2, 3), r"the shape of input_ids \(2, 4\), got"),
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "prompt 1 has a hole"),
        (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "prompt 1 is empty"),
    ],
)
def test_argument_errors(attention_mask, message):
    with pytest.raises(ValueError, match=message):
        freedave.generate(golden_lm(), torch.ones(2, 4, dtype=torch.int64), 8, attention_mask=attention_mask)
    with pytest.raises(ValueError, match="prompt 1 holds the mask token"):
        freedave.generate(golden_lm(), torch.tensor([[1], [MASK]]), 8)
