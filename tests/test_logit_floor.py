"""logit_floor: the contract, on every backend. All backends must find the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, generator
from test_predict_tokens import DTYPES

import freedave_kernels as fk
from freedave_kernels.contract import MOST_SUMMED_TOKENS
from freedave_kernels.reference.logit_floor import UNITS, weight_of
from freedave_kernels.reference.logit_floor import logit_floor as reference


def oracle(
    logits, *, top_k=None, top_p=None, min_p=None, temperature=1.0, mask_index=None, suppress_tokens=None
) -> torch.Tensor:
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full(logits.shape[:-1], temperature)
    return reference(logits, top_k, top_p, min_p, temperature, mask_index, suppress_tokens)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """In every bit: not even the sign of a zero differs."""
    assert result.dtype == torch.float32
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32)), (result, expected)


def test_example(backend):
    """Four tokens of probability 0.4, 0.3, 0.2 and 0.1: what stays is at least the floor."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert fk.logit_floor(logits, top_k=2) == logits[2]
    assert fk.logit_floor(logits, top_p=0.6) == logits[2]
    assert fk.logit_floor(logits, top_p=0.75) == logits[3]
    assert fk.logit_floor(logits, min_p=0.45) == logits[3]
    assert fk.logit_floor(logits, top_k=3, top_p=0.75) == logits[2]  # 0.4 and 0.3 of 0.9
    assert fk.logit_floor(logits, top_k=3, top_p=0.9, min_p=0.8) == logits[0]
    assert fk.logit_floor(logits, min_p=0.3, temperature=0.5) == logits[2]  # probabilities are as their squares
    assert fk.logit_floor(logits) == logits[1]


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, Any]]:
    shape = draw(st.sampled_from([(), (1,), (0,), (3,), (2, 2)]))
    constants = Constants(draw)
    large = [1000, 1024, 2049, 5000]
    vocab = constants.value(st.one_of(st.integers(1, 200), st.sampled_from(large)), few=[1, 3, 100, 200, *large])
    dtype = constants.one_of(DTYPES)
    random = generator(draw(st.integers(0, 2**32)))
    logits = torch.randn((*shape, vocab), generator=random) * draw(st.sampled_from([0.0, 1e-30, 0.1, 3.0, 40.0, 1e4]))
    if draw(st.booleans()):
        logits = logits.round()  # ties, and zeros of both signs
    logits[torch.rand(logits.shape, generator=random) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))] = -INF
    if draw(st.integers(0, 3)) == 0:
        broken = draw(st.sampled_from([math.nan, -math.nan, INF]))
        logits[torch.rand(logits.shape, generator=random) < 1 / vocab] = broken
    logits = logits.to(dtype)
    layout = constants.one_of(["contiguous", "padded rows", "every other row", "expanded"])
    if layout == "padded rows":
        logits = torch.cat([logits, logits[..., :1]], -1)[..., :vocab]
    elif layout == "every other row" and shape:
        logits = torch.stack([logits, logits.neg()], -2).flatten(-3, -2)[..., ::2, :]
    elif layout == "expanded" and shape and shape[-1]:
        logits = logits[..., :1, :].expand(logits.shape)
    arguments: dict[str, Any] = {"temperature": draw(st.sampled_from([1.0, 0.1, 0.7, 3.0, 1e-6, 1e30, 1e-30]))}
    if constants.one_of([False, True]):  # one a row, of which some draw nothing
        temperatures = torch.tensor([arguments["temperature"], 0.0, 0.7, -1.0, math.nan])
        arguments["temperature"] = temperatures[torch.randint(0, 5, shape, generator=random)]
    if constants.one_of([False, True]):
        arguments["top_k"] = draw(st.one_of(st.integers(1, 60), st.integers(1, 2 * vocab)))
    if constants.one_of([False, True]):
        arguments["top_p"] = draw(st.sampled_from([1e-300, 0.01, 0.3, 0.5, 0.9, 0.99, 1 - 1e-9, 1 - 2**-53, 1.0]))
    if draw(st.booleans()):
        arguments["min_p"] = draw(st.sampled_from([1e-300, 0.001, 0.05, 0.5, 1.0]))
    if constants.one_of([False, True]):
        arguments["mask_index"] = torch.rand(shape, generator=random) < 0.7
    if constants.one_of([False, True]):
        tokens = draw(st.lists(st.integers(-2, vocab + 2), max_size=5))
        arguments["suppress_tokens"] = torch.tensor(tokens, dtype=torch.int64)
    return logits, arguments


def run(logits: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    return fk.logit_floor(logits, **arguments)


@given(call=calls())
@settings(max_examples=400)
def test_agrees_with_the_oracle(native_backend, call):
    logits, arguments = call
    assert_same(run(*call), oracle(logits, **arguments))


def plain(row: torch.Tensor, top_k: int | None, top_p: float, min_p: float, temperature: float) -> list[float]:
    """The floors that a plain sort in float64 finds with `top_p` off by 1e-5 to either side; ties all stay."""
    kept = sorted((x for x in row.tolist() if x > -INF), reverse=True)
    if top_k is not None:
        kept = [x for x in kept if x >= kept[min(top_k, len(kept)) - 1]]
    weights = [math.exp((x - kept[0]) / temperature) for x in kept]
    floors = []
    for wanted in (top_p - 1e-5, top_p + 1e-5):
        above, least = 0.0, kept[0]
        for x, weight in zip(kept, weights, strict=True):
            if above < wanted * sum(weights):
                least = x
            above += weight
        floors.append(max(least, min(x for x, weight in zip(kept, weights, strict=True) if weight >= min_p)))
    return floors


@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(1, 300),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    top_p=st.floats(0.01, 0.999),
    min_p=st.sampled_from([1e-9, 0.0371, 0.3333]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
@settings(max_examples=200)
def test_agrees_with_a_plain_sort(backend, seed, vocab, top_k, top_p, min_p, temperature):
    logits = (torch.randn(vocab, generator=generator(seed)) * 4).bfloat16()  # (many ties)
    found = fk.logit_floor(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature).item()
    highest, lowest = plain(logits, top_k, top_p, min_p, temperature)
    assert lowest <= found <= highest
    assert found in logits.tolist()


def test_agrees_with_transformers(backend):
    """What is kept, in its order of warpers; but for rows in which a sum comes as near to top_p as float32 rounds."""
    transformers = pytest.importorskip("transformers")
    top_k, top_p, min_p, temperature = 40, 0.85, 0.02, 0.8
    logits = torch.randn(unless_interpreted(backend, 50, 10), 500, generator=generator(5)) * 2
    scores = logits
    for warper in (
        transformers.TemperatureLogitsWarper(temperature),
        transformers.TopKLogitsWarper(top_k),
        transformers.TopPLogitsWarper(top_p),
        transformers.MinPLogitsWarper(min_p),
    ):
        scores = warper(None, scores)
    sums = (logits / temperature).topk(top_k).values.double().softmax(-1).cumsum(-1)
    clear = ((sums - top_p).abs() > 1e-5).all(-1)
    assert clear.sum() > 0.8 * len(clear)
    kept = logits >= fk.logit_floor(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)[:, None]
    assert torch.equal(kept[clear], (scores > -INF)[clear])


def test_weights_are_exact_enough() -> None:
    """As the documentation says: 2e-6 relative, and one unit."""
    difference = torch.cat([torch.linspace(-30, 0, 3_000_001), torch.tensor([-0.0, -1e-30, -INF])])
    weight, exact = weight_of(difference).double() / 2**UNITS, difference.double().exp()
    assert ((weight - exact).abs() <= 2e-6 * exact + 2.0**-UNITS).all()
    assert weight_of(torch.zeros(1)) == 2**UNITS and weight.max() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(native_backend, dtype):
    vocab = unless_interpreted(native_backend, 151936, 40000)
    logits = (torch.randn(2, vocab, generator=generator(0)) * 3).to(dtype)
    logits[0, 777] = 20.0
    for arguments in ({"top_p": 0.9, "temperature": 0.7}, {"top_k": 200, "top_p": 0.95, "min_p": 0.05}):
        assert_same(fk.logit_floor(logits, **arguments), oracle(logits, **arguments))


def test_ties_at_the_floor_all_stay(backend):
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [0.0, -0.0, -1.0, -1.0, -2.0]])
    for arguments in ({"top_k": 2}, {"top_p": 0.5}):
        floor = fk.logit_floor(logits, **arguments)
        assert floor[0] == 2
        kept = logits[0] >= floor[0]
        assert kept.tolist() == [True, True, True, True, False]
    floor = fk.logit_floor(logits, top_k=1)
    assert floor.tolist() == [3.0, 0.0] and not floor.signbit().any()  # equal zeros are one


@pytest.mark.parametrize("value", [math.nan, -math.nan, INF])
def test_broken_rows_have_no_floor(backend, value):
    logits = torch.randn(4, 2000, generator=generator(1))
    logits[0, 1234] = value
    logits[1] = -INF
    logits[2] *= 1e-9
    for arguments in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {}):
        floor = fk.logit_floor(logits, **arguments)
        assert floor[:2].tolist() == [-INF, -INF] and floor[2:].isfinite().all()
    assert fk.logit_floor(logits, top_k=5, suppress_tokens=[1234])[0].isfinite()  # its logit is not looked at
    overflowing = torch.tensor([[1e30, 2.0], [-1e30, -2e30]])
    assert fk.logit_floor(overflowing, top_k=1, temperature=1e-20).tolist() == [-INF, -INF]


def test_suppressed_tokens_are_no_candidates(backend):
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    for suppress in ([0, 2], torch.tensor([2, 0, 0, -1, 4])):
        assert fk.logit_floor(logits, top_k=1, suppress_tokens=suppress) == 4
        assert fk.logit_floor(logits, top_k=2, suppress_tokens=suppress) == 2
        assert fk.logit_floor(logits, top_p=0.8, suppress_tokens=suppress) == 4
    assert fk.logit_floor(logits, top_k=1, suppress_tokens=range(4)) == -INF
    # Tokens as far apart as the marks of a GPU's kernel repeat.
    far = torch.zeros(70_000)
    far[[7, 7 + 32768, 7 + 65536]] = torch.tensor([3.0, 2.0, 1.0])
    assert fk.logit_floor(far, top_k=1, suppress_tokens=[7]) == 2
    assert fk.logit_floor(far, top_k=1, suppress_tokens=[7 + 32768, 7]) == 1


def test_rows_that_are_not_masked_are_not_read(backend):
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert fk.logit_floor(logits, top_k=1, mask_index=torch.tensor([False, True])).tolist() == [-INF, 4.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(backend, dtype):
    memory = torch.randn(5 * 64 + 8, generator=generator(3)).to(dtype)
    for offset in range(0, 8, unless_interpreted(backend, 1, 3)):
        logits = memory[offset : offset + 5 * 64].view(5, 64)
        assert_same(fk.logit_floor(logits, top_k=9, top_p=0.8), oracle(logits, top_k=9, top_p=0.8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(backend, threads, dtype):
    count = unless_interpreted(backend, 4, 2)
    logits = torch.randn(count, 20000, generator=generator(6)).to(dtype)
    arguments = {"top_k": 900, "top_p": 0.9, "min_p": 0.01, "temperature": 0.9}
    floor = fk.logit_floor(logits, **arguments)
    alone = [fk.logit_floor(logits[row : row + 1].clone(), **arguments) for row in range(count)]
    assert_same(floor, torch.cat(alone))
    shuffled = logits[:, torch.randperm(20000, generator=generator(7))]
    assert_same(fk.logit_floor(shuffled, **arguments), floor)  # whatever the order of the sums


def test_inputs_are_left_alone(backend):
    logits = torch.randn(3, 20, generator=generator(7))
    before = logits.clone()
    fk.logit_floor(logits, top_k=2, top_p=0.5, suppress_tokens=[1]).fill_(0)
    assert torch.equal(logits, before)


def test_opcheck():
    logits = torch.randn(2, 3, 40, generator=generator(8))
    op = torch.ops.freedave.logit_floor.default
    torch.library.opcheck(op, (logits,))
    masked = torch.ones(2, 3, dtype=torch.bool)
    torch.library.opcheck(op, (logits.bfloat16(), 5, 0.9, 0.1, torch.full((2, 3), 0.7), masked, torch.tensor([3, 5])))


def test_compiles_without_graph_breaks():
    def step(logits):
        return fk.logit_floor(logits * 2, top_k=3, top_p=0.9, min_p=0.1, suppress_tokens=[3]) + 1

    logits = torch.randn(2, 4, 30, generator=generator(9))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), step(logits))


LOGITS = torch.zeros(2, 3, 10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a float16 or bfloat16 or float32 tensor, got list"),
        ({"logits": LOGITS.double()}, TypeError, "logits must be float16 or bfloat16 or float32, got float64"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must have at least 1 dimensions, got shape \(\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "vocabulary of at least 1"),
        ({"logits": LOGITS.mT.contiguous().mT}, ValueError, "vocabulary dimension of logits must be contiguous"),
        (
            {"logits": torch.empty(MOST_SUMMED_TOKENS + 1, dtype=torch.bfloat16)},
            ValueError,
            "logits must have at most 8388607 tokens, got 8388608",
        ),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, ValueError, "top_p must be above 0 and at most 1, got nan"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a float, got str"),
        ({"min_p": -0.1}, ValueError, "min_p must be above 0 and at most 1, got -0.1"),
        ({"min_p": True}, TypeError, "min_p must be a float, got bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or between 1e-30 and 1e30, got -1.0"),
        ({"mask_index": LOGITS[..., 0]}, TypeError, "mask_index must be bool, got float32"),
        ({"mask_index": LOGITS.bool()}, ValueError, r"mask_index must have shape \(2, 3\)"),
        ({"suppress_tokens": [10]}, ValueError, r"suppress_tokens must lie in \[0, 10\)"),
        ({"suppress_tokens": torch.tensor([[1]])}, ValueError, r"suppress_tokens must have shape \[S\]"),
        ({"mask_index": LOGITS[..., 0].bool().to("meta")}, ValueError, elsewhere("mask_index", "logits")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    with pytest.raises(error, match="logit_floor: .*" + message):
        fk.logit_floor(**({"logits": LOGITS} | change))
