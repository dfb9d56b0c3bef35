"""verify_drafts: the contract, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import MASK, Constants, generator

import freedave_kernels as fk
from freedave_kernels.reference import verify_drafts as reference

M = MASK
DRAFTS = torch.tensor([[[1, M, M], [1, M, 3], [1, 2, 3]]])


def test_example(backend):
    """Static decoding agrees with the second draft but would then have chosen another token."""
    targets = torch.tensor([[[1, M, 3], [1, 6, 3], [1, 2, 3]]])
    assert fk.verify_drafts(DRAFTS, targets).tolist() == [1]
    agreed = torch.tensor([[[1, M, 3], [1, 2, 3], [1, 2, 3]]])
    accepted = fk.verify_drafts(DRAFTS, agreed)
    assert accepted.tolist() == [2] and accepted.dtype == torch.int64


def test_inactive_drafts_are_never_accepted(backend):
    targets = torch.tensor([[[1, M, 3], [1, 2, 3], [1, 2, 3]]])
    for active, expected in ((0, 0), (1, 0), (2, 1), (3, 2), (9, 2)):
        assert fk.verify_drafts(DRAFTS, targets, num_drafts=torch.tensor([active])).tolist() == [expected]


def test_the_walk_may_skip_drafts(backend):
    """A threshold can commit several positions in one static step: the target is then a later draft."""
    targets = torch.tensor([[[1, 2, 3], [0, 0, 0], [1, 2, 3]]])
    assert fk.verify_drafts(DRAFTS, targets).tolist() == [2]


def test_subset(backend):
    """Static decoding has committed more than the draft, and nothing else."""
    targets = torch.tensor([[[1, 2, 3], [1, 2, 3], [1, 2, 3]]])
    drafts = torch.tensor([[[1, M, M], [1, M, 3], [1, 4, 3]]])
    assert fk.verify_drafts(drafts, targets).tolist() == [0]
    assert fk.verify_drafts(drafts, targets, match="subset", mask_token_id=M).tolist() == [1]


@pytest.mark.parametrize("case", golden_ops())
def test_golden(backend, case):
    """The public implementation builds fewer drafts than asked near the end; those it repeats are inactive here."""
    masked = (case["input_ids"] == case["mask_token_id"]).sum(-1)
    active = masked.clamp(max=case["draft_steps"])
    exact = fk.verify_drafts(case["drafts"], case["targets"], num_drafts=active)
    assert torch.equal(exact, case["accepted_exact"].long())
    subset = fk.verify_drafts(
        case["drafts"], case["targets"], num_drafts=active, match="subset", mask_token_id=case["mask_token_id"]
    )
    assert torch.equal(subset, case["accepted_subset"].long())


@st.composite
def calls(draw):
    """Few tokens and short rows, so that drafts equal targets often, in and out of order."""
    constants = Constants(draw)
    shape = (draw(st.sampled_from([0, 1, 3])), constants.size(1, 8), constants.size(1, 4))
    random = generator(draw(st.integers(0, 2**32)))
    vocabulary = torch.tensor([0, 1, M])[: draw(st.integers(1, 3))]
    drafts, targets = (vocabulary[torch.randint(len(vocabulary), shape, generator=random)] for _ in range(2))
    num_drafts = None
    dtype = constants.one_of([None, torch.int32, torch.int64])
    if dtype is not None:
        num_drafts = torch.randint(0, shape[1] + 1, shape[:1], generator=random).to(dtype)
    return drafts, targets, num_drafts, constants.one_of(["exact", "subset"])


def run(drafts, targets, num_drafts, match):
    return fk.verify_drafts(drafts, targets, num_drafts=num_drafts, match=match, mask_token_id=M)


@given(call=calls())
@settings(max_examples=400)
def test_agrees_with_the_oracle(native_backend, call):
    drafts, targets, num_drafts, match = call
    accepted = run(*call)
    assert torch.equal(accepted, reference.verify_drafts(drafts, targets, num_drafts, match, M))


@given(call=calls())
def test_agrees_with_the_definition(backend, call):
    drafts, targets, num_drafts, match = call
    accepted = run(*call)
    for b in range(drafts.shape[0]):
        active = drafts.shape[1] if num_drafts is None else int(num_drafts[b])
        current = 0
        while True:
            open_there = (drafts[b] == M) if match == "subset" else torch.zeros_like(drafts[b], dtype=torch.bool)
            equal = ((drafts[b] == targets[b, current]) | open_there).all(-1).tolist()
            further = [j for j in range(current + 1, active) if equal[j]]
            if not further:
                break
            current = further[-1]
        assert accepted[b] == current


def test_opcheck_and_compile():
    op = torch.ops.freedave.verify_drafts.default
    torch.library.opcheck(op, (DRAFTS, DRAFTS))
    torch.library.opcheck(op, (DRAFTS, DRAFTS, torch.tensor([2]), "subset", M))
    compiled = torch.compile(lambda d, t: fk.verify_drafts(d, t) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(DRAFTS, DRAFTS), fk.verify_drafts(DRAFTS, DRAFTS) + 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drafts": DRAFTS[0]}, ValueError, r"drafts must have shape \[B, K, L\], got \(3, 3\)"),
        ({"drafts": DRAFTS.short()}, TypeError, "drafts must be int64, got int16"),
        ({"drafts": DRAFTS[:, :0], "targets": DRAFTS[:, :0]}, ValueError, "drafts must hold a draft and a position"),
        ({"targets": DRAFTS[:, :2]}, ValueError, r"targets must have shape \(1, 3, 3\)"),
        ({"targets": DRAFTS.float()}, TypeError, "targets must be int64, got float32"),
        ({"num_drafts": torch.tensor([1, 2])}, ValueError, r"num_drafts must have shape \(1,\)"),
        ({"num_drafts": torch.tensor([1.0])}, TypeError, "num_drafts must be int32 or int64, got float32"),
        ({"num_drafts": 2}, TypeError, "num_drafts must be a int32 or int64 tensor, got int"),
        ({"match": "fuzzy"}, ValueError, "match must be one of exact, subset, got 'fuzzy'"),
        ({"match": "subset"}, ValueError, "match='subset' needs mask_token_id"),
        ({"mask_token_id": 1.0}, TypeError, "mask_token_id must be an int, got float"),
        ({"targets": DRAFTS.to("meta")}, ValueError, elsewhere("targets", "drafts")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    with pytest.raises(error, match="verify_drafts: " + message):
        fk.verify_drafts(**({"drafts": DRAFTS, "targets": DRAFTS} | change))
