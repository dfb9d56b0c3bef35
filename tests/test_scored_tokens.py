"""predict_tokens beside its predictions: log-probabilities of given tokens, suppressed tokens that stay in the softmax, and
confidences in the logits' dtype, on every backend.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, generator
from test_drawn_tokens import draws, draws_in_parts
from test_partial_predictions import TOKENS, calls_in_parts, in_parts
from test_predict_tokens import DTYPES, IDS, LOGITS, MASK, MEASURES, assert_close, calls

import freedave_kernels as fk
from freedave_kernels.contract import SUPPRESSIONS
from freedave_kernels.reference.predict_tokens import predict_tokens as reference

NAMES = ("suppress_tokens", "logits_shift", "temperature", "seed", "positions", "floor", "scored_ids", "suppress")


def oracle(logits: torch.Tensor, input_ids: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    given = {"measure": "prob", "logits_shift": False, "suppress": "exclude"} | arguments
    if isinstance(given.get("temperature"), float):
        given["temperature"] = torch.full(input_ids.shape, given["temperature"])
    rest = (given["measure"], *map(given.get, NAMES))
    return reference(logits, input_ids, MASK, given.get("mask_index"), *rest)


def assert_scores_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_example(backend: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [9.0, 9.0, 9.0], [3.0, 3.0, -INF], [0.0, 1.0, 0.0]])
    input_ids, scored = torch.tensor([MASK, 4, MASK, MASK]), torch.tensor([2, 1, 2, -1])
    token_ids, confidence, log_probs = fk.predict_tokens(logits, input_ids, MASK, scored_ids=scored)
    plain = fk.predict_tokens(logits, input_ids, MASK)
    assert torch.equal(token_ids, plain[0]) and torch.equal(confidence, plain[1])
    assert log_probs[0].item() == pytest.approx(1.0 - torch.logsumexp(logits[0].double(), 0).item(), rel=1e-6)
    assert log_probs[2].item() == -INF  # no probability
    assert log_probs.isnan().tolist() == [False, True, False, True]  # not masked; nothing to score


def test_its_own_token_has_the_logarithm_of_its_confidence(backend: str) -> None:
    logits, input_ids = torch.randn(7, 300, generator=generator(0)) * 4, torch.full((7,), MASK)
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK)
    log_probs = fk.predict_tokens(logits, input_ids, MASK, scored_ids=token_ids)[2]
    assert_scores_close(log_probs, confidence.log())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_without_a_probability(backend: str, temperature: float) -> None:
    """Suppressed, below the floor, and outside the vocabulary."""
    logits, input_ids = torch.tensor([0.0, 2.0, 1.0, 3.0]).expand(5, 4), torch.full((5,), MASK)
    scored, drawing = torch.tensor([0, 1, 3, 4, 2**40]), {}
    if temperature:
        drawing = {"temperature": temperature, "seed": 3, "floor": torch.full((5,), 0.5)}
    found = fk.predict_tokens(logits, input_ids, MASK, suppress_tokens=[3], scored_ids=scored, **drawing)[2]
    left = torch.tensor([2.0, 1.0] if temperature else [0.0, 2.0, 1.0], dtype=torch.float64) / (temperature or 1.0)
    expected = (2.0 / (temperature or 1.0) - left.logsumexp(0)).item()
    of_the_first = -INF if temperature else expected - 2.0
    assert found.tolist() == pytest.approx([of_the_first, expected, -INF, -INF, -INF], rel=1e-6)


def test_broken_rows_have_no_scores(backend: str) -> None:
    logits = torch.randn(4, 17000, generator=generator(2))
    logits[0, 5], logits[1, 16500], logits[2] = math.nan, INF, -INF
    found = fk.predict_tokens(logits, torch.full((4,), MASK), MASK, scored_ids=torch.full((4,), 7))
    assert found[2].isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_the_digits_of_unlikely_tokens(native_backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(20, 40000, generator=generator(3)) * 3
    logits[:, 39000] = torch.linspace(0.0, 60.0, 20)
    logits, input_ids, scored = logits.to(dtype), torch.full((20,), MASK), torch.arange(20) * 2000
    for measure in MEASURES:
        found = fk.predict_tokens(logits, input_ids, MASK, measure=measure, scored_ids=scored)[2]
        exact = logits.double().log_softmax(-1).gather(-1, scored[:, None]).squeeze(-1)
        assert_scores_close(found, exact.float())


@pytest.mark.parametrize("measure", MEASURES)
def test_forbidden_tokens_keep_their_share(backend: str, measure: str) -> None:
    """By the float64 softmax of all tokens, whether the forbidden one is the largest or not."""
    logits, ids = torch.tensor([[1.0, 5.0, 2.0, 5.0], [4.0, 1.0, 3.0, 2.0]]), torch.full((2,), MASK)
    for listed in ([1, 3], (3, 1, 1), torch.tensor([3, 1, -1, 4])):  # repeats, and ids outside the vocabulary
        arguments = {"measure": measure, "suppress_tokens": listed, "suppress": "forbid"}
        token_ids, confidence = fk.predict_tokens(logits, ids, MASK, **arguments)
        assert token_ids.tolist() == [2, 0]
        p = logits.double().softmax(-1)
        first, second = p[[0, 1], [2, 0]], p[[0, 1], [0, 2]]
        expected = {
            "prob": first,
            "margin": first - second,
            "neg_entropy": (p * p.log()).sum(-1),
            "log_odds": (first / (1 - first)).log(),
        }[measure]
        assert confidence.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_forbidden_tokens_far_above_all_others(backend: str) -> None:
    """Log-odds still rank; a probability is 0 then."""
    logits, ids = torch.tensor([[1.0, 0.0, 60000.0], [3.0, 0.0, 60000.0], [1.0, 0.0, 60.0]]), torch.full((3,), MASK)
    arguments = {"suppress_tokens": [2], "suppress": "forbid"}
    token_ids, confidence = fk.predict_tokens(logits, ids, MASK, measure="log_odds", **arguments)
    assert token_ids.tolist() == [0, 0, 0]
    assert confidence.tolist() == pytest.approx([-59999.0, -59997.0, -59.0], rel=1e-6)
    assert fk.predict_tokens(logits, ids, MASK, **arguments)[1].tolist() == pytest.approx([0, 0, math.exp(-59)])


def test_forbidden_logits_that_are_not_finite(backend: str) -> None:
    """They are in the softmax, and break a row as any other's do; where all are forbidden there is nothing to choose."""
    logits, ids = torch.randn(4, 10, generator=generator(4)), torch.full((4,), MASK)
    logits[0, 3], logits[1, 3], logits[2, 3] = math.nan, INF, -INF
    token_ids, confidence = fk.predict_tokens(logits, ids, MASK, suppress_tokens=[3], suppress="forbid")
    assert confidence.isneginf().tolist() == [True, True, False, False]
    assert token_ids[:2].tolist() == [MASK, MASK]
    every = fk.predict_tokens(logits[3:], ids[3:], MASK, suppress_tokens=range(10), suppress="forbid")
    assert every[0].item() == MASK and every[1].item() == -INF


@st.composite
def scored_calls(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    logits, input_ids, arguments = draw(st.one_of(calls(), draws()))
    random, vocab = generator(draw(st.integers(0, 2**32))), logits.shape[-1]
    constants = Constants(draw)
    arguments["suppress"] = constants.one_of(SUPPRESSIONS)
    if constants.one_of([False, True]):
        arguments["scored_ids"] = torch.randint(-1, vocab + 1, input_ids.shape, generator=random)
    return logits, input_ids, arguments


@given(call=scored_calls())
@settings(max_examples=300)
def test_agrees_with_the_oracle(native_backend: str, call: tuple[torch.Tensor, torch.Tensor, dict[str, Any]]) -> None:
    logits, input_ids, arguments = call
    result, expected = fk.predict_tokens(logits, input_ids, MASK, **arguments), oracle(logits, input_ids, arguments)
    assert_close(result[:2], expected, arguments["measure"])
    if "scored_ids" in arguments:
        assert_scores_close(result[2], expected[2])


@pytest.mark.parametrize("suppress", SUPPRESSIONS)
def test_a_row_does_not_depend_on_its_batch(backend: str, threads: None, suppress: str) -> None:
    logits, input_ids = torch.randn(9, 16500, generator=generator(6)), torch.full((9,), MASK)
    scored = torch.arange(9) * 100
    rest = {"suppress_tokens": list(range(5, 900, 7)), "suppress": suppress}
    together = fk.predict_tokens(logits, input_ids, MASK, scored_ids=scored, **rest)
    for row in range(9):
        one = slice(row, row + 1)
        alone = fk.predict_tokens(logits[one].clone(), input_ids[one], MASK, scored_ids=scored[one], **rest)
        assert all(torch.equal(ours[one], theirs) for ours, theirs in zip(together, alone, strict=True))


@st.composite
def scored_calls_in_parts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], list[int]]:
    logits, input_ids, arguments, edges = draw(st.one_of(calls_in_parts(), draws_in_parts()))
    constants = Constants(draw)
    arguments["suppress"] = constants.one_of(SUPPRESSIONS)
    if constants.one_of([False, True]):
        random, vocab = generator(draw(st.integers(0, 2**32))), logits.shape[-1]
        arguments["scored_ids"] = torch.randint(-1, vocab + 1, input_ids.shape, generator=random)
    return logits, input_ids, arguments, edges


def run_in_parts(
    logits: torch.Tensor, input_ids: torch.Tensor, arguments: dict[str, Any], edges: list[int]
) -> tuple[torch.Tensor, ...]:
    return in_parts(logits, input_ids, edges, **arguments)


@given(call=scored_calls_in_parts())
@settings(max_examples=300)
def test_parts_agree_with_the_oracle(
    backend: str, call: tuple[torch.Tensor, torch.Tensor, dict[str, Any], list[int]]
) -> None:
    logits, input_ids, arguments, _ = call
    result, expected = run_in_parts(*call), oracle(logits, input_ids, arguments)
    assert_close(result[:2], expected, arguments["measure"])
    if "scored_ids" in arguments:
        assert_scores_close(result[2], expected[2])


@pytest.mark.parametrize("drawn", [False, True], ids=["largest", "drawn"])
@pytest.mark.parametrize("suppress", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_division_does_not_show(backend: str, dtype: torch.dtype, suppress: str, drawn: bool) -> None:
    """Bitwise, wherever the parts end, with scored and forbidden tokens in any; two rows are broken by forbidden ones."""
    logits = (torch.randn(7, 20000, generator=generator(10)) * 3).to(dtype)
    logits[5, 12345], logits[6, 19999] = math.nan, INF
    scored = torch.tensor([0, 4095, 4096, 19999, 20000, 77, -1])
    arguments: dict[str, Any] = {"suppress_tokens": torch.tensor([19999, 3, 12345, 3, 4096, -7]), "suppress": suppress}
    if drawn:
        arguments |= {"temperature": 0.8, "seed": 5, "positions": torch.arange(7), "floor": torch.full((7,), -4.0)}
    input_ids = torch.full((7,), MASK)
    whole = in_parts(logits, input_ids, [], scored_ids=scored, **arguments)
    expected = fk.predict_tokens(logits[:, None], input_ids[:, None], MASK, scored_ids=scored[:, None], **{
        name: value[:, None] if name in ("positions", "floor") else value for name, value in arguments.items()
    })  # fmt: skip
    broken = suppress == "forbid"
    assert (whole[1] == -INF).tolist() == [False] * 5 + [broken, broken]
    assert whole[2].isnan().tolist() == [False] * 5 + [broken, True]
    assert torch.equal(whole[0], expected[0].squeeze(-1))
    for ours, theirs in zip(whole[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs.squeeze(-1), rtol=1e-6, atol=1e-6, equal_nan=True)
    for edges in ([TOKENS], [3 * TOKENS, 4 * TOKENS], range(0, 20000, TOKENS)):
        parts = in_parts(logits, input_ids, edges, scored_ids=scored, **arguments)
        for ours, theirs in zip(parts, whole, strict=True):
            assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    unscored = in_parts(logits, input_ids, [TOKENS], **arguments)
    assert len(unscored) == 2 and all(map(torch.equal, unscored, whole[:2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confidences_of_parts_in_the_dtype_of_the_logits(backend: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 64, generator=generator(7)) * 5).to(dtype)
    input_ids = torch.full((50,), MASK)
    states = fk.partial_predictions(logits, input_ids, MASK)
    rounded = fk.merge_predictions(states, input_ids, rank_dtype=dtype)
    assert torch.equal(rounded[1], fk.merge_predictions(states, input_ids)[1].to(dtype).float())
    if dtype != torch.float32:
        assert torch.equal(rounded[1], fk.predict_tokens(logits, input_ids, MASK, rank_dtype="logits")[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confidences_in_the_dtype_of_the_logits(backend: str, dtype: torch.dtype) -> None:
    """What a softmax in that dtype has, where decoders rank by its results: many are equal then."""
    logits = (torch.randn(200, 64, generator=generator(7)) * 5).to(dtype)
    input_ids = torch.full((200,), MASK)
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK, rank_dtype="logits")
    published = logits.softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)
    plain = fk.predict_tokens(logits, input_ids, MASK)[1]
    assert confidence.dtype == torch.float32
    assert torch.equal(confidence, plain.to(dtype).float())
    if dtype == torch.float32:
        torch.testing.assert_close(confidence, published, rtol=1e-5, atol=0)
    else:
        assert torch.equal(confidence, published.float()) and len(confidence.unique()) < len(plain.unique())


def test_opcheck() -> None:
    """Every position is masked: the NaN of another equals no NaN there."""
    logits, input_ids = torch.randn(2, 3, 40, generator=generator(8)), torch.full((2, 3), MASK)
    op, none = torch.ops.freedave.predict_tokens.default, (None, None, None)
    call = (logits, input_ids, MASK, None, "prob", torch.tensor([3, 5]), False, None, *none)
    torch.library.opcheck(op, (*call, input_ids, "exclude"))
    torch.library.opcheck(op, (*call, input_ids, "forbid"))
    torch.library.opcheck(op, (*call, None, "forbid"))
    states = fk.partial_predictions(
        logits, input_ids, MASK, suppress_tokens=[3], suppress="forbid", scored_ids=input_ids
    )
    torch.library.opcheck(torch.ops.freedave.merge_predictions.default, (states, input_ids, "prob"))


def test_compiles_without_graph_breaks() -> None:
    def step(logits: torch.Tensor, input_ids: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = {"suppress_tokens": [3], "suppress": "forbid", "rank_dtype": "logits"}
        return fk.predict_tokens(logits * 2, input_ids, MASK, scored_ids=scored, **arguments)

    logits, input_ids = torch.randn(2, 4, 30, generator=generator(9)).bfloat16(), torch.full((2, 4), MASK)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = (logits, input_ids, torch.ones_like(input_ids))
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), step(*given), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scored_ids": IDS.short()}, TypeError, "scored_ids must be int64, got int16"),
        ({"scored_ids": [1]}, TypeError, "scored_ids must be a int64 tensor, got list"),
        ({"scored_ids": IDS[:1]}, ValueError, r"scored_ids must have shape \(2, 3\).*got \(1, 3\)"),
        ({"scored_ids": IDS.to("meta")}, ValueError, elsewhere("scored_ids", "logits")),
        ({"suppress": "out"}, ValueError, "suppress must be one of exclude, forbid, got 'out'"),
        ({"suppress": None}, TypeError, "suppress must be a str, got NoneType"),
        ({"rank_dtype": torch.bfloat16}, TypeError, "rank_dtype must be a str, got dtype"),
        ({"rank_dtype": "bfloat16"}, ValueError, "rank_dtype must be one of float32, logits, got 'bfloat16'"),
    ],
    ids=str,
)
def test_argument_errors(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.predict_tokens(LOGITS, IDS, MASK, **change)
