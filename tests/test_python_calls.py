"""Calls with CPU tensors go straight to the kernels; whatever only torch's dispatcher can do right goes through it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import freedave_kernels as fk
from freedave_kernels import _C, _library

MASK = 7
IDS = torch.full((2, 4), MASK)
LOGITS = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6).sin()
TOKENS = torch.arange(8).reshape(2, 4) % 6
CONFIDENCE = torch.arange(8, dtype=torch.float32).reshape(2, 4).cos()
DRAFTS = IDS[:, None]
COUNTS = torch.ones(2, dtype=torch.int32)

CALLS: dict[str, Callable[[torch.Tensor], object]] = {
    "predict_tokens": lambda logits: fk.predict_tokens(logits, IDS, MASK, suppress_tokens=[3]),
    "partial_predictions": lambda logits: fk.partial_predictions(logits, IDS, MASK, suppress_tokens=[3]),
    "merge_predictions": lambda states: fk.merge_predictions(states, IDS),
    "rank_positions": lambda confidence: fk.rank_positions(confidence, IDS == MASK),
    "select_transfer": lambda confidence: fk.select_transfer(confidence, IDS == MASK, threshold=0.5),
    "build_drafts": lambda confidence: fk.build_drafts(IDS, TOKENS, confidence, MASK, 3, block_length=2),
    "verify_drafts": lambda _: fk.verify_drafts(DRAFTS, DRAFTS, num_drafts=COUNTS),
    "draft_step": lambda confidence: fk.draft_step(DRAFTS, TOKENS[:, None], confidence[:, None], COUNTS, MASK, 3),
}
FLOAT = dict.fromkeys(CALLS, CONFIDENCE) | {
    "predict_tokens": LOGITS,
    "partial_predictions": LOGITS,
    "merge_predictions": fk.partial_predictions(LOGITS, IDS, MASK),
}


class Dispatched(Exception):
    """A call went to the dispatcher."""


@pytest.fixture
def no_dispatcher() -> Iterator[None]:
    """Raises `Dispatched` where a call would go through torch's dispatcher."""

    def refuse(*_: object) -> None:
        raise Dispatched

    assert _library.DIRECT_ERROR is None
    _C.connect(str(_library.PATH), torch.Tensor, dict.fromkeys(_library.OPS, refuse), _library.observers())
    yield
    assert _library._connect() is None


def equal(got: object, expected: object) -> None:
    if isinstance(got, tuple):
        assert type(got) is type(expected)
        for one, other in zip(got, expected, strict=True):
            equal(one, other)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", CALLS)
def test_cpu_tensors_do_not_meet_the_dispatcher(op, no_dispatcher):
    got = CALLS[op](FLOAT[op])
    with fk.use_backend("reference"):
        expected = CALLS[op](FLOAT[op])
    if FLOAT[op] is not CONFIDENCE:  # what is made of logits is the same to a rounding only
        torch.testing.assert_close(got, expected)
    else:
        equal(got, expected)


@pytest.mark.parametrize("op", CALLS)
def test_the_same_through_the_dispatcher(op):
    direct = CALLS[op](FLOAT[op])
    with torch.profiler.profile() as profile:
        equal(CALLS[op](FLOAT[op]), direct)
    assert f"freedave::{op}" in {event.name for event in profile.events() or ()}


@pytest.mark.parametrize("op", sorted(CALLS.keys() - {"verify_drafts"}))
def test_what_only_the_dispatcher_does_right(op, no_dispatcher):
    value = FLOAT[op]
    with pytest.raises(Dispatched):
        CALLS[op](torch.nn.Parameter(value))
    with pytest.raises(Dispatched):
        CALLS[op](value.clone().requires_grad_())
    with pytest.raises(Dispatched):
        CALLS[op](torch._neg_view(value))


def test_a_negated_view():
    """Its memory holds the opposite of its values."""
    value = CONFIDENCE.clone()
    expected = fk.rank_positions(-value, IDS == MASK)
    assert not torch.equal(expected, fk.rank_positions(value, IDS == MASK))
    equal(fk.rank_positions(torch._neg_view(value), IDS == MASK), expected)


def test_modes_see_the_calls():
    seen: list[object] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Dispatch():
        fk.rank_positions(CONFIDENCE, IDS == MASK)
    assert torch.ops.freedave.rank_positions.default in seen
    seen.clear()
    mask = IDS == MASK
    with Function():
        fk.rank_positions(CONFIDENCE, mask)
    assert "rank_positions" in str(seen)


def test_tracers_see_the_calls():
    mask = IDS == MASK
    traced = torch.jit.trace(lambda confidence: fk.rank_positions(confidence, mask), CONFIDENCE)
    assert "freedave::rank_positions" in str(traced.graph)
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda confidence: fk.rank_positions(confidence, mask))(CONFIDENCE)
    assert "freedave.rank_positions" in graph.code


def test_batched_tensors_are_not_read_as_plain_ones():
    batch = torch.stack([CONFIDENCE, -CONFIDENCE, CONFIDENCE.flip(1)])
    got = torch.vmap(lambda confidence: fk.rank_positions(confidence, IDS == MASK))(batch)
    equal(got, torch.stack([fk.rank_positions(confidence, IDS == MASK) for confidence in batch]))


def test_outputs_belong_to_inference_mode():
    with torch.inference_mode():
        assert fk.rank_positions(CONFIDENCE, IDS == MASK).is_inference()
    assert not fk.rank_positions(CONFIDENCE, IDS == MASK).is_inference()


def test_wrong_arguments_are_refused_as_ever():
    with pytest.raises(TypeError, match="rank_positions: confidence must be float32, got float64"):
        fk.rank_positions(CONFIDENCE.double(), IDS == MASK)
    with pytest.raises(ValueError, match="build_drafts: draft_steps must be at least 1, got 0"):
        fk.build_drafts(IDS, TOKENS, CONFIDENCE, MASK, 0)
    with pytest.raises(TypeError, match="verify_drafts: drafts must be a int64 tensor, got NoneType"):
        fk.verify_drafts(None, DRAFTS)
    with pytest.raises(ValueError, match="order must be one of confidence, left_to_right, got 'random'"):
        fk.rank_positions(CONFIDENCE, IDS == MASK, order="random")


def test_accepted_arguments():
    """What is right is not checked again in Python; what is wrong, or anything but plain values, is."""
    accepts = _C.accepts_build_drafts
    right = (IDS, TOKENS, CONFIDENCE, MASK, 3, 1, None, "confidence", 2)
    assert accepts(*right)
    assert accepts(*right[:6], 0.5, "left_to_right", None)
    for index, wrong in [
        (0, None), (0, IDS.int()), (1, TOKENS[:1]), (2, CONFIDENCE.half()), (2, CONFIDENCE.to("meta")), (3, 7.0), (3, 2**70),
        (4, 0), (5, -1), (6, "a"), (6, float("nan")), (7, "random"), (7, 3), (8, 0), (8, True),
    ]:  # fmt: skip
        assert not accepts(*right[:index], wrong, *right[index + 1 :]), (index, wrong)
    assert not accepts(*right[:-1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_refuse_wrong_arguments_in_the_same_words(backend):
    with (
        fk.use_backend(backend),
        pytest.raises(ValueError, match="build_drafts: draft_steps must be at least 1, got 0"),
    ):
        fk.build_drafts(IDS, TOKENS, CONFIDENCE, MASK, 0)


@pytest.mark.parametrize("draft_steps", [2**40, 2**62])
def test_outputs_larger_than_memory(draft_steps):
    with pytest.raises(RuntimeError):
        fk.build_drafts(IDS, TOKENS, CONFIDENCE, MASK, draft_steps)


def test_memory_and_references_are_given_back():
    ids = torch.full((1, 4096), MASK)
    tokens, confidence = torch.zeros_like(ids), torch.zeros(1, 4096)

    def calls(count: int) -> None:
        for _ in range(count):
            fk.build_drafts(ids, tokens, confidence, MASK, 16)  # half a megabyte

    calls(20)
    references = [sys.getrefcount(tensor) for tensor in (ids, tokens, confidence)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(400)  # 200 MB
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes
    assert references == [sys.getrefcount(tensor) for tensor in (ids, tokens, confidence)]
    assert grown < 50_000


def test_a_library_of_another_build(tmp_path):
    with pytest.raises(RuntimeError, match=r"nothing\.so and _C are not of the same build"):
        _C.connect(str(tmp_path / "nothing.so"), torch.Tensor, {}, ())
    assert fk.available_backends()["cpu"] is None
    fk.rank_positions(CONFIDENCE, IDS == MASK)


def test_a_torch_that_lacks_what_direct_calls_need(monkeypatch):
    monkeypatch.setattr(_library, "DIRECT_ERROR", AttributeError("of another torch"))
    assert _library.native_op("rank_positions") is torch.ops.freedave.rank_positions.default._op
    monkeypatch.undo()
    monkeypatch.delattr(torch._C, "_get_tracing_state")
    assert isinstance(_library._connect(), AttributeError)
