"""partial_predictions and merge_predictions: predict_tokens on parts of the vocabulary, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, generator
from test_predict_tokens import DTYPES, MASK, MEASURES, assert_close, calls, oracle

import freedave_kernels as fk
from freedave_kernels.reference.merge_predictions import merge_predictions as reference_merge
from freedave_kernels.reference.partial_predictions import partial_predictions as reference_partial

TOKENS = fk.TOKENS_PER_STATE


def in_parts(logits, input_ids, edges, *, measure="prob", suppress_tokens=None, **arguments):
    """predict_tokens, of parts of the vocabulary that end at `edges`."""
    edges = sorted({0, *edges, logits.shape[-1]})
    states = [
        fk.partial_predictions(
            logits[..., begin:end],
            input_ids,
            MASK,
            first_token_id=begin,
            measure=measure,
            suppress_tokens=suppress_tokens,
            **arguments,
        )
        for begin, end in itertools.pairwise(edges)
    ]
    rest = {"temperature": arguments.get("temperature", 0.0), "scored": arguments.get("scored_ids") is not None}
    return fk.merge_predictions(torch.cat(states, -2), input_ids, measure=measure, **rest)


def test_example(backend):
    """Tokens 0 to 2 and 3 to 4 apart: what is known of each part, and both together."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 2.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    input_ids = torch.tensor([MASK, 4])
    first = fk.partial_predictions(logits[:, :3], input_ids, MASK)
    second = fk.partial_predictions(logits[:, 3:], input_ids, MASK, first_token_id=3)
    assert first.shape == second.shape == (2, 1, 6) and first.dtype == torch.float64
    assert first[0, 0].tolist() == pytest.approx([2, -INF, 1, 0, 1 + math.exp(-1) + math.exp(-2), 0])
    assert second[0, 0].tolist() == pytest.approx([2, -INF, 4, 0, 1 + math.exp(-1), 0])
    assert first[1, 0].tolist() == [-INF, -INF, -1, 0, 0, 0]  # not masked, so not read
    token_ids, confidence = fk.merge_predictions(torch.cat([first, second], -2), input_ids)
    assert token_ids.tolist() == [1, 4]  # equal logits: the lower id
    assert confidence.tolist() == pytest.approx([1 / (2 + 2 * math.exp(-1) + math.exp(-2)), -INF])


@st.composite
def calls_in_parts(draw):
    logits, input_ids, arguments = draw(calls())
    vocab = logits.shape[-1]
    # Where a part begins decides how its rows are aligned, for which Triton compiles.
    edges = Constants(draw).value(st.lists(st.integers(1, vocab), max_size=4), few=[[], [vocab // 2]])
    return logits, input_ids, arguments, edges


def run(logits, input_ids, arguments, edges):
    return in_parts(logits, input_ids, edges, **arguments)


@given(call=calls_in_parts())
@settings(max_examples=300)
def test_agrees_with_the_oracle(native_backend, call):
    logits, input_ids, arguments, _ = call
    assert_close(run(*call), oracle(logits, input_ids, **arguments), arguments["measure"])


@given(call=calls_in_parts())
def test_the_reference_agrees_with_itself(call):
    logits, input_ids, arguments, _ = call
    with fk.use_backend("reference"):
        assert_close(run(*call), oracle(logits, input_ids, **arguments), arguments["measure"])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_are_those_of_the_oracle(native_backend, dtype, measure):
    """So states of one backend can be merged by another."""
    logits = (torch.randn(2, 3, 9000, generator=generator(0)) * 3).to(dtype)
    logits[0, 0, 4096:8192] = -INF
    logits[0, 1, [5, 7, 8500]] = logits[0, 1].max()
    input_ids = torch.tensor([[MASK, MASK, 1], [2, MASK, MASK]])
    suppress = torch.tensor([100_005, 100_100, 3])
    states = fk.partial_predictions(
        logits, input_ids, MASK, first_token_id=100_000, measure=measure, suppress_tokens=suppress
    )
    expected = reference_partial(
        logits, input_ids, MASK, 100_000, None, measure, suppress, False, None, None, None, None
    )
    assert states.shape == (2, 3, 3, 6)
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=0)
    merged = fk.merge_predictions(states, input_ids, measure=measure)
    assert_close(merged, reference_merge(expected, input_ids, measure, False)[:2], measure)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_the_division_does_not_show(backend, dtype, measure):
    """Bitwise, whatever multiples of 4,096 tokens the parts end at, whatever else is in the batch."""
    logits = (torch.randn(5, 20000, generator=generator(1)) * 4).to(dtype)
    logits[2, [4095, 4096, 16384, 19999]] = logits[2].max()
    input_ids = torch.full((5,), MASK)
    suppress = torch.tensor([int(logits[3].argmax())])
    arguments = {"measure": measure, "suppress_tokens": suppress}
    whole = in_parts(logits, input_ids, [], **arguments)
    for edges in ([TOKENS], [3 * TOKENS, 4 * TOKENS], range(0, 20000, TOKENS)):
        assert all(map(torch.equal, in_parts(logits, input_ids, edges, **arguments), whole))
    for row in range(5):
        alone = in_parts(logits[row : row + 1].clone(), input_ids[:1], [2 * TOKENS], **arguments)
        assert torch.equal(torch.cat(alone), torch.cat([result[row : row + 1] for result in whole]))


@pytest.mark.parametrize("place", [0, 5000, 9999])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_one_broken_part_breaks_the_row(backend, place, value):
    logits = torch.randn(3, 10000, generator=generator(2))
    logits[0, place] = value
    logits[1] = -INF
    logits[2, :TOKENS] = -INF  # nothing in the first part, which is no fault
    input_ids = torch.full((3,), MASK)
    token_ids, confidence = in_parts(logits, input_ids, [TOKENS, 2 * TOKENS])
    assert token_ids[:2].tolist() == [MASK, MASK] and confidence[:2].tolist() == [-INF, -INF]
    assert_close((token_ids[2:], confidence[2:]), oracle(logits[2:], input_ids[2:]))


def test_states_lie_anywhere(backend):
    """A gap between the states of a row, and rows in another order."""
    logits = torch.randn(3, 2, 9000, generator=generator(3))
    input_ids = torch.full((3, 2), MASK)
    states = fk.partial_predictions(logits, input_ids, MASK)
    expected = fk.merge_predictions(states, input_ids)
    spread = torch.full((2, 3, 6, 6), math.nan, dtype=torch.float64).transpose(0, 1)[:, :, ::2]
    spread.copy_(states)
    assert not spread.is_contiguous()
    assert all(map(torch.equal, fk.merge_predictions(spread, input_ids), expected))


def test_nothing_to_predict(backend):
    states = fk.partial_predictions(torch.zeros(0, 3, 5000), torch.zeros(0, 3, dtype=torch.int64), MASK)
    assert states.shape == (0, 3, 2, 6)
    token_ids, confidence = fk.merge_predictions(states, torch.zeros(0, 3, dtype=torch.int64))
    assert token_ids.shape == confidence.shape == (0, 3)


def test_suppressed_tokens_are_those_of_the_whole_vocabulary(backend):
    logits = torch.tensor([[1.0, 5.0, 2.0, 5.0]])
    for suppress in ([1, 3], (3, 1, 1), torch.tensor([3, 1, -1, 4])):
        token_ids, confidence = in_parts(logits, torch.tensor([MASK]), [1, 2], suppress_tokens=suppress)
        assert token_ids.item() == 2
        assert confidence.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)


def test_opcheck():
    logits = torch.randn(2, 3, 5000, generator=generator(4))
    input_ids = torch.tensor([[MASK, 1, MASK], [2, MASK, 3]])
    torch.library.opcheck(torch.ops.freedave.partial_predictions.default, (logits, input_ids, MASK))
    extra = (4096, input_ids == 1, "margin", torch.tensor([3, 5000]), True)
    partial = torch.ops.freedave.partial_predictions.default
    torch.library.opcheck(partial, (logits.bfloat16(), input_ids, MASK, *extra))
    states = fk.partial_predictions(logits, input_ids, MASK)
    torch.library.opcheck(torch.ops.freedave.merge_predictions.default, (states, input_ids, "prob"))


def test_compiles_without_graph_breaks():
    def step(hidden, weight, input_ids):
        parts = [
            fk.partial_predictions(hidden @ part.T, input_ids, MASK, first_token_id=4096 * n, suppress_tokens=[3])
            for n, part in enumerate(weight.split(4096))
        ]
        return fk.merge_predictions(torch.cat(parts, -2), input_ids)

    random = generator(5)
    arguments = torch.randn(4, 8, generator=random), torch.randn(5000, 8, generator=random), torch.full((4,), MASK)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*arguments), step(*arguments)))


LOGITS, IDS = torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)
STATES = torch.zeros(2, 3, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS.double()}, TypeError, "logits must be float16 or bfloat16 or float32, got float64"),
        ({"input_ids": IDS[:1]}, ValueError, r"input_ids must have shape \(2, 3\).*got \(1, 3\)"),
        ({"first_token_id": -1}, ValueError, "first_token_id must be at least 0, got -1"),
        ({"first_token_id": 0.5}, TypeError, "first_token_id must be an int, got float"),
        ({"first_token_id": 2**53}, ValueError, r"token ids must lie below 2\^53, got first_token_id 9007199254740992"),
        (
            {"measure": "entropy"},
            ValueError,
            "measure must be one of prob, margin, neg_entropy, log_odds, got 'entropy'",
        ),
        ({"suppress_tokens": [-1]}, ValueError, "suppress_tokens must lie in"),
        ({"mask_index": IDS}, TypeError, "mask_index must be bool, got int64"),
        ({"logits_shift": 1}, TypeError, "logits_shift must be a bool, got int"),
        ({"suppress": "out"}, ValueError, "suppress must be one of exclude, forbid, got 'out'"),
        ({"scored_ids": IDS.short()}, TypeError, "scored_ids must be int64, got int16"),
        ({"scored_ids": IDS[:1]}, ValueError, r"scored_ids must have shape \(2, 3\).*got \(1, 3\)"),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    arguments = {"logits": LOGITS, "input_ids": IDS, "mask_token_id": MASK} | change
    with pytest.raises(error, match=f"partial_predictions: {message}"):
        fk.partial_predictions(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"states": STATES.float()}, TypeError, "states must be float64, got float32"),
        (
            {"states": STATES[..., :5]},
            ValueError,
            r"states must have shape \[\*, L, C, 6 or more\], got \(2, 3, 4, 5\)",
        ),
        (
            {"states": STATES[..., :0, :]},
            ValueError,
            r"states must have shape \[\*, L, C, 6 or more\], got \(2, 3, 0, 6\)",
        ),
        ({"states": STATES[0, 0]}, ValueError, r"states must have at least 3 dimensions, got shape \(4, 6\)"),
        ({"states": STATES.mT.contiguous().mT}, ValueError, "the last dimension of states must be contiguous"),
        ({"input_ids": IDS.short()}, TypeError, "input_ids must be int64, got int16"),
        ({"scored": True}, ValueError, r"scored needs states of partial_predictions\(..., scored_ids=...\)"),
        ({"scored": 1}, TypeError, "scored must be a bool, got int"),
        ({"rank_dtype": torch.float64}, ValueError, "rank_dtype must be one of torch.float16, .* got torch.float64"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must have shape \(2, 3\).*got \(3,\)"),
        ({"measure": 1}, TypeError, "measure must be a str, got int"),
        ({"input_ids": IDS.to("meta")}, ValueError, elsewhere("input_ids", "states")),
    ],
    ids=str,
)
def test_argument_errors_of_the_merge(backend, change, error, message):
    arguments = {"states": STATES, "input_ids": IDS} | change
    with pytest.raises(error, match=f"merge_predictions: {message}"):
        fk.merge_predictions(**arguments)
