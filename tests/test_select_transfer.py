"""select_transfer: the contract, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, block_lengths, generator, ranked_for, rows

import freedave_kernels as fk
from freedave_kernels.contract import RULES
from freedave_kernels.reference import select_transfer as reference

CONFIDENCE = torch.tensor([0.25, 0.875, 0.5, 0.875, 0.6])
MASKED = torch.tensor([True, True, True, True, False])


def selected(**arguments) -> list[int]:
    return fk.select_transfer(CONFIDENCE, MASKED, **arguments).nonzero().flatten().tolist()


def test_example(backend):
    """The unmasking rules of LLaDA (top-k) and Fast-dLLM (threshold, at least one)."""
    assert selected(num_transfer=1) == [1]
    assert selected(num_transfer=3) == [1, 2, 3]
    assert selected(threshold=0.5) == [1, 2, 3]
    assert selected(threshold=0.95) == [1]


def test_strict(backend):
    assert selected(threshold=0.875) == [1, 3]
    assert selected(threshold=0.875, rule="strict") == [1]
    assert selected(threshold=0.5, rule="strict") == [1, 3]


def fast_dllm(confidence: list[float], factor: float) -> int:
    """How many of the most confident positions Fast-dLLM's get_transfer_index_dynamic fills."""
    limits = [-INF, *(1 - factor / (n + 1) for n in range(2, len(confidence) + 1))]
    ranked = sorted(confidence, reverse=True)
    last = next((n for n, limit in enumerate(limits) if ranked[n] < limit), len(ranked) - 1)
    return last + 1 if last in (0, len(ranked) - 1) else last  # a step that stops at the last position fills it, too


def sdar(entropies: list[float], bound: float) -> int:
    """How many positions of the least entropy SDAR's "entropy_bounded" fills."""
    sums = torch.tensor(sorted(entropies), dtype=torch.float64).cumsum(0)
    return max(int(torch.searchsorted(sums, bound)), 1)


PUBLISHED = {"factor": fast_dllm, "entropy_bound": sdar}
EIGHTHS = st.sampled_from([n / 8 for n in range(9)])


@pytest.mark.parametrize("rule", PUBLISHED)
@given(
    numbers=st.lists(EIGHTHS, min_size=1, max_size=12),
    threshold=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.3, 1.5, 2.0, 3.0]),
)
@settings(max_examples=200)
def test_published_rules(backend, rule, numbers, threshold):
    confidence = torch.tensor(numbers) if rule == "factor" else -torch.tensor(numbers)
    chosen = fk.select_transfer(confidence, confidence == confidence, threshold=threshold, rule=rule)
    count = PUBLISHED[rule](numbers, threshold)
    assert chosen.nonzero().flatten().tolist() == sorted(
        confidence.argsort(descending=True, stable=True)[:count].tolist()
    )


def test_rules(backend):
    """Limits are 0.5 for the second position and 0.625 for the third; three confidences of four pass, so the last is filled,
    too. Of the entropies, two have a sum below the bound."""
    assert selected(threshold=1.5, rule="factor") == [1, 3]
    confidence, masked = torch.tensor([0.7, 0.9, 0.1, 0.9]), torch.ones(4, dtype=torch.bool)
    assert fk.select_transfer(confidence, masked, threshold=1.5, rule="factor").all()
    assert fk.select_transfer(confidence[:2], masked[:2], threshold=0.0, rule="factor").all()
    assert not fk.select_transfer(
        confidence, masked, threshold=torch.tensor(float("nan")), num_transfer=0, rule="factor"
    ).any()
    stuck = torch.tensor([0.7, 0.9, -INF, 0.9])  # nothing is predicted for the last one
    assert fk.select_transfer(stuck, masked, threshold=1.5, rule="factor").tolist() == [True, True, False, True]
    for bound, expected in ((0.5, [3]), (0.75, [1, 3]), (0.25, [3]), (0.0, [3]), (9.0, [0, 1, 2, 3])):
        chosen = fk.select_transfer(
            -torch.tensor([0.5, 0.375, 1.0, 0.25]), masked, threshold=bound, rule="entropy_bound"
        )
        assert chosen.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("rule", ["factor", "entropy_bound"])
def test_left_to_right_rules_take_the_leading_run(backend, rule):
    """The n-th position is the n-th masked one; one that is not predicted ends the run."""
    for broken, expected in ((None, [1, 2, 4]), (2, [1]), (1, [])):
        confidence = torch.tensor([0.0, 0.1, 0.7, 0.0, 0.8, 0.2, 0.9, 0.9])
        confidence = confidence if rule == "factor" else torch.tensor([0.0, -0.3, -0.1, 0.0, -0.2, -0.5, 0.0, 0.0])
        masked = torch.tensor([False, True, True, False, True, True, True, True])
        if broken is not None:
            confidence[broken] = float("nan")
        chosen = fk.select_transfer(
            confidence, masked, num_transfer=0, threshold=1.0, rule=rule, order="left_to_right", fallback="top"
        )
        assert chosen.nonzero().flatten().tolist() == expected, broken


def test_fallbacks(backend):
    assert selected(threshold=0.875, num_transfer=3, fallback="top") == [1, 3]
    assert selected(threshold=0.875, num_transfer=3, fallback="top_if_fewer") == [1, 2, 3]
    assert selected(threshold=0.5, num_transfer=1, fallback="top_if_fewer") == [1, 2, 3]
    assert selected(threshold=0.95, num_transfer=2, fallback="top_always") == [1, 3]
    assert selected(threshold=0.5, num_transfer=1, fallback="top_always") == [1, 2, 3]
    assert selected(threshold=0.95, num_transfer=0) == []


def test_left_to_right_takes_the_leading_run(backend):
    assert selected(order="left_to_right", num_transfer=2) == [0, 1]
    assert selected(order="left_to_right", threshold=0.25) == [0, 1, 2, 3]
    assert selected(order="left_to_right", threshold=0.5) == [0]  # nothing leads: the fallback


def test_only_the_current_block_transfers(backend):
    assert selected(num_transfer=4, block_length=2) == [0, 1]
    assert selected(threshold=0.5, block_length=2) == [1]


def test_counts_per_row(backend):
    confidence, masked = CONFIDENCE.repeat(3, 1), MASKED.repeat(3, 1)
    for dtype in (torch.int32, torch.int64):
        chosen = fk.select_transfer(confidence, masked, num_transfer=torch.tensor([0, 2, 99], dtype=dtype))
        assert chosen.sum(-1).tolist() == [0, 2, 4]


def test_thresholds_per_row(backend):
    """A request each, in one call; a row whose threshold nothing reaches takes the first ranked."""
    confidence, masked = CONFIDENCE.repeat(5, 1), MASKED.repeat(5, 1)
    thresholds = torch.tensor([0.25, 0.5, 0.875, INF, float("nan")])
    chosen = fk.select_transfer(confidence, masked, threshold=thresholds)
    assert chosen.sum(-1).tolist() == [4, 3, 2, 1, 1]
    strided = torch.stack([thresholds, thresholds + 1], 1)[:, 0]
    counts = torch.tensor([1, 1, 1, 2, 3])
    chosen = fk.select_transfer(confidence, masked, num_transfer=counts, threshold=strided, rule="strict")
    assert chosen.sum(-1).tolist() == [3, 2, 1, 2, 3]
    assert selected(threshold=torch.tensor(0.5)) == [1, 2, 3]


def test_nothing_to_transfer(backend):
    """No masked position; none that can be ranked; and a current block that is stuck."""
    none = torch.zeros(5, dtype=torch.bool)
    assert not fk.select_transfer(CONFIDENCE, none, threshold=0.0).any()
    assert not fk.select_transfer(torch.full((5,), -INF), MASKED, num_transfer=2).any()
    stuck = torch.tensor([-INF, float("nan"), 0.5, 0.9, 0.6])
    assert not fk.select_transfer(stuck, MASKED, block_length=2).any()


@pytest.mark.parametrize("case", golden_ops())
def test_golden(backend, case):
    masked = case["input_ids"] == case["mask_token_id"]
    chosen = fk.select_transfer(case["confidence"].float(), masked, threshold=case["threshold"], order=case["order"])
    assert torch.equal(torch.where(chosen, case["token_ids"].long(), case["input_ids"]), case["thresholded"])


@st.composite
def calls(draw):
    constants = Constants(draw)
    row = draw(rows(constants))
    num_transfer, shape = draw(st.integers(0, 50)), row.confidence.shape[:-1]
    dtype = constants.one_of([None, torch.int32, torch.int64])
    if dtype is not None:  # one count a row
        num_transfer = torch.randint(-1, 9, shape, dtype=dtype, generator=generator(draw(st.integers(0, 2**32))))
    threshold = constants.threshold()
    if threshold is not None and constants.one_of([False, True]):  # one threshold a row
        others = torch.rand(shape, generator=generator(draw(st.integers(0, 2**32))))
        threshold = torch.where(others < 0.5, torch.tensor(threshold, dtype=torch.float32), others)
        threshold = threshold.to(constants.one_of([torch.float32, torch.float64]))
    rule = "threshold" if threshold is None else constants.one_of(RULES)
    row.confidence = ranked_for(rule, row.confidence)
    return row, {
        "num_transfer": num_transfer,
        "threshold": threshold,
        "rule": rule,
        "fallback": constants.one_of(["top", "top_if_fewer", "top_always"]),
        "order": constants.order(),
        "block_length": draw(block_lengths()),
    }


def run(row, arguments):
    return fk.select_transfer(row.confidence, row.mask_index, **arguments)


@given(call=calls())
@settings(max_examples=400)
def test_agrees_with_the_oracle(native_backend, call):
    row, arguments = call
    chosen = run(*call)
    count, threshold, *rest = arguments.values()
    counts = (1, count) if isinstance(count, torch.Tensor) else (count, None)
    limits = (None, threshold) if isinstance(threshold, torch.Tensor) else (threshold, None)
    assert torch.equal(chosen, reference.select_transfer(row.confidence, row.mask_index, *counts, *limits, *rest))


@pytest.mark.parametrize("rule", RULES)
def test_thresholds_are_float64(backend, rule):
    """A confidence on either side of a threshold that is the same float32: for all rows, or one each."""
    if rule == "entropy_bound":  # the sum so far stays below it
        confidence, limits = torch.tensor([[-0.25, -0.5, -4, -4]]), [0.75, math.nextafter(0.75, 1.0)]
    else:
        confidence, limits = torch.tensor([[1.0, 0.75, 0.5, 0.5]]), [math.nextafter(0.75, 1.0), 0.75]
    if rule == "strict":
        limits[1] = math.nextafter(0.75, 0.0)
    if rule == "factor":
        limits = [3 * (1 - limit) for limit in limits]  # the second's bar is 1 - threshold / 3
    passing = [[True, False, False, False], [True, True, False, False]]
    masked = torch.ones(2, 4, dtype=torch.bool)
    for limit, expected in zip(limits, passing, strict=True):
        chosen = fk.select_transfer(confidence, masked[:1], threshold=limit, rule=rule, num_transfer=0)
        assert chosen.tolist() == [expected]
    each = torch.tensor(limits, dtype=torch.float64)
    rows = confidence.expand(2, 4)
    assert fk.select_transfer(rows, masked, threshold=each, rule=rule, num_transfer=0).tolist() == passing


def test_opcheck_and_compile():
    confidence, masked = torch.rand(2, 9), torch.rand(2, 9) < 0.5
    op = torch.ops.freedave.select_transfer.default
    torch.library.opcheck(op, (confidence, masked, 2, None, 0.5, None, "strict", "top_always", "confidence", 4))
    torch.library.opcheck(op, (confidence, masked, 1, torch.tensor([1, 2]), None, torch.tensor([0.2, 0.8])))
    compiled = torch.compile(lambda c, m: ~fk.select_transfer(c, m, threshold=0.4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(confidence, masked), ~fk.select_transfer(confidence, masked, threshold=0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"confidence": CONFIDENCE.half()}, TypeError, "confidence must be float32, got float16"),
        ({"mask_index": MASKED[:3]}, ValueError, r"mask_index must have shape \(5,\)"),
        ({"num_transfer": -1}, ValueError, "num_transfer must be at least 0, got -1"),
        ({"num_transfer": 1.5}, TypeError, "num_transfer must be an int, got float"),
        ({"num_transfer": torch.tensor([1, 2])}, ValueError, r"num_transfer must have shape \(\)"),
        ({"num_transfer": torch.tensor(1.0)}, TypeError, "num_transfer must be int32 or int64, got float32"),
        ({"threshold": torch.tensor([0.5])}, ValueError, r"threshold must have shape \(\)"),
        ({"threshold": torch.tensor(0.5).half()}, TypeError, "threshold must be float32 or float64, got float16"),
        ({"threshold": torch.tensor(0.5, device="meta")}, ValueError, elsewhere("threshold", "confidence")),
        ({"threshold": "high"}, TypeError, "threshold must be a float, got str"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
        ({"rule": "softer"}, ValueError, "rule must be one of threshold, strict, factor, entropy_bound, got 'softer'"),
        ({"rule": True}, TypeError, "rule must be a str, got bool"),
        ({"rule": "factor"}, ValueError, "rule='factor' needs a threshold, its number; got None"),
        ({"fallback": "none"}, ValueError, "fallback must be one of top, top_if_fewer, top_always, got 'none'"),
        ({"order": "up"}, ValueError, "order must be one of"),
        ({"block_length": -4}, ValueError, "block_length must be at least 1, got -4"),
        ({"mask_index": MASKED.to("meta")}, ValueError, elsewhere("mask_index", "confidence")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    with pytest.raises(error, match="select_transfer: " + message):
        fk.select_transfer(**({"confidence": CONFIDENCE, "mask_index": MASKED} | change))
