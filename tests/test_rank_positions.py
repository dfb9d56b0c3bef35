"""rank_positions: the contract, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, block_lengths, rows

import freedave_kernels as fk
from freedave_kernels.contract import MAX_LENGTH
from freedave_kernels.reference import rank_positions as reference


def test_example(backend):
    """Rank 0 is unmasked next; a position that is not masked gets L."""
    confidence = torch.tensor([0.2, 0.9, 0.9, 0.7, 1.0])
    mask_index = torch.tensor([True, True, True, True, False])
    rank = fk.rank_positions(confidence, mask_index)
    assert rank.dtype == torch.int32
    assert rank.tolist() == [3, 0, 1, 2, 5]  # the tie goes to the lower position


def test_left_to_right(backend):
    confidence = torch.tensor([0.2, 0.9, -INF, 0.7])
    rank = fk.rank_positions(confidence, torch.ones(4, dtype=torch.bool), order="left_to_right")
    assert rank.tolist() == [0, 1, 4, 2]  # never a position whose logits were broken


def test_lower_blocks_come_first(backend):
    confidence = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.95])
    rank = fk.rank_positions(confidence, torch.ones(5, dtype=torch.bool), block_length=2)
    assert rank.tolist() == [1, 0, 2, 3, 4]


@st.composite
def calls(draw):
    constants = Constants(draw)
    return draw(rows(constants)), constants.order(), draw(block_lengths())


def run(row, order, block_length):
    return fk.rank_positions(row.confidence, row.mask_index, order=order, block_length=block_length)


@given(call=calls())
def test_agrees_with_the_oracle(native_backend, call):
    row, order, block_length = call
    assert torch.equal(run(*call), reference.rank_positions(row.confidence, row.mask_index, order, block_length))


@given(call=calls())
def test_agrees_with_the_definition(backend, call):
    """Python's sort on the keys of the contract."""
    row, order, block_length = call
    rank = run(*call)
    length = rank.shape[-1]
    for confidence, masked, ranks in zip(
        row.confidence.reshape(-1, length), row.mask_index.reshape(-1, length), rank.reshape(-1, length), strict=True
    ):
        ranked = [i for i in range(length) if masked[i] and confidence[i] > -INF]
        ranked.sort(
            key=lambda i: (i // (block_length or length), -float(confidence[i]) if order == "confidence" else 0, i)
        )
        expected = [length] * length
        for position, index in enumerate(ranked):
            expected[index] = position
        assert ranks.tolist() == expected


@pytest.mark.parametrize("length", [33, 1000, 1024, 3000])
def test_long_rows(native_backend, length):
    if length > MAX_LENGTH and native_backend.startswith("cuda"):
        length = MAX_LENGTH - 1
    confidence = torch.rand(3, length).mul(50).round()
    masked = torch.rand(3, length) < 0.7
    assert torch.equal(
        fk.rank_positions(confidence, masked), reference.rank_positions(confidence, masked, "confidence", None)
    )


def test_opcheck_and_compile():
    confidence, masked = torch.rand(2, 9), torch.rand(2, 9) < 0.5
    torch.library.opcheck(torch.ops.freedave.rank_positions.default, (confidence, masked, "left_to_right", 4))
    compiled = torch.compile(
        lambda c, m: fk.rank_positions(c, m, block_length=3) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(confidence, masked), fk.rank_positions(confidence, masked, block_length=3) + 1)


CONFIDENCE, MASKED = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"confidence": CONFIDENCE.double()}, TypeError, "confidence must be float32, got float64"),
        ({"confidence": torch.tensor(1.0)}, ValueError, "confidence must have at least 1 dimensions"),
        ({"confidence": 0.5}, TypeError, "confidence must be a float32 tensor, got float"),
        ({"mask_index": MASKED.int()}, TypeError, "mask_index must be bool, got int32"),
        (
            {"mask_index": MASKED[:1]},
            ValueError,
            r"mask_index must have shape \(2, 4\) \(like confidence\), got \(1, 4\)",
        ),
        ({"mask_index": MASKED.to("meta")}, ValueError, elsewhere("mask_index", "confidence")),
        ({"order": "random"}, ValueError, "order must be one of confidence, left_to_right, got 'random'"),
        ({"order": None}, TypeError, "order must be a str, got NoneType"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": 2.0}, TypeError, "block_length must be an int, got float"),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    with pytest.raises(error, match="rank_positions: " + message):
        fk.rank_positions(**({"confidence": CONFIDENCE, "mask_index": MASKED} | change))
