"""The ops are torch operators: autograd, views, modes, tracers, profilers and wrong arguments meet them as any other."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import freedave_kernels as fk

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
    "logit_floor": lambda logits: fk.logit_floor(logits, top_k=3, top_p=0.9, suppress_tokens=[3]),
    "rank_positions": lambda confidence: fk.rank_positions(confidence, IDS == MASK),
    "select_transfer": lambda confidence: fk.select_transfer(confidence, IDS == MASK, threshold=0.5),
    "build_drafts": lambda confidence: fk.build_drafts(IDS, TOKENS, confidence, MASK, 3, block_length=2),
    "verify_drafts": lambda _: fk.verify_drafts(DRAFTS, DRAFTS, num_drafts=COUNTS),
    "draft_step": lambda confidence: fk.draft_step(DRAFTS, TOKENS[:, None], confidence[:, None], COUNTS, MASK, 3),
}
FLOAT = dict.fromkeys(CALLS, CONFIDENCE) | {
    "predict_tokens": LOGITS,
    "partial_predictions": LOGITS,
    "logit_floor": LOGITS,
    "merge_predictions": fk.partial_predictions(LOGITS, IDS, MASK),
}


def equal(got: object, expected: object) -> None:
    if isinstance(got, fk.DraftStep):
        assert isinstance(expected, fk.DraftStep)
        got, expected = got.record, expected.record
    if isinstance(got, tuple):
        assert type(got) is type(expected)
        for one, other in zip(got, expected, strict=True):
            equal(one, other)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", CALLS)
def test_a_profiler_sees_the_calls(op):
    expected = CALLS[op](FLOAT[op])
    with torch.profiler.profile() as profile:
        equal(CALLS[op](FLOAT[op]), expected)
    assert f"freedave::{op}" in {event.name for event in profile.events() or ()}


@pytest.mark.parametrize("op", sorted(CALLS.keys() - {"verify_drafts"}))
def test_inputs_that_need_gradients(op):
    """Values are the same, and torch says so where somebody asks a result for a gradient: the ops have none to give."""
    expected = CALLS[op](FLOAT[op])
    for value in (torch.nn.Parameter(FLOAT[op]), FLOAT[op].clone().requires_grad_()):
        got = CALLS[op](value)
        equal(got, expected)
        for result in got if isinstance(got, tuple) else (got,):
            if isinstance(result, torch.Tensor) and result.requires_grad:
                with pytest.warns(UserWarning, match=f"freedave::{op}: an autograd kernel was not registered"):
                    result.sum().backward()
                assert value.grad is None


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


RIGHT = (IDS, TOKENS, CONFIDENCE, MASK, 3, 1, None, None, None, "threshold", "confidence", 2)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, IDS.int(), "input_ids must be int64, got int32"),
        (0, IDS[0], r"input_ids must have 2 dimensions, got shape \[4\]"),
        (1, TOKENS[:1], r"token_ids must have the first 2 sizes of input_ids \[2, 4\], got shape \[1, 4\]"),
        (2, CONFIDENCE.half(), "confidence must be float32, got float16"),
        (2, CONFIDENCE.to("meta"), "the tensors must be on one device"),
        (4, 0, "draft_steps must be at least 1, got 0"),
        (5, -1, "tokens_per_step must be at least 1, got -1"),
        (6, torch.tensor([1.0, 2.0]), "tokens_per_step_per_row must be int32 or int64, got float32"),
        (7, float("nan"), "threshold must be a number, got nan"),
        (8, CONFIDENCE[:1, 0], r"threshold_per_row must have the first 1 sizes of input_ids \[2, 4\], got shape \[1\]"),
        (9, "soft", "rule must be one of threshold, strict, factor, entropy_bound, got 'soft'"),
        (10, "random", "order must be one of confidence, left_to_right, got 'random'"),
        (11, 0, "block_length must be at least 1, got 0"),
    ],
)
def test_a_raw_call_with_a_wrong_argument_is_refused(index, wrong, message):
    """`torch.ops.freedave.*` has checks of its own: no call reads or writes memory that is not its own."""
    torch.ops.freedave.build_drafts(*RIGHT)
    with pytest.raises(RuntimeError, match=f"build_drafts: {message}"):
        torch.ops.freedave.build_drafts(*RIGHT[:index], wrong, *RIGHT[index + 1 :])


def test_a_raw_call_with_another_type_of_tensor_is_refused():
    for dtype in (torch.complex64, torch.int16, torch.float8_e5m2):
        with pytest.raises(RuntimeError, match="rank_positions: confidence must be float32, got"):
            torch.ops.freedave.rank_positions(CONFIDENCE.to(dtype), IDS == MASK)


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


def test_strings_are_given_back():
    """torch's own conversion to std::string keeps every string that it has converted."""
    word = "x" * 1_000_000

    def calls(count: int) -> None:
        for _ in range(count):
            with pytest.raises(RuntimeError, match="order must be one of"):
                torch.ops.freedave.rank_positions(CONFIDENCE, IDS == MASK, word)

    calls(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(200)  # 200 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
