"""A packed forward: what is packed together does not see each other, to the last bit, and equals the plain masked form."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MASK, experts_lm, golden_lm, wide_lm

from freedave.decode.cache_policy import policy_for
from freedave.decode.planned_sequence import PlannedSequence
from freedave.decode.settings import resolve_settings
from freedave.forward import attention, packed_forward
from freedave.forward.attention import attend, attention_from_scores, attention_with_log_sum_exp, merge_into
from freedave.forward.cache import KeyValueCache
from freedave.forward.explicit_mask import dense_mask
from freedave.forward.packed_forward import ForwardBuilder

CPU = torch.device("cpu")


@pytest.fixture(params=[0, 128], ids=["merged", "joined"], autouse=True)
def joined_keys(request, monkeypatch):
    """Stored keys are merged by log-sum-exp, or copied next to a run's own: few of them, on a CPU."""
    monkeypatch.setattr(packed_forward, "JOINED_KEYS", request.param)


def test_example():
    """Two runs that attend to three stored keys and to themselves, and a third that sees the second one as well."""
    cache = KeyValueCache(slots=1, capacity=8)
    builder = ForwardBuilder(drafts=1, length=1)
    first = builder.add([[5, 6, 7]], 0)
    builder.store(first, 3, slot=0, at=0)
    begin = builder.add([[1, 2], [3, 4]], first_position=3)
    last = builder.add([[8, 9]], 5, keys=[begin + 2, begin + 3, begin + 4, begin + 5])
    assert last == begin + 4
    builder.attend(begin, 3, 2, slot=0, ranges=[(0, 3)])
    [(forward, _)], *_ = builder.build([[0]], [], CPU, cache)
    assert forward.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6]]
    visible = dense_mask(forward)[0, 0].int().tolist()
    stored, new = [row[:8] for row in visible], [row[8:] for row in visible]
    assert stored[3:] == [[1, 1, 1, 0, 0, 0, 0, 0]] * 6 and not any(map(any, stored[:3]))
    assert new[0] == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert new[3] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert new[7] == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_runs_are_divided_among_calls():
    """Groups of nearly equal size, in as few calls as have room; what fits beside earlier runs is no call of its own."""
    builder = ForwardBuilder(drafts=1, length=1, most_tokens=20)
    builder.add([[0] * 10], 0)
    for group in builder.divide(range(2), 5):
        builder.add([[0] * 5] * len(group), 0)
    sizes = []
    for group in builder.divide([3, 1, 4, 1, 5], 6):
        sizes.append(list(group))
        assert builder.add([[0] * 6] * len(group), 0) == 0
    for group in builder.divide([9], 25):
        assert list(group) == [9] and builder.tokens == 0
        builder.add([[0] * 25], 0)
    calls, *_ = builder.build([[0]], [], CPU, None)
    assert sizes == [[3, 1], [4, 1, 5]]
    assert [forward.input_ids.shape[1] for forward, _ in calls] == [20, 12, 18, 25]


def packed(seed: int, *, runs: int = 3, groups: int = 2, only: int | None = None):
    """A forward with a prompt, runs over two ranges of a full cache, and chained runs; or run `only` of it."""
    random = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(slots=2, capacity=40)
    tensors = [torch.randn(1, heads, 31 + 8 * runs, 16, generator=random) for heads in (4, groups, groups)]
    history = [torch.randn(1, groups, 80, 16, generator=random) for _ in range(2)]
    whole = ForwardBuilder(1, 1)
    whole.add([[0] * 40] * 2, 0)
    whole.store(0, 40, 0, 0)
    whole.store(40, 40, 1, 0)
    [(everything, _)], *_ = whole.build([[0]], [], CPU, cache)
    attend(everything, 0, torch.randn(1, 4, 80, 16, generator=random), *history)

    builder = ForwardBuilder(1, 1)
    members = list(range(runs)) if only is None else [only]
    if only is None:
        builder.add([[0] * 31], 0, block_length=4)
    at = {j: builder.tokens + 4 * n for n, j in enumerate(members)}
    begin = builder.add([[0] * 4] * len(members), 0)
    chained = [at[j] + i for j in members for i in range(4)]
    own = [[builder.tokens + 4 * n + i for i in range(4)] for n in range(len(members))]
    keys = [key for n, _ in enumerate(members) for key in (*chained[4 * n : 4 * n + 4], *own[n])]
    builder.add([[0] * 4] * len(members), 0, keys=keys)
    builder.attend(begin, 2 * len(members), 4, slot=1, ranges=[(0, 21), (30, 39)])
    [(forward, _)], *_ = builder.build([[0]], [], CPU, cache)
    picked = slice(None)
    if only is not None:
        first = [31 + 4 * only + i for i in range(4)]
        picked = torch.tensor(first + [i + 4 * runs for i in first])
    return forward, [tensor[:, :, picked] for tensor in tensors]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_masked_form(seed, groups):
    """Merging by log-sum-exp gives softmax attention under the dense mask, to 1e-6 in float32."""
    forward, (query, key, value) = packed(seed, groups=groups)
    out = attend(forward, 0, query, key, value)
    stored = forward.cache.all(0)
    mask = dense_mask(forward)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query.double(),
        torch.cat([stored[0], key], 2).double(),
        torch.cat([stored[1], value], 2).double(),
        attn_mask=mask,
        enable_gqa=True,
    )
    torch.testing.assert_close(out.double(), plain.transpose(1, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("runs", [2, 3, 9, 17])
def test_bitwise_the_same_as_a_run_alone(runs):
    together = attend(*(lambda forward, tensors: (forward, 0, *tensors))(*packed(0, runs=runs)))
    for j in range(runs):
        alone = attend(*(lambda forward, tensors: (forward, 0, *tensors))(*packed(0, runs=runs, only=j)))
        first = together[:, 31 + 4 * j : 35 + 4 * j]
        second = together[:, 31 + 4 * (runs + j) : 35 + 4 * (runs + j)]
        assert torch.equal(alone, torch.cat([first, second], 1))


def test_runs_over_stored_keys_do_not_depend_on_their_number():
    """With 4 tokens and 128 features (SDAR's shapes), one product over the queries of all runs does round differently."""
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(8, 4, 4, 128, generator=random)
    key, value = torch.randn(2, 1, 2, 300, 128, generator=random).unbind()
    together = attention._attend_stored(queries, key, value, None)
    for run in range(8):
        alone = attention._attend_stored(queries[run : run + 1], key, value, None)
        assert all(torch.equal(part[run : run + 1], own) for part, own in zip(together, alone, strict=True))


@pytest.mark.parametrize("groups", [1, 4])
def test_attention_from_scores_is_the_same_attention(groups):
    """What devices without a fused kernel compute."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 5, 16, generator=random) for heads in (4, groups, groups))
    mask = torch.zeros(1, 1, 5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    for additive in (None, mask):
        ours = attention_from_scores(query, key, value, 0.3, additive)
        for mine, kernel in zip(ours, attention_with_log_sum_exp(query, key, value, 0.3, additive), strict=True):
            torch.testing.assert_close(mine, kernel, rtol=1e-6, atol=1e-6)


def test_merging_with_nothing_changes_nothing():
    """A log-sum-exp of -inf is an empty set of keys."""
    out, sums = torch.randn(3, 2, 4), torch.randn(3, 2)
    kept = out.clone(), sums.clone()
    merge_into((out, sums), (torch.zeros_like(out), torch.full_like(sums, float("-inf"))), last=False)
    assert torch.equal(out, kept[0]) and torch.equal(sums, kept[1])


def chain(length: int, steps: int, seed: int) -> list[list[int]]:
    """Nested drafts, filled from the left with a little disorder, so that some finish blocks and some do not."""
    random = torch.Generator().manual_seed(seed)
    order = (torch.arange(length) + 3 * torch.rand(length, generator=random)).argsort().tolist()
    tokens = torch.randint(MASK, (length,), generator=random).tolist()
    return [[tokens[i] if i in order[: 2 + step] else MASK for i in range(length)] for step in range(steps)]


def logits_of(
    lm, prompt: list[int], states: list[list[int]], cache: str, most_tokens: int | None = None
) -> dict[tuple[int, int], torch.Tensor]:
    """The logits of each draft's masked positions, with a policy whose prompt (or refresh) forward has run.

    `most_tokens`: that a call of the model may have.
    """
    settings = resolve_settings(lm, len(prompt), 12, draft_steps=8, block_length=4, cache=cache)
    sequence = PlannedSequence(0, 0, prompt, settings, MASK)
    policy = policy_for(settings, MASK, block_causal=lm.attention == "block_causal", logits_shift=lm.logits_shift)
    store = KeyValueCache(1, len(sequence.tokens))
    sequence.open_window(1, settings.lookahead_steps, 1)
    length = len(states[0])

    def forward():
        builder = ForwardBuilder(len(sequence.states), length, most_tokens)
        policy.plan(sequence, 0, builder)
        calls, *_ = builder.build([[0] * length] * len(sequence.states), [], CPU, store)
        found = {}
        for packed, prediction in calls:
            logits = lm.project(lm.packed_features(packed, prediction.logits_row))
            places = [divmod(place, length) for place in prediction.place.tolist()]
            assert len(logits) % 4 == 0
            found |= dict(zip(places, logits[: len(places)], strict=True))
        return found

    forward()
    sequence.refresh = False
    sequence.states, sequence.reach_of = states, [length] * len(states)
    return forward()


POLICIES = pytest.mark.parametrize(
    ("family", "cache", "length"),
    [("block_causal", "exact", 12), ("full", "prefix", 8), ("full", "dual", 8), ("full_shifted", "dual", 8)],
)


def assert_same_alone_and_with_others(lm, cache: str, length: int, seed: int) -> None:
    """The logits of each of a chain of drafts, bitwise."""
    tokens = torch.randint(MASK, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    states = [[3, *state[1:]] for state in chain(length, 7, seed)]  # with a shift, a block's first position is filled
    if cache != "exact":
        states = [state for state in states if MASK in state[:4]]
    asked = "auto" if cache == "exact" else cache
    with torch.inference_mode():
        together = logits_of(lm, tokens, states, asked)
        for most_tokens in (length, 3 * length):
            divided = logits_of(lm, tokens, states, asked, most_tokens)
            assert divided.keys() == together.keys()
            assert all(torch.equal(divided[place], logits) for place, logits in together.items())
        for j, state in enumerate(states):
            alone = logits_of(lm, tokens, [state], asked)
            mine = {i: logits for (draft, i), logits in together.items() if draft == j}
            assert mine and mine.keys() == {i for _, i in alone}
            assert all(torch.equal(mine[i], alone[0, i]) for i in mine)


@POLICIES
@pytest.mark.parametrize("seed", range(3))
def test_a_draft_has_the_same_logits_alone_and_with_others(family, cache, length, seed):
    """Through a whole model, bitwise: losslessness in float32 rests on it."""
    assert_same_alone_and_with_others(golden_lm(family), cache, length, seed)


@POLICIES
@pytest.mark.parametrize("width", [64, 1024])
def test_the_same_in_wide_models_and_on_several_threads(family, cache, length, width, threads):
    """There a row's product depends on how many rows there are, unless they come in fours, and MKL is in its strict mode."""
    for seed in range(3):
        assert_same_alone_and_with_others(wide_lm(family, width), cache, length, seed)


@pytest.mark.parametrize("width", [64, 256])
def test_the_same_with_experts(width, threads):
    """How many tokens go to an expert depends on what else is in the forward."""
    for seed in range(3):
        assert_same_alone_and_with_others(experts_lm(width), "exact", 12, seed)
