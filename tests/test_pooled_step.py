"""draft_step with drafting="pooled" and "pipelined" (the op pooled_step): the contract, on every backend that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import BACKENDS, on_backend, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import CONFIDENCES, INF, MASK, Constants, alone, choose, generator, predictions
from test_draft_step import LONG_RULES
from toy_models import Decoded, Toy, decode

import freedave_kernels as fk
from freedave_kernels import registry
from freedave_kernels.contract import RULES

M = MASK
HERE = [name for name in BACKENDS if name in registry.backends_with("pooled_step")]
POOLED = ["pooled", "pipelined"]


@pytest.fixture(params=HERE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_backend(request.param)


@pytest.fixture(params=[name for name in HERE if name != "reference"])
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from on_backend(request.param)


def decode_toy(model: Toy, length: int, draft_steps: int, **drafting: Any) -> tuple[list[int], list[int], int]:
    """Tokens, the static step of each, and the number of forwards."""
    drafts, num_drafts = torch.full((1, 1, length), M), torch.tensor([1])
    step_map, forwards = torch.full((1, length), -1), 0
    while True:
        forwards += 1
        predicted = [model(tuple(draft)) for draft in drafts[0].tolist()]
        token_ids = torch.tensor([[tokens for tokens, _ in predicted]])
        confidence = torch.tensor([[sure for _, sure in predicted]])
        steps = step_map.amax(-1) + 1
        step = fk.draft_step(
            drafts, token_ids, confidence, num_drafts, M, draft_steps, block_length=8, step=steps, **drafting
        )
        step_map = torch.maximum(step_map, step.step_map)
        drafts, num_drafts = step.drafts, step.num_drafts
        if step.finished.all():
            return drafts[0, 0].tolist(), step_map[0].tolist(), forwards


@pytest.mark.parametrize("drafting", POOLED)
def test_example(backend, drafting):
    """The tokens of static decoding, each at its static step, in fewer forwards. (Pipelining believes in confidences: these
    are made up, so that it drafts worse than it does with a real model.)"""
    static, pooled, recycled = 0, 0, 0
    seeds = range(0, 8, unless_interpreted(backend, 1, 4))
    for seed in seeds:
        tokens, steps, forwards = decode_toy(Toy(seed, 8), 32, 1)
        pool = fk.draft_pool(slots=1, states=32, length=32)
        ours = decode_toy(Toy(seed, 8), 32, 8, drafting=drafting, pool=pool)
        assert ours[:2] == (tokens, steps)
        static, pooled = static + forwards, pooled + ours[2]
        recycled += decode_toy(Toy(seed, 8), 32, 8)[2]
    assert static == len(seeds) * 32
    assert pooled < {"pooled": recycled, "pipelined": static}[drafting] <= static


def swap(second: float = 0.6) -> dict[str, Any]:
    """The drafts fill position 1 and then 2. Static decoding fills 2 first, where `second` is below 0.8."""
    drafts = torch.tensor([[[M, M, M, M], [M, 2, M, M], [M, 2, 3, M]]])
    token_ids = torch.where(drafts == M, torch.tensor([1, 2, 3, 4]), drafts)
    sure = torch.tensor([[0.3, second, 0.8, 0.5], [0.3, 0.9, 0.85, 0.65], [0.3, 0.9, 0.9, 0.7]])
    confidence = torch.where(drafts == M, sure, -INF)
    return {
        "drafts": drafts,
        "token_ids": token_ids,
        "confidence": confidence,
        "num_drafts": torch.tensor([3]),
        "mask_token_id": M,
        "draft_steps": 2,
        "drafting": "pooled",
        "pool": fk.draft_pool(1, 4, 4),
    }


def test_a_swap_that_rejoins(backend):
    """Decoding comes to where an old draft stands: its forward was not in vain."""
    call = swap()
    step = fk.draft_step(**call)
    assert step.accepted.tolist() == [0] and step.steps.tolist() == [1]
    # [M, M, 3, M] is new. After it, [M, 2, 3, M] is known, and costs nothing; what it leads to is the next draft.
    assert step.drafts[0].tolist() == [[M, M, 3, M], [M, 2, 3, 4]] and step.num_drafts.tolist() == [2]
    # Only what still agrees with [M, M, 3, M] is kept.
    pool = call["pool"]
    assert pool.states[pool.age > 0].tolist() == [[M, 2, 3, M]]

    drafts = step.drafts
    token_ids = torch.where(drafts == M, torch.tensor([1, 2, 3, 4]), drafts)
    confidence = torch.where(drafts == M, torch.tensor([0.4, 0.7, 0.8, 0.6]), -INF)
    step = fk.draft_step(drafts, token_ids, confidence, step.num_drafts, M, 2, drafting="pooled", pool=pool)
    assert step.steps.tolist() == [3] and step.step_map.tolist() == [[2, 0, -1, 1]]
    assert step.accepted.tolist() == [1] and step.finished.tolist() == [1]

    alone = {"drafting": "pooled", "pool": swap()["pool"]}
    fk.draft_step(**swap() | alone)
    step = fk.draft_step(drafts[:, :1], token_ids[:, :1], confidence[:, :1], torch.tensor([1]), M, 2, **alone)
    assert step.steps.tolist() == [2] and step.drafts[0, 0].tolist() == [M, 2, 3, 4]
    assert step.accepted.tolist() == [0]  # the last input draft: [M, 2, 3, M] was forwarded in another call
    assert step.confidence.tolist() == [pytest.approx([0.3, -INF, -INF, 0.7])]  # of [M, 2, 3, M], as the pool has it


def test_drafts_are_foreseen_by_the_nearest_state(backend):
    """Each position as predicted where the fewest positions differ; else by the next nearest."""
    call = swap() | {"draft_steps": 3}
    call["pool"].states[0, 0] = torch.tensor([M, M, 3, 5])  # as near to [M, M, 3, 4] as [M, M, 3, M] is, and older
    call["pool"].token_ids[0, 0] = torch.tensor([7, 6, 3, 5])
    call["pool"].confidence[0, 0] = torch.tensor([0.1, 0.2, -INF, -INF])
    call["pool"].age[0, 0], call["pool"].computed[0, 0] = 1, 4
    call["drafts"] = torch.tensor([[[M, M, M, M], [M, 2, 3, M], [M, M, M, M]]])
    call["token_ids"] = torch.tensor([[[1, 2, 3, 4], [8, 2, 3, 4], [1, 2, 3, 4]]])
    call["confidence"] = torch.tensor([[[0.4, 0.5, 0.8, 0.6], [0.9, -INF, -INF, 0.3], [0.4, 0.5, 0.8, 0.6]]])
    call["num_drafts"] = torch.tensor([2])
    step = fk.draft_step(**call)
    # At [M, M, 3, M] three states are as near: the pool's, which is the oldest, has no prediction for the last position.
    # It is draft 0's, which has the highest confidence. Then the pool's is the nearest for the others.
    assert step.drafts[0].tolist() == [[M, M, 3, M], [M, M, 3, 4], [M, 6, 3, 4]]


def measured(**other: torch.Tensor) -> list[int]:
    """Static decoding fills position 1, where the drafts fill 0, 2 and maybe more; it may come to where [M, 2, 3, M, M] has
    foreseen position 3 before 4, not knowing of position 0. That this changes their order, drafts 0 and 1 have measured.

    Returns the last draft, which fills one of the two.
    """
    pool = fk.draft_pool(1, 4, 5)
    pool.states[0, 0] = torch.tensor([M, 2, 3, M, M])
    pool.token_ids[0, 0] = torch.tensor([1, 2, 3, 4, 5])
    pool.confidence[0, 0] = torch.tensor([0.9, -INF, -INF, 0.5, 0.4])
    pool.age[0, 0], pool.computed[0, 0] = 1, 5
    call = {
        "drafts": torch.tensor([[M, M, M, M, M], [1, M, M, M, M]]),
        "confidence": torch.tensor([[0.7, 0.95, 0.3, 0.6, 0.2], [0.0, 0.9, 0.8, 0.3, 0.3]]),
        "num_drafts": torch.tensor(2),
    } | other
    drafts, confidence, num_drafts = (tensor[None] for tensor in call.values())
    token_ids = torch.where(drafts == M, torch.tensor([1, 2, 3, 4, 5]), drafts)
    step = fk.draft_step(drafts, token_ids, confidence, num_drafts, M, 4, drafting="pooled", pool=pool)
    assert step.drafts[0, :3].tolist() == [[M, 2, M, M, M], [1, 2, M, M, M], [1, 2, 3, M, M]]
    return step.drafts[0, 3].tolist()


def test_measured_effects(backend):
    """What a draft fills beyond the draft before it changes the confidences elsewhere: so it does, it is expected, at a state
    near which it was not filled."""
    assert measured() == [1, 2, 3, M, 5]
    # Nothing was measured where one of the two has no confidence, nor by a draft that does not count.
    for broken in (-INF, float("nan")):
        for draft in (0, 1):
            sure = torch.tensor([[0.7, 0.95, 0.3, 0.6, 0.2], [0.0, 0.9, 0.8, 0.3, 0.3]])
            sure[draft, 3:] = broken
            assert measured(confidence=sure) == [1, 2, 3, 4, M]
    # Nor by drafts that differ in two positions, or in what they hold.
    chain = torch.tensor([[M, M, M, M, M], [1, M, M, 6, M], [1, M, M, M, M]])
    sure = torch.tensor([[0.7, 0.95, 0.3, 0.6, 0.2], [0.0, 0.0, 0.0, 0.0, 0.9], [0.0, 0.9, 0.8, 0.3, 0.3]])
    assert measured(drafts=chain, confidence=sure, num_drafts=torch.tensor(3)) == [1, 2, 3, 4, M]


def test_ties_go_to_the_earlier_draft(backend):
    """Nobody doubts anything here, so a later block is as good as this one, and its second draft as the second here."""
    drafts = torch.full((1, 1, 6), M)
    token_ids, confidence = torch.tensor([[[0, 1, 2, 3, 4, 5]]]), torch.ones(1, 1, 6)
    pool = fk.draft_pool(1, 4, 6)
    step = fk.draft_step(
        drafts, token_ids, confidence, torch.tensor([1]), M, 4, block_length=2, drafting="pipelined", pool=pool
    )
    assert step.drafts[0].tolist() == [[0, M, M, M, M, M], [0, 1, M, M, M, M], [0, 1, 2, M, M, M], [0, 1, 2, 3, M, M]]


@pytest.mark.parametrize(
    ("values", "later"),
    [
        ((0.9853, 0.9971, 0.9773442149162292), True),  # the fourth power is two float32 numbers above 0.85
        (
            (0.9890, 0.9894, 0.9812654852867126),
            False,
        ),  # and here below, both the other way round if multiplied backwards
    ],
)
def test_a_later_block_is_worth_what_the_values_before_it_are(backend, values, later):
    """Of the drafts after the certain one, that with the highest score: 0.85 for each draft before it, and where a block
    begins, the fourth power of the values' probability, a product in ascending order of positions. Nothing counts above 1.
    """
    drafts = torch.full((1, 1, 13), M)
    confidence = torch.tensor([[[2.0] * 3 + [*values] + [2.0] * 6 + [0.5]]])
    call = (drafts, torch.arange(13).view(1, 1, 13) % M, confidence, torch.tensor([1]), M, 2)
    named = {"tokens_per_step": 3, "order": "left_to_right", "block_length": 12, "drafting": "pipelined"}
    step = fk.draft_step(*call, pool=fk.draft_pool(1, 4, 13), **named)
    assert (step.drafts != M).sum(-1).tolist() == [[3, 12 if later else 6]]


def test_a_state_that_was_known_once_is_forwarded_again(backend):
    """The next drafts go on from what is kept alone: in the next call, nothing else would be met."""
    call = swap() | {"pool": fk.draft_pool(1, 1, 4)}
    call["drafts"][0, 1], call["drafts"][0, 2] = torch.tensor([M, 2, 3, M]), torch.tensor([M, 2, 3, 4])
    call["token_ids"][0] = torch.tensor([1, 2, 3, 4])
    assert fk.draft_step(**call).drafts[0].tolist() == [[M, M, 3, M], [M, 2, 3, M]]
    assert call["pool"].states.tolist() == [[[M, 2, 3, 4]]]


def test_a_block_that_an_old_state_finished_was_not_forwarded_complete(backend):
    """In this call: its keys are not final."""
    pool = fk.draft_pool(1, 4, 4)
    pool.states[0, 0] = torch.tensor([1, 2, M, M])
    pool.token_ids[0, 0] = torch.tensor([1, 2, 3, 4])
    pool.confidence[0, 0] = torch.tensor([-INF, -INF, 0.9, 0.5])
    pool.age[0, 0], pool.computed[0, 0] = 1, 4
    drafts, token_ids = torch.tensor([[[1, M, M, M]]]), torch.tensor([[[1, 2, 3, 4]]])
    confidence = torch.tensor([[[-INF, 0.9, 0.8, 0.7]]])
    step = fk.draft_step(
        drafts, token_ids, confidence, torch.tensor([1]), M, 2, block_length=2, drafting="pooled", pool=pool
    )
    assert step.steps.tolist() == [2] and step.drafts[0, 0].tolist() == [1, 2, 3, M]
    assert step.accepted.tolist() == [0] and step.prefix_length.tolist() == [0]


@st.composite
def decodes(draw: st.DrawFn) -> dict[str, Any]:
    constants = Constants(draw)
    block_length = draw(st.sampled_from([None, 1, 2, 3, 4, 8]))
    blocks = draw(st.integers(1, 4))
    length = draw(st.integers(1, 20)) if block_length is None else blocks * block_length
    window = None if block_length is None else draw(st.integers(1, blocks)) * block_length
    seed = draw(st.integers(0, 2**20))
    count = draw(st.integers(1, 3))
    random = generator(seed)
    prompt = draw(st.integers(0, length - 1))
    states = torch.randint(M, (count, length), generator=random)
    states[:, prompt:] = M
    share = draw(st.sampled_from([0.0, 0.0, 0.02, 0.1]))
    noise = draw(st.sampled_from([0.0, 0.1, 0.4]))
    bounded = constants.one_of([False, False, True, True, True])
    threshold = draw(st.sampled_from([0.0, 0.6, 2.0])) if bounded else None
    rule = constants.one_of(RULES) if bounded else "threshold"
    entropies = rule == "entropy_bound"
    case = {
        "models": [Toy(seed + n, block_length or length, noise, share, entropies) for n in range(count)],
        "states": states.tolist(),
        "draft_steps": draw(st.integers(1, 9)),
        "drafting": constants.one_of(POOLED),
        "answer_start": prompt,
        "window": window,
        "entries": constants.one_of([1, 2, 5, 16, 40]),
        "slots": draw(st.permutations(range(count + 1)))[:count],
        "own_block": draw(st.booleans()),
        "tokens_per_step": draw(st.sampled_from([1, 1, 2, 3])),
        "threshold": threshold,
        "rule": rule,
        "order": constants.one_of(["confidence", "confidence", "left_to_right"]),
        "block_length": block_length,
        "eos_token_id": draw(st.sampled_from([0, 3])) if constants.one_of([False, True, True]) else None,
    }
    return constants.of_each(case, count)


def static(case: dict[str, Any]) -> list[Decoded]:
    """By the op that is tested elsewhere, over the whole window."""
    named = (
        "models",
        "states",
        "answer_start",
        "tokens_per_step",
        "threshold",
        "rule",
        "order",
        "block_length",
        "eos_token_id",
    )
    return decode(draft_steps=1, drafting="nested", **{name: case[name] for name in named})


@given(case=decodes())
@settings(max_examples=400)
def test_lossless(backend, case):
    """Tokens and steps of static decoding, whatever is drafted, kept or computed, and no more forwards than steps."""
    for ours, theirs in zip(decode(**case), static(case), strict=True):
        assert ours.result == theirs.result and ours.steps == theirs.steps
        assert ours.forwards <= max(ours.steps + ours.stuck, 1)


def both(*arguments: Any, **named: Any) -> fk.DraftStep:
    """A call on the backend in force and on the oracle: equal in every bit, the pool too."""
    pool = named["pool"]
    copy = dataclasses.replace(pool, memory=pool.memory.clone())
    step = fk.draft_step(*arguments, **named)
    with fk.use_backend("reference"):
        record = fk.draft_step(*arguments, **named | {"pool": copy}).record
    torch.testing.assert_close(step.counters, record[:, step.layout.counters], rtol=0, atol=0)
    end = step.layout.confidence.start
    floats = [one[:, end:].view(torch.float32) for one in (step.record, record)]  # with what is behind an odd length
    torch.testing.assert_close(*floats, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(step.record[:, :end], record[:, :end])
    for name in ("age", "computed", "start", "states", "token_ids", "confidence"):
        torch.testing.assert_close(
            getattr(pool, name),
            getattr(copy, name),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda text, name=name: name + text,
        )
    return step


@given(case=decodes())
@settings(max_examples=800)
def test_agrees_with_the_oracle(native_backend, case):
    """In every call of whole decodes, and in what the pool holds after it."""
    decode(**case, draft_step=both)


@given(case=decodes())
@settings(max_examples=60)
def test_a_sequence_does_not_depend_on_its_batch(backend, case):
    """Nor on its slot."""
    together = decode(**case)
    for n, ours in enumerate(together):
        own = {"models": [case["models"][n]], "states": [case["states"][n]], "slots": [0]}
        assert decode(**alone(case, n) | own) == [ours]


@given(prediction=st.data(), drafting=st.sampled_from(POOLED), block_length=st.sampled_from([None, 1, 3, 8]))
@settings(max_examples=200)
def test_a_record_is_that_of_other_draftings(backend, prediction, drafting, block_length):
    """Where nothing is in the pool, and one draft is active and the next."""
    state = prediction.draw(predictions(Constants(prediction.draw)))
    rows = [x[:, None].repeat(1, 2, 1) for x in (state.input_ids, state.token_ids, state.confidence)]
    batch, _, length = rows[0].shape
    random = generator(length)
    call = (*rows, torch.ones(batch, dtype=torch.int32), M, 1)
    named = {
        "block_length": block_length,
        "eos_token_id": 3,
        "step": torch.randint(9, (batch,), generator=random),
        "answer_start": torch.randint(-4, 9, (batch,), generator=random),
    }
    ours = fk.draft_step(*call, drafting=drafting, pool=fk.draft_pool(batch, 3, length + 2), **named)
    theirs = fk.draft_step(*call, drafting="nested", **named)
    end = ours.layout.confidence.start
    assert torch.equal(ours.record[:, :end], theirs.record[:, :end])
    torch.testing.assert_close(ours.confidence, theirs.confidence, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("states", [1, 2, 3, 5])
def test_the_oldest_go(backend, states):
    """A draft agrees with the committed state, and an entry from before."""
    call = swap(second=0.9) | {"pool": fk.draft_pool(1, states, 4)}
    call["token_ids"][0, 1] = torch.tensor([1, 2, 5, 4])  # static decoding comes through draft 1 and to [M, 2, 5, M]
    pool = call["pool"]
    pool.states[0, 0], pool.age[0, 0], pool.computed[0, 0] = torch.tensor([M, 2, 5, 6]), 7, 4
    call["drafts"][0, 2] = torch.tensor([M, 2, 5, 4])
    assert fk.draft_step(**call).steps.tolist() == [2]
    kept = sorted(zip(pool.age[0].tolist(), pool.states[0].tolist(), strict=True), reverse=True)
    everything = [(10, [M, 2, 5, 4]), (7, [M, 2, 5, 6])]
    assert [one for one in kept if one[0] > 0] == everything[:states]


def test_forget(backend):
    """What was known in another context is neither met nor kept."""
    call = swap()
    fk.draft_step(**call)
    pool = call["pool"]
    assert pool.age.amax() > 0
    drafts = torch.tensor([[[M, M, 3, M]]])
    token_ids, confidence = torch.tensor([[[1, 2, 3, 4]]]), torch.tensor([[[0.3, 0.7, -INF, 0.6]]])
    named = {"drafting": "pooled", "pool": pool, "forget": torch.tensor([True])}
    step = fk.draft_step(drafts, token_ids, confidence, torch.tensor([1]), M, 2, **named)
    assert step.steps.tolist() == [1] and step.drafts[0, 0].tolist() == [M, 2, 3, M]
    assert (pool.age > 0).sum() == 0


def test_a_window_elsewhere_is_another_sequence(backend):
    for start in (-1, 4):
        call = swap()
        fk.draft_step(**call)
        fk.draft_step(**call | {"window_start": torch.tensor([start]), "num_drafts": torch.tensor([1])})
        assert (call["pool"].age > 0).sum() == 0
        assert call["pool"].start.tolist() == [start]


def test_clear():
    pool = fk.draft_pool(2, 3, 4)
    pool.memory.fill_(1)
    pool.clear(1)
    assert pool.age.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert pool.start.tolist() == [1, 0]


def test_a_draft_whose_block_was_not_computed(backend):
    """Draft 0 must be; another one is not met, and forwarded again."""
    call = swap(second=0.9)
    step = fk.draft_step(**call | {"computed_length": torch.tensor([[4, 3, 4]])})
    assert step.steps.tolist() == [1] and step.drafts[0, 0].tolist() == [M, 2, M, M]
    step = fk.draft_step(**swap() | {"computed_length": torch.tensor([[3, 4, 4]])})
    assert step.steps.tolist() == [0] and step.num_drafts.tolist() == [0] and step.non_finite.tolist() == [3]


def test_large_batches(native_backend):
    """Enough work to be split over threads, in windows that end anywhere in the columns."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        random = generator(0)
        drafts = torch.where(torch.rand(48, 8, 64, generator=random) < 0.7, M, 1).cummin(1).values
        token_ids = torch.where(drafts == M, torch.randint(M, drafts.shape, generator=random), drafts)
        confidence = torch.where(drafts == M, torch.rand(drafts.shape, generator=random), -INF)
        pool = fk.draft_pool(48, 20, 70)
        for start in (5, 21):
            named = {
                "drafting": "pipelined",
                "pool": pool,
                "window_start": torch.full((48,), start),
                "block_length": 16,
            }
            both(drafts, token_ids, confidence, torch.full((48,), 8), M, 16, **named)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("length", "columns", "count", "entries", "block_length"),
    [(33, 40, 32, 64, 8), (40, 45, 8, 16, 8), (64, 64, 9, 5, None), (200, 230, 32, 64, 25), (1024, 1024, 32, 64, 96)],
)
@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
@pytest.mark.parametrize("drafting", POOLED)
def test_long_windows_and_many_drafts(native_backend, length, columns, count, entries, block_length, rule, drafting):
    """Windows of several warps, up to the most that the GPU kernels serve, and pools that run over."""
    random = generator(length)
    first = torch.where(torch.rand(2, 1, length, generator=random) < (0.9 if length < 512 else 0.1), M, 1)
    tokens, sure = torch.randint(M, first.shape, generator=random), choose(CONFIDENCES, first.shape, random)
    named: dict[str, Any] = dict(zip(("tokens_per_step", "threshold", "order", "rule"), rule, strict=True))
    named |= {"block_length": block_length, "drafting": drafting}
    named["pool"] = pool = fk.draft_pool(2, entries, columns)
    # States that decoding may come through, from full knowledge of what is predicted to none.
    sure_from = torch.rand(2, entries, 1, generator=random)
    known = torch.where((first == M) & (sure >= sure_from), tokens, first)
    for name, value, beyond in (("states", known, M), ("token_ids", tokens, M), ("confidence", sure, -INF)):
        getattr(pool, name)[:] = beyond
        getattr(pool, name)[..., :length] = value
    pool.confidence[..., :length][known != M] = -INF
    pool.age[:], pool.computed[:] = torch.randperm(entries, generator=random) + 1, length
    drafts, num_drafts = first.repeat(1, count, 1), torch.tensor([1, 1])
    for start in (0, 0, 3, 3):
        noisy = torch.rand(drafts.shape, generator=random) < 0.05
        token_ids = torch.where(noisy, torch.randint(M, drafts.shape, generator=random), tokens)
        confidence = torch.where(noisy, torch.rand(drafts.shape, generator=random), sure)
        step = both(
            drafts, torch.where(drafts == M, token_ids, drafts), torch.where(drafts == M, confidence, -INF),
            num_drafts, M, count, window_start=torch.tensor([start, start]), **named,
        )  # fmt: skip
        drafts, num_drafts = step.drafts, step.num_drafts
        if columns > length and start == 0:  # as if the window had slid, over whatever is there
            drafts = torch.cat([drafts[..., 3:], torch.full((2, count, 3), M)], -1)


def test_strided_inputs(backend):
    call = swap()
    expected = fk.draft_step(**call)
    wide = swap()
    for name in ("drafts", "token_ids", "confidence"):
        wide[name] = torch.stack([wide[name], wide[name]], -1)[..., 0]
    assert torch.equal(fk.draft_step(**wide).record, expected.record)
    assert torch.equal(wide["pool"].memory, call["pool"].memory)


def test_nothing_to_do(backend):
    empty = torch.zeros(0, 2, 4, dtype=torch.int64)
    call = (empty, empty, empty.float(), torch.zeros(0, dtype=torch.int64), M, 3)
    assert fk.draft_step(*call, drafting="pooled", pool=fk.draft_pool(0, 2, 4)).record.shape == (0, 11 + 5 * 4 + 2)


def test_opcheck_and_compile():
    call = swap()
    pool = call["pool"]
    op = torch.ops.freedave.pooled_step.default
    first = [call[name] for name in ("drafts", "token_ids", "confidence", "num_drafts")]
    torch.library.opcheck(op, (*first, pool.memory, 4, 4, M, 3))
    one = torch.tensor([1])
    rest = (0, one, one, one, one, torch.tensor([[4, 4, 4]]), one * 0, one > 0)
    for rule in ((2, None, 0.5, None, "strict"), (1, one, None, torch.tensor([0.5]), "factor")):
        call = (*first, pool.memory, 4, 4, M, 3, *rule, "left_to_right", 2, "pipelined", *rest)
        torch.library.opcheck(op, call)

    def decode(drafts, token_ids, confidence, num_drafts, memory):
        step = fk.draft_step(
            drafts, token_ids, confidence, num_drafts, M, 2, drafting="pooled", pool=fk.DraftPool(memory, 4, 4)
        )
        return step.drafts, step.accepted + 1

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    pools = [fk.draft_pool(1, 4, 4) for _ in range(2)]
    for ours, plain in zip(compiled(*first, pools[0].memory), decode(*first, pools[1].memory), strict=True):
        assert torch.equal(ours, plain)
    assert torch.equal(pools[0].memory, pools[1].memory)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drafts": torch.zeros(1, 3, 4)}, TypeError, "drafts must be int64, got float32"),
        ({"draft_steps": 0}, ValueError, "draft_steps must be at least 1, got 0"),
        ({"order": "down"}, ValueError, "order must be one of"),
        ({"match": "subset"}, ValueError, "match must be 'exact' with drafting='pooled', got 'subset'"),
        ({"pool": None}, TypeError, r"pool must be a DraftPool .*'pooled' \(draft_pool makes one\), got NoneType"),
        ({"drafting": "recycled"}, ValueError, "pool is for drafting='pooled' or 'pipelined', got 'recycled'"),
        (
            {"drafting": "nested", "pool": None, "forget": torch.tensor([True])},
            ValueError,
            "forget is for drafting='pooled' or 'pipelined', got 'nested'",
        ),
        ({"pool": fk.draft_pool(1, 4, 3)}, ValueError, "pool must be for windows of 4 positions at least, got 3"),
        ({"pool": fk.draft_pool(2, 4, 4)}, ValueError, "pool must have a slot for each of 1 sequences, got 2"),
        ({"pool": fk.draft_pool(1, 4, 4, "meta")}, ValueError, elsewhere("pool", "drafts")),
        ({"threshold": torch.tensor([0.5, 0.5])}, ValueError, r"threshold must have shape \(1,\)"),
        ({"tokens_per_step": torch.tensor([1.5])}, TypeError, "tokens_per_step must be int32 or int64, got float32"),
        ({"eos_token_id": torch.tensor([1, 2])}, ValueError, r"eos_token_id must have shape \(1,\)"),
        ({"window_start": torch.tensor([1.0])}, TypeError, "window_start must be int64, got float32"),
        ({"window_start": torch.tensor([1, 2])}, ValueError, r"window_start must have shape \(1,\)"),
        ({"computed_length": torch.tensor([4])}, ValueError, r"computed_length must have shape \(1, 3\)"),
        ({"slots": torch.tensor([True])}, TypeError, "slots must be int32 or int64, got bool"),
        ({"forget": torch.tensor([1])}, TypeError, "forget must be bool, got int64"),
        ({"forget": torch.tensor([True, False])}, ValueError, r"forget must have shape \(1,\)"),
        ({"slots": torch.tensor([0]).to("meta")}, ValueError, elsewhere("slots", "drafts")),
    ],
    ids=str,
)  # fmt: skip
def test_argument_errors(backend, change, error, message):
    call = swap() | change
    pool = call["pool"]
    before = pool.memory.clone() if pool else None
    with pytest.raises(error, match="draft_step: " + message):
        fk.draft_step(**call)
    assert pool is None or before.is_meta or torch.equal(pool.memory, before)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((1, 0, 4), ValueError, "states must be at least 1, got 0"),
        ((1, 1, 0), ValueError, "length must be at least 1, got 0"),
        ((-1, 1, 1), ValueError, "slots must be at least 0, got -1"),
        ((1.0, 1, 1), TypeError, "slots must be an int, got float"),
    ],
)
def test_errors_of_pools(sizes, error, message):
    with pytest.raises(error, match="draft_pool: " + message):
        fk.draft_pool(*sizes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": torch.zeros(1, 49)}, TypeError, "memory must be int64, got float32"),
        ({"memory": torch.zeros(49, dtype=torch.int64)}, ValueError, r"memory must have shape \[S, W\]"),
        ({"memory": torch.zeros(1, 50, dtype=torch.int64)}, ValueError, r"memory must have shape \(1, 49\)"),
        ({"memory": torch.zeros(2, 98, dtype=torch.int64)[:, ::2]}, ValueError, "memory must be contiguous"),
        ({"num_states": 5}, ValueError, r"memory must have shape \(1, 61\) .*, got \(1, 49\)"),
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_pool_is_checked_when_it_is_made(change, error, message):
    with pytest.raises(error, match="DraftPool: " + message):
        dataclasses.replace(fk.draft_pool(1, 4, 4), **change)
