"""draft_step: the contract, on every backend."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, MASK, Constants, alone, block_lengths, choose, generator, ranked_for, verifications

import freedave_kernels as fk
from freedave_kernels.contract import COUNTERS

M = MASK
# Two drafts of [M, M, M, M]: the second fills one more position.
DRAFTS = torch.tensor([[[1, M, M, M], [1, 2, M, M]]])
TOKENS = torch.tensor([[[1, 2, 3, 4], [1, 2, 3, 5]]])
CONFIDENCE = torch.tensor([[[-INF, 0.9, 0.8, 0.7], [-INF, -INF, 0.5, 0.6]]])
ACTIVE = torch.tensor([2], dtype=torch.int32)


def test_example(backend):
    """Draft 1 is what static decoding reaches from draft 0, so it is accepted; its prediction seeds the next drafts."""
    step = fk.draft_step(DRAFTS, TOKENS, CONFIDENCE, ACTIVE, M, draft_steps=2)
    assert step.accepted.tolist() == [1]
    assert step.drafts[0].tolist() == [[1, 2, M, 5], [1, 2, 3, 5]] and step.num_drafts.tolist() == [2]
    assert step.token_ids.tolist() == [[1, 2, 3, 5]] and step.confidence[0, 2:].tolist() == pytest.approx([0.5, 0.6])
    assert step.step_map.tolist() == [[-1, 0, -1, 1]]  # two static steps in one call
    assert dict(zip(COUNTERS, step.counters[0].tolist(), strict=True)) == {
        "accepted": 1,
        "steps": 2,
        "tokens_committed": 2,
        "masked_in_block": 1,
        "masked_in_window": 1,
        "prefix_length": 0,
        "forward_drafts": 1,
        "finished": 0,
        "non_finite": -1,
        "num_drafts": 2,
        "ended": 0,
    }


def test_static_decoding_is_one_draft(backend):
    step = fk.draft_step(DRAFTS[:, :1], TOKENS[:, :1], CONFIDENCE[:, :1], torch.tensor([1]), M, draft_steps=1)
    assert step.drafts.tolist() == [[[1, 2, M, M]]] and step.steps.tolist() == [1]


def test_recycled_drafts_follow_the_rejected_ones(backend):
    """Draft 1 guessed the wrong position, yet knew that position 3 would be surer than 2 by now."""
    drafts = torch.tensor([[[1, M, M, M], [1, M, 3, M]]])
    confidence = torch.tensor([[[-INF, 0.9, 0.8, 0.7], [-INF, 0.5, -INF, 0.6]]])
    tokens = torch.tensor([[[1, 2, 3, 4], [1, 2, 3, 5]]])
    nested = fk.draft_step(drafts, tokens, confidence, ACTIVE, M, 3, drafting="nested")
    recycled = fk.draft_step(drafts, tokens, confidence, ACTIVE, M, 3, drafting="recycled")
    assert nested.accepted.tolist() == recycled.accepted.tolist() == [0]
    assert nested.drafts[0].tolist() == [[1, 2, M, M], [1, 2, 3, M], [1, 2, 3, 4]]
    # Draft 0 [1 2 M M] is nearest to input draft 0; then [1 2 3 M], nearest to input draft 1, takes its token 5.
    assert recycled.drafts[0].tolist() == [[1, 2, M, M], [1, 2, 3, M], [1, 2, 3, 5]]


def test_end_of_sequence(backend):
    """A complete block that contains the end-of-sequence token ends the sequence, whatever is masked after it."""
    drafts = torch.tensor([[[1, 2, M, M]], [[1, M, M, M]]])
    tokens = torch.tensor([[[1, 2, 3, 3]], [[1, 2, 3, 3]]])
    confidence = torch.where(drafts == M, 0.5, -INF)
    step = fk.draft_step(drafts, tokens, confidence, torch.tensor([1, 1]), M, 2, block_length=2, eos_token_id=2)
    assert step.ended.tolist() == [1, 1] and step.finished.tolist() == [1, 1]
    assert step.prefix_length.tolist() == [2, 0]  # the second block was completed only now: not in the forward's cache
    step = fk.draft_step(drafts, tokens, confidence, torch.tensor([1, 1]), M, 2, block_length=4, eos_token_id=2)
    assert step.ended.tolist() == [0, 0]


def test_an_end_inside_a_block(backend):
    """Wherever in a finished block it stands; not in the prompt, which may begin before the window or go beyond it."""
    drafts = torch.tensor([[[1, 2, 3, M, M, M]]] * 6 + [[[1, 3, 2, M, M, M]]])
    tokens = torch.where(drafts == M, 4, drafts)
    confidence = torch.where(drafts == M, 0.5, -INF)
    call = (drafts, tokens, confidence, torch.ones(7, dtype=torch.int64), M, 2)
    answer_start = torch.tensor([0, 1, 2, -5, 2**40, -(2**40), 2])
    step = fk.draft_step(*call, block_length=3, eos_token_id=2, answer_start=answer_start)
    assert step.ended.tolist() == step.finished.tolist() == [1, 1, 0, 1, 0, 1, 1]
    step = fk.draft_step(*call, block_length=3, eos_token_id=2)
    assert step.ended.tolist() == [1] * 7
    step = fk.draft_step(*call, block_length=3, answer_start=answer_start)
    assert step.ended.tolist() == [0] * 7
    step = fk.draft_step(*call, block_length=4, eos_token_id=2)  # 3 is the last of its block: finished by this call
    assert step.ended.tolist() == [1] * 7
    step = fk.draft_step(*call, block_length=5, eos_token_id=2)
    assert step.ended.tolist() == [0] * 7


def test_non_finite_logits_are_reported(backend):
    confidence = CONFIDENCE.clone()
    confidence[0, :, 2] = -INF
    step = fk.draft_step(DRAFTS, TOKENS, confidence, ACTIVE, M, 2)
    assert step.non_finite.tolist() == [2]
    far = fk.draft_step(DRAFTS, TOKENS, confidence, ACTIVE, M, 2, block_length=2)
    assert far.non_finite.tolist() == [2]  # the accepted draft has finished block 0: block 1 is its current one
    near = fk.draft_step(DRAFTS[:, :1], TOKENS[:, :1], confidence[:, :1], torch.tensor([1]), M, 2, block_length=2)
    assert near.non_finite.tolist() == [-1]  # nothing is decided there yet


@pytest.mark.parametrize("drafting", ["nested", "recycled"])
def test_a_predicted_mask_is_no_prediction(backend, drafting):
    """Its position is reported as one of non-finite logits is, and no step ever fills it."""
    tokens = torch.tensor([[[1, M, 2]]])
    confidence = torch.tensor([[[0.5, 0.99, 0.9]]])
    step = fk.draft_step(torch.full((1, 1, 3), M), tokens, confidence, ACTIVE, M, 4, drafting=drafting)
    assert step.drafts[0].tolist() == [[M, M, 2], [1, M, 2], [1, M, 2], [1, M, 2]]
    assert step.num_drafts.tolist() == [2] and step.forward_drafts.tolist() == [2]
    assert step.non_finite.tolist() == [1]
    assert step.token_ids.tolist() == tokens[:, 0].tolist()
    assert step.confidence.tolist() == [[0.5, -INF, pytest.approx(0.9)]]

    stuck = fk.draft_step(step.drafts[:, 1:2], tokens, confidence, ACTIVE, M, 4, drafting=drafting)
    assert stuck.drafts[0].tolist() == [[1, M, 2]] * 4
    assert dict(zip(COUNTERS, stuck.counters[0].tolist(), strict=True)) == {
        "accepted": 0,
        "steps": 0,
        "tokens_committed": 0,
        "masked_in_block": 1,
        "masked_in_window": 1,
        "prefix_length": 0,
        "forward_drafts": 0,
        "finished": 0,
        "non_finite": 1,
        "num_drafts": 0,
        "ended": 0,
    }


@pytest.mark.parametrize("drafting", ["nested", "recycled"])
def test_a_step_that_fills_nothing_is_none(backend, drafting):
    """Where nothing can be ranked, a draft equals its own target, and so may a later one."""
    drafts = torch.tensor([[[1, M, M], [1, M, M], [1, 2, M]]])
    tokens = torch.tensor([[[1, M, M], [1, 2, M], [1, 2, 3]]])
    confidence = torch.tensor([[[-INF, -INF, -INF], [-INF, 0.9, 0.8], [-INF, -INF, 0.7]]])
    step = fk.draft_step(drafts, tokens, confidence, torch.tensor([3]), M, 2, drafting=drafting)
    assert step.accepted.tolist() == [2] and step.steps.tolist() == step.tokens_committed.tolist() == [2]
    assert step.step_map.tolist() == [[-1, 0, 1]]
    step = fk.draft_step(drafts[:, :2], tokens[:, :1].repeat(1, 2, 1), confidence[:, :2], ACTIVE, M, 2)
    assert step.accepted.tolist() == [1] and step.steps.tolist() == step.tokens_committed.tolist() == [0]


def documented_loop(
    model: Callable[[torch.Tensor], torch.Tensor], window: torch.Tensor, omit: str = ""
) -> torch.Tensor:
    """What the loop in the package's documentation makes of `window`, without the text `omit`."""
    code = textwrap.dedent(re.search(r"::\n\n((?:    .*\n|\n)+)", fk.__doc__)[1])
    assert omit in code
    scope = {"torch": torch, "model": model, "window": window, "mask_token_id": M}
    exec(code.replace(omit, ""), scope)
    return scope["drafts"][:, 0]


def logits_by_position(drafts: torch.Tensor) -> torch.Tensor:
    """Position i predicts token i, the surer the further left; position 2 predicts the mask, and its own token next."""
    logits = torch.zeros(*drafts.shape, M + 1)
    for i in range(drafts.shape[-1]):
        logits[..., i, i] = 9.0 - i
    logits[..., 2, M] = 20.0
    return logits


def test_the_documented_loop(backend):
    """It ends: with all positions filled, or with an error where one never can be."""
    window = torch.tensor([[M, M, M, M], [1, 1, M, M], [1, 1, 1, 1]])
    expected = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 3], [1, 1, 1, 1]])
    assert torch.equal(documented_loop(logits_by_position, window), expected)
    message = r"nothing to commit; without a prediction: positions \[2, 2, -1\]"
    with pytest.raises(RuntimeError, match=message):
        documented_loop(logits_by_position, window, omit=", suppress_tokens=[mask_token_id]")
    with pytest.raises(RuntimeError, match=message):
        documented_loop(lambda drafts: logits_by_position(drafts).index_fill(2, torch.tensor(2), INF), window)


@pytest.mark.parametrize("drafting", ["nested", "recycled"])
@pytest.mark.parametrize("case", golden_ops())
def test_golden(backend, case, drafting):
    mask = case["mask_token_id"]
    active = (case["input_ids"] == mask).sum(-1).clamp(max=case["draft_steps"])
    token_ids, confidence = fk.predict_tokens(case["draft_logits"], case["drafts"], mask)
    step = fk.draft_step(
        case["drafts"], token_ids, confidence, active, mask, case["draft_steps"], order=case["order"], drafting=drafting
    )
    assert torch.equal(step.accepted, case["accepted_exact"].long())
    rows = torch.arange(len(active))
    assert torch.equal(step.drafts[:, 0], case["targets"][rows, step.accepted])


@st.composite
def calls(draw):
    constants = Constants(draw)
    order, block_length = constants.order(), draw(block_lengths())
    tokens_per_step = draw(st.sampled_from([1, 1, 2, 3]))
    state = draw(verifications(constants, block_length, order, tokens_per_step))
    arguments = {
        "draft_steps": draw(st.integers(1, 9)),
        "tokens_per_step": tokens_per_step,
        **constants.rule(),
        "order": order,
        "block_length": block_length,
        "drafting": constants.one_of(["recycled", "nested"]),
        "match": constants.one_of(["exact", "exact", "subset"]),
        "eos_token_id": constants.one_of([None, 0, 3]),
        "step": constants.one_of([None, torch.arange(len(state.num_drafts)) * 10]),
        "answer_start": constants.one_of([None, torch.arange(len(state.num_drafts)) * 3 - 2]),
    }
    state.confidence = ranked_for(arguments["rule"], state.confidence)
    return state, constants.of_each(arguments, len(state.num_drafts))


def assert_same(ours, theirs, name):
    """Bitwise, with NaN equal to NaN."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


def assert_same_step(ours, record):
    """Bitwise, part by part for the message, and then all of it."""
    theirs = fk.DraftStep(record, ours.draft_steps)
    for name in ("counters", "token_ids", "step_map", "drafts", "confidence"):
        assert_same(getattr(ours, name), getattr(theirs, name), name)
    assert torch.equal(ours.record, record)


def run(state, arguments):
    return fk.draft_step(state.drafts, state.token_ids, state.confidence, state.num_drafts, M, **arguments)


@given(call=calls())
@settings(max_examples=600)
def test_agrees_with_the_oracle(native_backend, call):
    state, arguments = call
    with fk.use_backend("reference"):
        expected = run(state, arguments)
    assert_same_step(run(state, arguments), expected.record)


@given(call=calls())
@settings(max_examples=300)
def test_equals_the_composition_of_the_other_ops(backend, call):
    state, arguments = call
    static = {name: arguments[name] for name in ("tokens_per_step", "threshold", "rule", "order", "block_length")}
    step = run(state, arguments)
    batch = state.drafts.shape[0]

    flat = [x.flatten(0, 1) for x in (state.drafts, state.token_ids, state.confidence)]
    of_each_draft = {
        name: value.repeat_interleave(state.drafts.shape[1]) if isinstance(value, torch.Tensor) else value
        for name, value in static.items()
    }
    targets = fk.build_drafts(*flat, M, 1, **of_each_draft)[0].view_as(state.drafts)
    accepted = fk.verify_drafts(
        state.drafts, targets, num_drafts=state.num_drafts, match=arguments["match"], mask_token_id=M
    )
    assert torch.equal(step.accepted, accepted)

    rows = torch.arange(batch)
    carried = [x[rows, accepted] for x in (state.drafts, state.token_ids, state.confidence)]
    drafts, num_drafts = fk.build_drafts(*carried, M, arguments["draft_steps"], **static)
    assert torch.equal(step.token_ids, carried[1])
    assert_same(step.confidence, torch.where(carried[1] == M, -INF, carried[2]), "confidence")
    assert torch.equal(step.drafts[:, 0], drafts[:, 0])
    if arguments["drafting"] == "nested":
        assert torch.equal(step.drafts, drafts) and torch.equal(step.num_drafts, num_drafts)

    committed = step.drafts[:, 0]
    new = (state.drafts[:, 0] == M) & (committed != M)
    assert torch.equal(step.step_map >= 0, new)
    assert torch.equal(step.tokens_committed, new.sum(-1))
    assert (step.steps <= step.tokens_committed).all()
    assert torch.equal(step.steps > 0, step.tokens_committed > 0)
    assert torch.equal(step.masked_in_window, (committed == M).sum(-1))


@given(call=calls())
@settings(max_examples=50)
def test_a_sequence_does_not_depend_on_its_batch(backend, threads, call):
    state, arguments = call
    together = run(state, arguments)
    for b in range(len(state.num_drafts)):
        row = slice(b, b + 1)
        by_itself = fk.draft_step(
            state.drafts[row], state.token_ids[row], state.confidence[row], state.num_drafts[row], M,
            **alone(arguments, b),
        )  # fmt: skip
        assert torch.equal(together.record[row], by_itself.record), b


@pytest.mark.parametrize("drafting", ["nested", "recycled"])
def test_settings_of_each_sequence(backend, drafting):
    """Requests of a batch, each with its own; NaN is no threshold, a negative end none."""
    drafts = torch.tensor([[[1, 2, M, M, M, M]]]).repeat(4, 1, 1)
    tokens = torch.where(drafts == M, torch.tensor([0, 0, 3, 4, 5, 6]), drafts)
    confidence = torch.where(drafts == M, torch.tensor([0.0, 0, 0.6, 0.9, 0.8, 0.5]), -INF)
    ones = torch.ones(4, dtype=torch.int64)
    call, named = (drafts, tokens, confidence, ones, M, 3), {"drafting": drafting}
    step = fk.draft_step(*call, threshold=torch.tensor([0.5, 0.8, 2.0, float("nan")]), tokens_per_step=2, **named)
    assert step.masked_in_window.tolist() == [0, 2, 2, 2]
    assert [(draft == M).sum(-1).tolist() for draft in step.drafts] == [[0, 0, 0], [2, 1, 0], [2, 1, 0], [2, 0, 0]]
    for dtype in (torch.int32, torch.int64):
        sizes = torch.tensor([1, 2, 3, 0], dtype=dtype)
        step = fk.draft_step(*call, tokens_per_step=sizes, **named)
        assert step.masked_in_window.tolist() == [3, 2, 1, 3]
        ends = torch.tensor([2, 3, -1, 1], dtype=dtype)
        step = fk.draft_step(*call, eos_token_id=ends, block_length=2, answer_start=torch.tensor([1] * 4), **named)
        assert step.ended.tolist() == [1, 0, 0, 0]


def test_large_batches(native_backend, threads):
    """Enough work to be split over threads."""
    random = torch.Generator().manual_seed(0)
    drafts = torch.where(torch.rand(64, 8, 64, generator=random) < 0.7, M, 1).cummin(1).values
    token_ids = torch.where(drafts == M, torch.randint(M, drafts.shape, generator=random), drafts)
    confidence = torch.where(drafts == M, torch.rand(drafts.shape, generator=random), -INF)
    active = torch.full((64,), 8)
    step = fk.draft_step(drafts, token_ids, confidence, active, M, 16, block_length=16)
    with fk.use_backend("reference"):
        expected = fk.draft_step(drafts, token_ids, confidence, active, M, 16, block_length=16)
    assert torch.equal(step.record, expected.record)


LONG_RULES = [
    (1, None, "confidence", "threshold"),
    (3, None, "confidence", "threshold"),
    (2, 0.8, "left_to_right", "threshold"),
    (2, 3.0, "confidence", "factor"),
    (1, 1.0, "left_to_right", "factor"),
    (1, -3.0, "confidence", "entropy_bound"),
]


@pytest.mark.parametrize(
    ("length", "count", "block_length"), [(33, 32, 8), (64, 9, None), (200, 32, 1), (1024, 32, 96)]
)
@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
@pytest.mark.parametrize("drafting", ["recycled", "nested"])
def test_long_windows_and_many_drafts(native_backend, length, count, block_length, rule, drafting):
    """Windows of several warps, up to the most that the GPU kernels serve."""
    random = generator(length)
    state = torch.where(torch.rand(2, length, generator=random) < 0.8, M, 1)
    tokens = torch.randint(M, (2, length), generator=random)
    confidence = choose([0.1, 0.5, 0.7, 0.9, -INF, float("nan")], (2, length), random)
    static = dict(zip(("tokens_per_step", "threshold", "order", "rule"), rule, strict=True)) | {
        "block_length": block_length
    }
    with fk.use_backend("reference"):
        built, active = fk.build_drafts(state, tokens, confidence, M, count, **static)
    token_ids = torch.where(built == M, tokens[:, None], built)
    certainty = confidence[:, None].repeat(1, count, 1)
    certainty[:, count // 2 :] = torch.rand(2, count - count // 2, length, generator=random)
    call, named = (built, token_ids, certainty, active, M, count), static | {"drafting": drafting, "eos_token_id": 1}
    with fk.use_backend("reference"):
        expected = fk.draft_step(*call, **named)
    assert_same_step(fk.draft_step(*call, **named), expected.record)


def test_strided_inputs(backend):
    wide = [torch.stack([x, x + 1], 1)[:, 0] for x in (DRAFTS, TOKENS)]
    confidence = torch.stack([CONFIDENCE, CONFIDENCE * 2], -1)[..., 0]
    active = torch.tensor([[2, 9]])[:, 0]
    expected = fk.draft_step(DRAFTS, TOKENS, CONFIDENCE, ACTIVE, M, 3)
    assert torch.equal(fk.draft_step(*wide, confidence, active, M, 3).record, expected.record)


def test_opcheck_and_compile():
    op = torch.ops.freedave.draft_step.default
    torch.library.opcheck(op, (DRAFTS, TOKENS, CONFIDENCE, ACTIVE, M, 3))
    one = torch.tensor([1])
    for rule in ((2, None, 0.5, None, "strict"), (1, one, None, torch.tensor([0.5]), "factor")):
        everything = (M, 3, *rule, "left_to_right", 2, "nested", "subset", 0, one, one * 4, -one)
        torch.library.opcheck(op, (DRAFTS, TOKENS, CONFIDENCE, ACTIVE, *everything))

    def decode(logits, drafts, num_drafts):
        token_ids, confidence = fk.predict_tokens(logits, drafts, M)
        step = fk.draft_step(drafts, token_ids, confidence, num_drafts, M, 4)
        return step.drafts, step.accepted + 1

    logits = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(logits, DRAFTS, ACTIVE), decode(logits, DRAFTS, ACTIVE), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drafts": DRAFTS[0]}, ValueError, r"drafts must have shape \[B, J, L\], got \(2, 4\)"),
        ({"drafts": DRAFTS.short()}, TypeError, "drafts must be int64, got int16"),
        ({"drafts": [1]}, TypeError, "drafts must be a int64 tensor, got list"),
        ({"token_ids": TOKENS[:, :1]}, ValueError, r"token_ids must have shape \(1, 2, 4\)"),
        ({"token_ids": TOKENS.float()}, TypeError, "token_ids must be int64, got float32"),
        ({"confidence": CONFIDENCE.double()}, TypeError, "confidence must be float32, got float64"),
        ({"confidence": CONFIDENCE[:, :, :2]}, ValueError, r"confidence must have shape \(1, 2, 4\)"),
        ({"num_drafts": torch.tensor([2.0])}, TypeError, "num_drafts must be int32 or int64, got float32"),
        ({"num_drafts": torch.tensor([2, 2])}, ValueError, r"num_drafts must have shape \(1,\)"),
        ({"mask_token_id": None}, TypeError, "mask_token_id must be an int, got NoneType"),
        ({"draft_steps": 0}, ValueError, "draft_steps must be at least 1, got 0"),
        ({"tokens_per_step": -1}, ValueError, "tokens_per_step must be at least 1, got -1"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number, got nan"),
        ({"rule": "entropy"}, ValueError, "rule must be one of"),
        ({"rule": "entropy_bound"}, ValueError, "rule='entropy_bound' needs a threshold, its number; got None"),
        ({"order": "down"}, ValueError, "order must be one of"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"drafting": "tree"}, ValueError, "drafting must be one of recycled, nested, pooled, pipelined, got 'tree'"),
        ({"match": "some"}, ValueError, "match must be one of exact, subset, got 'some'"),
        ({"eos_token_id": "e"}, TypeError, "eos_token_id must be an int, got str"),
        ({"eos_token_id": torch.tensor([0.0])}, TypeError, "eos_token_id must be int32 or int64, got float32"),
        ({"eos_token_id": torch.tensor([0, 1])}, ValueError, r"eos_token_id must have shape \(1,\)"),
        ({"tokens_per_step": torch.tensor(1)}, ValueError, r"tokens_per_step must have shape \(1,\)"),
        ({"threshold": torch.tensor([1])}, TypeError, "threshold must be float32 or float64, got int64"),
        ({"threshold": torch.tensor([0.5], device="meta")}, ValueError, elsewhere("threshold", "drafts")),
        ({"step": torch.tensor([0], dtype=torch.int32)}, TypeError, "step must be int64, got int32"),
        ({"step": torch.tensor([0, 1])}, ValueError, r"step must have shape \(1,\)"),
        ({"answer_start": torch.tensor([0.0])}, TypeError, "answer_start must be int64, got float32"),
        ({"answer_start": torch.tensor([0, 1])}, ValueError, r"answer_start must have shape \(1,\)"),
        ({"num_drafts": ACTIVE.to("meta")}, ValueError, elsewhere("num_drafts", "drafts")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    arguments = {
        "drafts": DRAFTS,
        "token_ids": TOKENS,
        "confidence": CONFIDENCE,
        "num_drafts": ACTIVE,
        "mask_token_id": M,
        "draft_steps": 2,
    }
    with pytest.raises(error, match="draft_step: " + message):
        fk.draft_step(**(arguments | change))
