"""predict_tokens: the contract, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import golden_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, generator

import freedave_kernels as fk
from freedave_kernels._C import cpu_isa, usable_cpu_isas
from freedave_kernels.contract import LARGEST_LOG_ODDS
from freedave_kernels.contract import MEASURES as MEASURE_NAMES
from freedave_kernels.reference import predict_tokens as reference

MASK = 9
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEASURES = list(MEASURE_NAMES)


def oracle(logits, input_ids, *, mask_index=None, measure="prob", suppress_tokens=None, logits_shift=False):
    rest = (mask_index, measure, suppress_tokens, logits_shift, None, None, None, None, None, "exclude")
    return reference.predict_tokens(logits, input_ids, MASK, *rest)


def assert_close(result, expected, measure="prob"):
    """Log-odds go through 0, where what is relative says nothing: there the odds are right to 1e-6."""
    token_ids, confidence = result
    assert token_ids.dtype == torch.int64 and confidence.dtype == torch.float32
    assert torch.equal(token_ids, expected[0])
    atol = 1e-6 if measure == "log_odds" else 0
    torch.testing.assert_close(confidence, expected[1], rtol=1e-6, atol=atol, equal_nan=False)


def test_example(backend):
    """Two masked positions are predicted; the given token is left alone, whatever its row says."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [9.0, 9.0, 9.0], [3.0, 3.0, -INF]])
    input_ids = torch.tensor([MASK, 4, MASK])
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK)
    assert token_ids.tolist() == [1, 4, 0]  # equal logits: the lower id
    assert confidence.tolist() == pytest.approx([1 / (1 + math.exp(-1) + math.exp(-2)), -INF, 0.5])


@pytest.mark.parametrize("case", golden_ops())
def test_golden(backend, case):
    masked = case["input_ids"] == case["mask_token_id"]
    token_ids, confidence = fk.predict_tokens(case["logits"], case["input_ids"], case["mask_token_id"])
    assert torch.equal(token_ids[masked], case["token_ids"][masked].long())
    torch.testing.assert_close(confidence[masked], case["confidence"][masked].float(), rtol=1e-6, atol=0)


@st.composite
def calls(draw):
    leading = draw(st.sampled_from([(), (1,), (0,), (2,), (2, 2)]))
    length = draw(st.integers(0, 6))
    constants = Constants(draw)
    large = [1000, 4096, 5000, 16384, 16391, 33000]
    vocab = constants.value(st.one_of(st.integers(1, 200), st.sampled_from(large)), few=[1, 3, 100, 200, *large])
    dtype = constants.one_of(DTYPES)
    random = generator(draw(st.integers(0, 2**32)))
    shape = (*leading, length, vocab)
    logits = torch.randn(shape, generator=random) * draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    if draw(st.booleans()):
        logits = logits.round()
    holes = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    logits[torch.rand(shape, generator=random) < holes] = -INF
    if draw(st.integers(0, 3)) == 0:
        logits[torch.rand(shape, generator=random) < 2 / vocab] = draw(st.sampled_from([math.nan, INF]))
    logits = logits.to(dtype)
    layout = constants.one_of(["contiguous", "padded rows", "every other row", "expanded"])
    if layout == "padded rows":
        logits = torch.cat([logits, logits[..., :1]], -1)[..., :vocab]
    elif layout == "every other row":
        logits = torch.stack([logits, logits.neg()], -2).flatten(-3, -2)[..., ::2, :]
    elif layout == "expanded" and length:
        logits = logits[..., :1, :].expand(shape)
    input_ids = torch.randint(0, 9, shape[:-1], generator=random)
    masked = torch.rand(shape[:-1], generator=random) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    arguments = {"measure": constants.one_of(MEASURES), "logits_shift": constants.one_of([False, True])}
    if constants.one_of([False, True]):
        arguments["mask_index"] = masked
    else:
        input_ids = torch.where(masked, MASK, input_ids)
    if constants.one_of([False, True]):
        arguments["suppress_tokens"] = torch.tensor(
            draw(st.lists(st.integers(-2, vocab + 2), max_size=5)), dtype=torch.int64
        )
    return logits, input_ids, arguments


def run(logits, input_ids, arguments):
    return fk.predict_tokens(logits, input_ids, MASK, **arguments)


@given(call=calls())
@settings(max_examples=400)
def test_agrees_with_the_oracle(native_backend, call):
    logits, input_ids, arguments = call
    assert_close(run(*call), oracle(logits, input_ids, **arguments), arguments["measure"])


@pytest.mark.parametrize("isa", usable_cpu_isas())
@given(call=calls())
@settings(max_examples=100)
def test_every_instruction_set_agrees_with_the_oracle(isa, call):
    logits, input_ids, arguments = call
    with fk.use_backend("cpu"), pytest.MonkeyPatch.context() as environment:
        environment.setenv("FREEDAVE_CPU_ISA", isa)
        assert cpu_isa() == isa
        assert_close(run(*call), oracle(logits, input_ids, **arguments), arguments["measure"])


def test_an_instruction_set_that_cannot_run(monkeypatch):
    monkeypatch.setenv("FREEDAVE_CPU_ISA", "avx10")
    with (
        fk.use_backend("cpu"),
        pytest.raises(RuntimeError, match="FREEDAVE_CPU_ISA=avx10 cannot run.*usable: baseline"),
    ):
        fk.predict_tokens(LOGITS, IDS, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_real_vocabulary(native_backend, dtype, measure):
    logits = (torch.randn(6, 151936, generator=generator(0)) * 3).to(dtype)
    logits[0] *= 20  # confident: the entropy is all in the tail
    input_ids = torch.full((6,), MASK)
    result = fk.predict_tokens(logits, input_ids, MASK, measure=measure)
    assert_close(result, oracle(logits, input_ids, measure=measure), measure)


def test_probabilities_saturate_and_entropies_do_not(backend):
    """As the documentation says: in float32, all that is nearer to 1 than 3e-8 is 1."""
    logits = torch.zeros(3, 100)
    logits[:, 4] = torch.tensor([25.0, 27.0, 29.0])
    confidence = {name: fk.predict_tokens(logits, torch.full((3,), MASK), MASK, measure=name)[1] for name in MEASURES}
    assert confidence["prob"].tolist() == confidence["margin"].tolist() == [1.0, 1.0, 1.0]
    for measure in ("neg_entropy", "log_odds"):
        ordered = fk.rank_positions(confidence[measure], torch.ones(3, dtype=torch.bool))
        assert ordered.tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_odds_rank_confident_rows_as_float64_does(native_backend, dtype):
    """Peaks 10 to 30 above 4,096 random logits: dozens of these probabilities are 1.0 in float32."""
    random = generator(11)
    logits = torch.randn(200, 4096, generator=random)
    logits[torch.arange(200), torch.randint(4096, (200,), generator=random)] = 10 + 20 * torch.rand(
        200, generator=random
    )
    logits, input_ids = logits.to(dtype), torch.full((200,), MASK)
    others = logits.double().sort(-1).values
    exact = others[:, -1] - others[:, :-1].logsumexp(-1)
    assert (fk.predict_tokens(logits, input_ids, MASK)[1] == 1).sum() > 20
    confidence = fk.predict_tokens(logits, input_ids, MASK, measure="log_odds")[1]
    assert torch.equal(confidence.argsort(stable=True), exact.argsort(stable=True))
    torch.testing.assert_close(confidence.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("places", [(0, 1), (0, 100), (2047, 2048), (4095, 4096), (5, 16384), (16384, 39999)])
def test_log_odds_of_equal_maxima(backend, places):
    """Those that equal the chosen token are among its others, wherever they stand."""
    logits = torch.full((1, 40000), -INF)
    logits[0, list(places)] = 5.0
    logits[0, 30000] = -25.0
    token_ids, confidence = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure="log_odds")
    assert token_ids.item() == places[0]
    assert confidence.item() == pytest.approx(-math.exp(-30), abs=1e-6)
    logits[0, places[0]] = 5.5
    confidence = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure="log_odds")[1]
    assert confidence.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("others", [-INF, -1000.0, -66.0])
def test_log_odds_end_where_nothing_else_counts(backend, others):
    logits = torch.full((1, 3), others)
    logits[0, 1] = 0.0
    token_ids, confidence = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure="log_odds")
    assert token_ids.item() == 1
    assert confidence.item() == LARGEST_LOG_ODDS


@pytest.mark.parametrize("measure", MEASURES)
def test_very_confident_rows_keep_their_digits(backend, measure):
    """p = 1 - 1e-13: a sum that adds the tail to a 1 in float32 would return an entropy of 0 exactly."""
    logits = torch.zeros(1, 1000)
    logits[0, 17] = 37.0
    tail = 999 * math.exp(-37.0)
    expected = {
        "prob": 1 / (1 + tail),
        "margin": (1 - math.exp(-37.0)) / (1 + tail),
        "neg_entropy": -37.0 * tail / (1 + tail) - math.log1p(tail),
        "log_odds": -math.log(tail),
    }[measure]
    token_ids, confidence = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure=measure)
    assert token_ids.item() == 17
    assert confidence.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "places", [(0, 1), (7, 8), (15, 16), (63, 64), (4095, 4096), (16383, 16384), (16384, 39999), (39998, 39999)]
)
def test_ties_go_to_the_lower_token(backend, dtype, places):
    """The two maxima straddle vector, tile and chunk edges."""
    logits = torch.randn(1, 40000, generator=generator(1)).clamp(max=3.0).to(dtype)
    logits[0, list(places)] = 5.0
    token_ids, confidence = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure="margin")
    assert token_ids.item() == places[0]
    assert confidence.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("jumps", [(1.0, 15.0, 17.0), (100.0, 250.0, 1000.0), (1000.0, 1.0, 999.0)])
def test_maxima_far_above_everything_before(native_backend, dtype, jumps):
    """A scan relative to the maximum so far must notice what it could not have summed."""
    logits = torch.randn(3, 20000, generator=generator(10)).to(dtype)
    logits[0, [100, 3000, 17000]] = torch.tensor(jumps, dtype=dtype)
    logits[1, :3000] = -INF
    logits[1, [5000, 9000]] = torch.tensor(jumps[:2], dtype=dtype)
    input_ids = torch.full((3,), MASK)
    for measure in MEASURES:
        result = fk.predict_tokens(logits, input_ids, MASK, measure=measure)
        assert_close(result, oracle(logits, input_ids, measure=measure), measure)


@pytest.mark.parametrize("isa", usable_cpu_isas())
@pytest.mark.parametrize("offset", [0.3, -87.0, 1023.5, -1030.0, 2e4, -1e30])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_logits_far_from_zero(monkeypatch, isa, offset, spread):
    """The CPU kernels change their arithmetic with the maximum so far, here from chunk to chunk as well."""
    monkeypatch.setenv("FREEDAVE_CPU_ISA", isa)
    logits = spread * torch.randn(2, 40000, generator=generator(4)) + offset
    logits[1, :16384] += -2000 if abs(offset) < 1e4 else 0.0
    input_ids = torch.full((2,), MASK)
    with fk.use_backend("cpu"):
        for measure in ("prob", "log_odds"):
            result = fk.predict_tokens(logits, input_ids, MASK, measure=measure)
            assert_close(result, oracle(logits, input_ids, measure=measure), measure)


@pytest.mark.parametrize("isa", usable_cpu_isas())
@pytest.mark.parametrize("top", [-700.0, -0.1, 0.7, 3.3, 12.345, 901.7])
def test_a_certain_token_has_confidence_one(monkeypatch, isa, top):
    monkeypatch.setenv("FREEDAVE_CPU_ISA", isa)
    logits = torch.full((1, 5000), top - 200)
    logits[0, 4321] = top
    with fk.use_backend("cpu"):
        assert fk.predict_tokens(logits, torch.tensor([MASK]), MASK)[1].item() == 1


@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 32, 33, 16385])
def test_all_equal_rows(backend, vocab):
    for measure, expected in {
        "prob": 1 / vocab,
        "margin": 1.0 if vocab == 1 else 0.0,
        "neg_entropy": -math.log(vocab),
        "log_odds": -math.log(vocab - 1) if vocab > 1 else LARGEST_LOG_ODDS,
    }.items():
        result = fk.predict_tokens(torch.full((1, vocab), -2.5), torch.tensor([MASK]), MASK, measure=measure)
        assert result[0].item() == 0
        assert result[1].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 5, 4096, 16384, 16999])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_broken_rows_are_never_chosen(backend, dtype, place, value):
    logits = torch.randn(3, 17000, generator=generator(2)).to(dtype)
    logits[0, place] = value
    logits[1] = -INF
    input_ids = torch.full((3,), MASK)
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK)
    assert token_ids[:2].tolist() == [MASK, MASK] and confidence[:2].tolist() == [-INF, -INF]
    assert_close((token_ids[2:], confidence[2:]), oracle(logits[2:], input_ids[2:]))


def test_minus_infinity_has_probability_zero(backend):
    logits = torch.full((1, 5000), -INF)
    logits[0, [3, 4999]] = torch.tensor([1.0, 0.0])
    for measure in MEASURES:
        few = fk.predict_tokens(torch.tensor([[1.0, 0.0]]), torch.tensor([MASK]), MASK, measure=measure)
        many = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure=measure)
        assert many[0].item() == 3
        assert many[1].item() == pytest.approx(few[1].item(), rel=1e-6)


def test_suppressed_tokens_leave_the_softmax(backend):
    logits = torch.tensor([[1.0, 5.0, 2.0, 5.0]])
    ids = torch.tensor([MASK])
    for suppress in ([1, 3], (3, 1, 1), torch.tensor([3, 1, -1, 4])):  # repeats, and ids outside the vocabulary
        token_ids, confidence = fk.predict_tokens(logits, ids, MASK, suppress_tokens=suppress)
        assert token_ids.item() == 2
        assert confidence.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)
    assert fk.predict_tokens(logits, ids, MASK, suppress_tokens=range(4))[1].item() == -INF
    broken = logits.clone()
    broken[0, 3] = math.nan  # a suppressed token's logit is not looked at
    assert fk.predict_tokens(broken, ids, MASK, suppress_tokens=[3])[0].item() == 1


def test_shifted_logits(backend):
    """Position i reads row i-1, position 0 row 0, in every sequence of the batch."""
    logits = torch.randn(2, 5, 40, generator=generator(3))
    input_ids = torch.full((2, 5), MASK)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    result = fk.predict_tokens(logits, input_ids, MASK, logits_shift=True)
    expected = fk.predict_tokens(shifted, input_ids, MASK)
    assert all(torch.equal(ours, plain) for ours, plain in zip(result, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(backend, dtype):
    """Whole vectors of logits, but not from a boundary that a vector load needs."""
    random = generator(3)
    memory = torch.randn(5 * 64 + 8, generator=random).to(dtype)
    input_ids = torch.full((5,), MASK)
    for offset in range(8):
        logits = memory[offset : offset + 5 * 64].view(5, 64)
        assert_close(fk.predict_tokens(logits, input_ids, MASK), oracle(logits, input_ids))


def test_mask_index_overrides_the_mask_token(backend):
    logits = torch.randn(4, 10, generator=generator(4))
    input_ids = torch.tensor([MASK, 1, MASK, 2])
    mask_index = torch.tensor([False, True, True, False])
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK, mask_index=mask_index)
    assert confidence.isneginf().tolist() == [True, False, False, True]
    assert token_ids[[0, 3]].tolist() == [MASK, 2]


def test_mask_token_outside_the_vocabulary(backend):
    logits = torch.randn(2, 10, generator=generator(5))
    token_ids, confidence = fk.predict_tokens(logits, torch.tensor([126336, 3]), 126336)
    assert token_ids[0] < 10 and token_ids[1] == 3 and confidence[0] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [50, 16385, 70001])
def test_a_row_does_not_depend_on_its_batch(backend, threads, dtype, vocab):
    """Bitwise, alone or among others, masked or not, contiguous or strided, on one thread or two."""
    logits = torch.randn(12, vocab, generator=generator(6)).to(dtype)
    input_ids = torch.full((12,), MASK)
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [fk.predict_tokens(logits[row : row + 1].clone(), input_ids[:1], MASK) for row in range(12)]
    torch.set_num_threads(before)
    assert torch.equal(token_ids, torch.cat([row[0] for row in alone]))
    assert torch.equal(confidence, torch.cat([row[1] for row in alone]))
    some = torch.where(torch.arange(12) % 3 == 0, input_ids, 1)
    assert torch.equal(fk.predict_tokens(logits, some, MASK)[1][::3], confidence[::3])
    unaligned = torch.cat([logits[:, :1], logits], 1)[:, 1:]
    assert torch.equal(fk.predict_tokens(unaligned, input_ids, MASK)[1], confidence)


def test_inputs_are_left_alone(backend):
    logits, input_ids = torch.randn(3, 20, generator=generator(7)), torch.tensor([MASK, 2, MASK])
    copies = logits.clone(), input_ids.clone()
    token_ids, _ = fk.predict_tokens(logits, input_ids, MASK, suppress_tokens=[int(logits[0].argmax())])
    token_ids.fill_(0)
    assert torch.equal(logits, copies[0]) and torch.equal(input_ids, copies[1])


def test_opcheck():
    logits = torch.randn(2, 3, 40, generator=generator(8))
    input_ids = torch.tensor([[MASK, 1, MASK], [2, MASK, 3]])
    op = torch.ops.freedave.predict_tokens.default
    torch.library.opcheck(op, (logits, input_ids, MASK))
    extra = (input_ids == 1, "margin", torch.tensor([3, 5]), True)
    torch.library.opcheck(op, (logits.bfloat16(), input_ids, MASK, *extra))


def test_compiles_without_graph_breaks():
    def step(logits, input_ids):
        return fk.predict_tokens(logits * 2, input_ids, MASK, measure="margin", suppress_tokens=[3])

    logits, input_ids = torch.randn(2, 4, 30, generator=generator(9)), torch.full((2, 4), MASK)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(logits, input_ids), step(logits, input_ids), strict=True))


LOGITS, IDS = torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a float16 or bfloat16 or float32 tensor, got list"),
        ({"logits": LOGITS.double()}, TypeError, "logits must be float16 or bfloat16 or float32, got float64"),
        ({"logits": torch.zeros(10)}, ValueError, r"logits must have at least 2 dimensions, got shape \(10,\)"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, "vocabulary of at least 1"),
        ({"logits": LOGITS.mT.contiguous().mT}, ValueError, "vocabulary dimension of logits must be contiguous"),
        ({"input_ids": IDS.short()}, TypeError, "input_ids must be int64, got int16"),
        ({"input_ids": IDS[:1]}, ValueError, r"input_ids must have shape \(2, 3\).*got \(1, 3\)"),
        ({"input_ids": None}, TypeError, "input_ids must be a int64 tensor, got NoneType"),
        ({"mask_token_id": 1.5}, TypeError, "mask_token_id must be an int, got float"),
        ({"mask_index": IDS}, TypeError, "mask_index must be bool, got int64"),
        ({"mask_index": IDS[0].bool()}, ValueError, r"mask_index must have shape \(2, 3\)"),
        (
            {"measure": "entropy"},
            ValueError,
            "measure must be one of prob, margin, neg_entropy, log_odds, got 'entropy'",
        ),
        ({"suppress_tokens": [10]}, ValueError, r"suppress_tokens must lie in \[0, 10\)"),
        ({"suppress_tokens": ["a"]}, TypeError, "suppress_tokens must be an int, got str"),
        ({"suppress_tokens": 3}, TypeError, "suppress_tokens must be a sequence of ints or an int64 tensor, got int"),
        (
            {"suppress_tokens": torch.tensor([1], dtype=torch.int16)},
            TypeError,
            "suppress_tokens must be int64, got int16",
        ),
        ({"suppress_tokens": torch.tensor([[1]])}, ValueError, r"suppress_tokens must have shape \[S\]"),
        ({"logits_shift": 1}, TypeError, "logits_shift must be a bool, got int"),
        ({"input_ids": IDS.to("meta")}, ValueError, elsewhere("input_ids", "logits")),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    arguments = {"logits": LOGITS, "input_ids": IDS, "mask_token_id": MASK} | change
    with pytest.raises(error, match=message):
        fk.predict_tokens(**arguments)
