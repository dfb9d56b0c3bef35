"""build_drafts: the contract, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, MASK, Constants, alone, block_lengths, predictions, ranked_for

import freedave_kernels as fk

M = MASK
IDS = torch.tensor([[1, M, M, M, M]])
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])
CONFIDENCE = torch.tensor([[-INF, 0.5, 0.9, 0.5, 0.7]])


def test_example(backend):
    """Four drafts, each with one more position filled; the most confident first, ties to the lower position."""
    drafts, num_drafts = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, draft_steps=5)
    assert drafts[0].tolist() == [[1, M, 3, M, M], [1, M, 3, M, 5], [1, 2, 3, M, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert num_drafts.tolist() == [4] and num_drafts.dtype == torch.int32


def test_several_tokens_a_step(backend):
    drafts, num_drafts = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 4, tokens_per_step=3)
    assert drafts[0, :2].tolist() == [[1, 2, 3, M, 5], [1, 2, 3, 4, 5]] and num_drafts.tolist() == [2]


def test_a_step_never_crosses_a_block(backend):
    """Static decoding finishes a block first: with 3 positions left in it, steps of 2 take 2, then 1, then 2."""
    ids, tokens = torch.full((1, 6), M), torch.arange(6)[None]
    confidence = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.8, 0.7]])
    drafts, num_drafts = fk.build_drafts(ids, tokens, confidence, M, 5, tokens_per_step=2, block_length=3)
    assert [(draft != M).sum().item() for draft in drafts[0]] == [2, 3, 5, 6, 6]
    assert num_drafts.tolist() == [4]


def test_threshold(backend):
    drafts, num_drafts = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 4, threshold=0.6)
    assert drafts[0, :3].tolist() == [[1, M, 3, M, 5], [1, 2, 3, M, 5], [1, 2, 3, 4, 5]] and num_drafts.tolist() == [3]


@pytest.mark.parametrize(("rule", "threshold"), [("strict", 0.5), ("factor", 1.2), ("entropy_bound", 0.5)])
def test_rules(backend, rule, threshold):
    """Draft 0 is what a step of `select_transfer` commits, each further one adds one position."""
    confidence = torch.where(CONFIDENCE == 0.9, 9.0, CONFIDENCE - 1) if rule == "entropy_bound" else CONFIDENCE
    drafts, num_drafts = fk.build_drafts(IDS, TOKENS, confidence, M, 4, threshold=threshold, rule=rule)
    assert drafts[0, :3].tolist() == [[1, M, 3, M, 5], [1, 2, 3, M, 5], [1, 2, 3, 4, 5]] and num_drafts.tolist() == [3]


def test_a_predicted_mask_fills_nothing(backend):
    """However sure of it the model is: its position counts as not predicted, and stalls its block."""
    tokens = torch.tensor([[1, M, 3, 4, 5]])
    confidence = torch.tensor([[-INF, 0.99, 0.5, 0.4, 0.3]])
    drafts, num_drafts = fk.build_drafts(IDS, tokens, confidence, M, 4)
    assert drafts[0].tolist() == [[1, M, 3, M, M], [1, M, 3, 4, M], [1, M, 3, 4, 5], [1, M, 3, 4, 5]]
    assert num_drafts.tolist() == [3]
    drafts, num_drafts = fk.build_drafts(IDS, tokens, confidence, M, 4, block_length=3, threshold=0.3)
    assert drafts[0].tolist() == [[1, M, 3, M, M]] * 4 and num_drafts.tolist() == [1]


def test_nothing_beyond_a_block_that_cannot_finish(backend):
    confidence = torch.tensor([[-INF, 0.5, -INF, 0.5, 0.7]])
    drafts, num_drafts = fk.build_drafts(IDS, TOKENS, confidence, M, 4, block_length=3)
    assert drafts[0, -1].tolist() == [1, 2, M, M, M] and num_drafts.tolist() == [1]


def test_nothing_masked(backend):
    drafts, num_drafts = fk.build_drafts(TOKENS, TOKENS, CONFIDENCE, M, 3)
    assert torch.equal(drafts[0], TOKENS.repeat(3, 1)) and num_drafts.tolist() == [0]


@pytest.mark.parametrize("case", golden_ops())
def test_golden(backend, case):
    arguments = case["input_ids"], case["token_ids"].long(), case["confidence"].float(), case["mask_token_id"]
    drafts, num_drafts = fk.build_drafts(*arguments, case["draft_steps"], order=case["order"])
    assert torch.equal(drafts, case["drafts"])
    masked = (case["input_ids"] == case["mask_token_id"]).sum(-1)
    assert num_drafts.tolist() == masked.clamp(max=case["draft_steps"]).tolist()
    assert torch.equal(fk.build_drafts(*arguments, 1, order=case["order"])[0][:, 0], case["one"])


@st.composite
def calls(draw, batch=None):
    constants = Constants(draw)
    arguments = {
        "draft_steps": draw(st.integers(1, 12)),
        "tokens_per_step": draw(st.integers(1, 5)),
        **constants.rule(),
        "order": constants.order(),
        "block_length": draw(block_lengths()),
    }
    prediction = draw(predictions(constants, batch))
    prediction.confidence = ranked_for(arguments["rule"], prediction.confidence)
    return prediction, constants.of_each(arguments, len(prediction.input_ids))


def run(prediction, arguments, rows=slice(None)):
    return fk.build_drafts(
        prediction.input_ids[rows], prediction.token_ids[rows], prediction.confidence[rows], M, **arguments
    )


@given(call=calls())
@settings(max_examples=400)
def test_agrees_with_the_oracle(native_backend, call):
    prediction, arguments = call
    drafts, num_drafts = run(prediction, arguments)
    with fk.use_backend("reference"):
        expected = run(prediction, arguments)
    assert torch.equal(drafts, expected[0]) and torch.equal(num_drafts, expected[1])


@given(call=calls())
def test_one_ranking_gives_every_draft(backend, call):
    """Without blocks, draft k is `rank < tokens_per_step * (k + 1)`."""
    prediction, arguments = call
    draft_steps, tokens_per_step, order = (arguments[name] for name in ("draft_steps", "tokens_per_step", "order"))
    tokens = torch.as_tensor(tokens_per_step).clamp(min=1).expand(len(prediction.input_ids))
    masked = prediction.input_ids == M
    confidence = torch.where(prediction.token_ids == M, -INF, prediction.confidence)  # a predicted mask is none
    rank = fk.rank_positions(confidence, masked, order=order)
    drafts, num_drafts = fk.build_drafts(
        prediction.input_ids, prediction.token_ids, prediction.confidence, M, draft_steps,
        tokens_per_step=tokens_per_step, order=order,
    )  # fmt: skip
    for k in range(draft_steps):
        ranked = (rank < tokens[:, None] * (k + 1)) & (rank < rank.shape[-1])
        assert torch.equal(drafts[:, k], torch.where(ranked, prediction.token_ids, prediction.input_ids))
    ranked = zip((masked & (confidence > -INF)).sum(-1).tolist(), tokens.tolist(), strict=True)
    assert num_drafts.tolist() == [min(draft_steps, math.ceil(count / size)) for count, size in ranked]


@given(call=calls(batch=5))
@settings(max_examples=50)
def test_a_sequence_does_not_depend_on_its_batch(backend, threads, call):
    together = run(*call)
    one_by_one = [run(call[0], alone(call[1], row), slice(row, row + 1)) for row in range(5)]
    assert torch.equal(together[0], torch.cat([drafts for drafts, _ in one_by_one]))
    assert torch.equal(together[1], torch.cat([count for _, count in one_by_one]))


def test_settings_of_each_sequence(backend):
    """Requests of a batch, each with its own; NaN is no threshold, and every step fills something."""
    ids, tokens, confidence = (x.repeat(5, 1) for x in (IDS, TOKENS, CONFIDENCE))
    for dtype in (torch.int32, torch.int64):
        sizes = torch.tensor([[1, 9], [2, 9], [3, 9], [2**31 - 1, 9], [0, 9]], dtype=dtype)[:, 0]
        drafts, num_drafts = fk.build_drafts(ids, tokens, confidence, M, 2, tokens_per_step=sizes)
        for row, size in enumerate([1, 2, 3, 5, 1]):
            expected = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 2, tokens_per_step=size)
            assert torch.equal(drafts[row], expected[0][0]) and num_drafts[row] == expected[1][0]
    thresholds = torch.tensor([0.3, 0.6, INF, float("nan"), -1.0])
    drafts, _ = fk.build_drafts(ids, tokens, confidence, M, 3, tokens_per_step=2, threshold=thresholds)
    for row, threshold in enumerate([0.3, 0.6, INF, None, -1.0]):
        expected = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 3, tokens_per_step=2, threshold=threshold)
        assert torch.equal(drafts[row], expected[0][0]), threshold


def test_strided_inputs(backend):
    wide = [torch.stack([x, x + 1], 1)[:, 0] for x in (IDS, TOKENS)]
    confidence = torch.stack([CONFIDENCE, CONFIDENCE * 2], -1)[..., 0]
    expected = fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 3)
    assert torch.equal(fk.build_drafts(*wide, confidence, M, 3)[0], expected[0])


def test_opcheck_and_compile():
    op = torch.ops.freedave.build_drafts.default
    torch.library.opcheck(op, (IDS, TOKENS, CONFIDENCE, M, 3))
    torch.library.opcheck(op, (IDS, TOKENS, CONFIDENCE, M, 3, 2, None, 0.5, None, "factor", "left_to_right", 2))
    torch.library.opcheck(op, (IDS, TOKENS, CONFIDENCE, M, 3, 1, torch.tensor([2]), None, torch.tensor([0.5])))
    compiled = torch.compile(lambda *a: fk.build_drafts(*a, M, 3)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS, TOKENS, CONFIDENCE), fk.build_drafts(IDS, TOKENS, CONFIDENCE, M, 3)[0] + 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must have shape \[B, L\], got \(5,\)"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64, got float32"),
        ({"input_ids": IDS[:, :0]}, ValueError, "input_ids must have at least one position"),
        ({"token_ids": TOKENS[:, :4]}, ValueError, r"token_ids must have shape \(1, 5\)"),
        ({"token_ids": TOKENS.short()}, TypeError, "token_ids must be int64, got int16"),
        ({"confidence": CONFIDENCE.double()}, TypeError, "confidence must be float32, got float64"),
        ({"confidence": CONFIDENCE[0]}, ValueError, r"confidence must have shape \(1, 5\)"),
        ({"mask_token_id": "m"}, TypeError, "mask_token_id must be an int, got str"),
        ({"draft_steps": 0}, ValueError, "draft_steps must be at least 1, got 0"),
        ({"tokens_per_step": 0}, ValueError, "tokens_per_step must be at least 1, got 0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
        ({"tokens_per_step": torch.tensor([1, 2])}, ValueError, r"tokens_per_step must have shape \(1,\)"),
        ({"tokens_per_step": torch.tensor([1.0])}, TypeError, "tokens_per_step must be int32 or int64, got float32"),
        ({"threshold": torch.tensor(0.5)}, ValueError, r"threshold must have shape \(1,\)"),
        ({"threshold": torch.tensor([0.5]).half()}, TypeError, "threshold must be float32 or float64, got float16"),
        ({"threshold": torch.tensor([0.5], device="meta")}, ValueError, elsewhere("threshold", "input_ids")),
        ({"rule": "f", "threshold": 0.5}, ValueError, "rule must be one of"),
        ({"rule": "strict"}, ValueError, "rule='strict' needs a threshold, its number; got None"),
        ({"order": "x"}, ValueError, "order must be one of"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"token_ids": TOKENS.to("meta")}, ValueError, elsewhere("token_ids", "input_ids")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    arguments = {
        "input_ids": IDS,
        "token_ids": TOKENS,
        "confidence": CONFIDENCE,
        "mask_token_id": M,
        "draft_steps": 2,
    }
    with pytest.raises(error, match="build_drafts: " + message):
        fk.build_drafts(**(arguments | change))
