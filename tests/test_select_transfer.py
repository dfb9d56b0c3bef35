"""select_transfer: the contract, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, block_lengths, generator, rows

import freedave_kernels as fk
from freedave_kernels.reference import select_transfer as reference

CONFIDENCE = torch.tensor([0.3, 0.9, 0.5, 0.9, 0.6])
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
    assert selected(threshold=0.9) == [1, 3]
    assert selected(threshold=0.9, strict=True) == [1]
    assert selected(threshold=0.5, strict=True) == [1, 3]


def test_fallbacks(backend):
    assert selected(threshold=0.9, num_transfer=3, fallback="top") == [1, 3]
    assert selected(threshold=0.9, num_transfer=3, fallback="top_if_fewer") == [1, 2, 3]
    assert selected(threshold=0.5, num_transfer=1, fallback="top_if_fewer") == [1, 2, 3]
    assert selected(threshold=0.95, num_transfer=2, fallback="top_always") == [1, 3]
    assert selected(threshold=0.5, num_transfer=1, fallback="top_always") == [1, 2, 3]
    assert selected(threshold=0.95, num_transfer=0) == []


def test_left_to_right_takes_the_leading_run(backend):
    assert selected(order="left_to_right", num_transfer=2) == [0, 1]
    assert selected(order="left_to_right", threshold=0.3) == [0, 1, 2, 3]
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
    thresholds = torch.tensor([0.3, 0.5, 0.9, INF, float("nan")])
    chosen = fk.select_transfer(confidence, masked, threshold=thresholds)
    assert chosen.sum(-1).tolist() == [4, 3, 2, 1, 1]
    strided = torch.stack([thresholds, thresholds + 1], 1)[:, 0]
    counts = torch.tensor([1, 1, 1, 2, 3])
    chosen = fk.select_transfer(confidence, masked, num_transfer=counts, threshold=strided, strict=True)
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
    return row, {
        "num_transfer": num_transfer,
        "threshold": threshold,
        "strict": constants.one_of([False, True]),
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


def test_opcheck_and_compile():
    confidence, masked = torch.rand(2, 9), torch.rand(2, 9) < 0.5
    op = torch.ops.freedave.select_transfer.default
    torch.library.opcheck(op, (confidence, masked, 2, None, 0.5, None, True, "top_always", "confidence", 4))
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
        ({"threshold": torch.tensor(0.5).double()}, TypeError, "threshold must be float32, got float64"),
        ({"threshold": torch.tensor(0.5, device="meta")}, ValueError, elsewhere("threshold", "confidence")),
        ({"threshold": "high"}, TypeError, "threshold must be a float, got str"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
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
