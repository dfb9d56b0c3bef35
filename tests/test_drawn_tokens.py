"""predict_tokens and its parts with a temperature: tokens drawn from the softmax, on every backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from conftest import unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import elsewhere
from states import INF, Constants, generator
from test_partial_predictions import in_parts
from test_predict_tokens import DTYPES, MASK, assert_close, calls

import freedave_kernels as fk
from freedave_kernels._C import usable_cpu_isas
from freedave_kernels.contract import DRAWN_MEASURES, LARGEST_LOG_ODDS
from freedave_kernels.reference.merge_predictions import merge_predictions as reference_merge
from freedave_kernels.reference.partial_predictions import partial_predictions as reference_partial
from freedave_kernels.reference.predict_tokens import predict_tokens as reference
from freedave_kernels.reference.sampling import noise_of, philox, token_noise

DRAWN = pytest.mark.parametrize("measure", DRAWN_MEASURES)


def test_example(backend):
    """Another seed, another draw; the same seed, the same draw. Where nothing is masked, nothing is drawn."""
    logits = torch.tensor([[0.0, 1.0, 0.5]]).expand(1000, 3)
    input_ids = torch.full((1000,), MASK)
    input_ids[0] = 4
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK, temperature=0.5, seed=1)
    assert token_ids[0] == 4 and confidence[0] == -INF
    chances = (logits[0] / 0.5).softmax(-1)
    counts = torch.bincount(token_ids[1:], minlength=3)
    assert ((counts / 999 - chances).abs() < 0.05).all()
    torch.testing.assert_close(confidence[1:], chances[token_ids[1:]])
    again = fk.predict_tokens(logits, input_ids, MASK, temperature=0.5, seed=1)[0]
    other = fk.predict_tokens(logits, input_ids, MASK, temperature=0.5, seed=2)[0]
    assert torch.equal(token_ids, again) and not torch.equal(token_ids, other)


# Known answers of Random123, the authors' own library: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers_of_philox(counter: str, key: str, words: str) -> None:
    numbers = [[torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key)]
    assert " ".join(f"{int(word):08x}" for word in philox(*numbers)) == words


def test_noise_is_exact_enough() -> None:
    """All 2^24 uniform numbers, against float64."""
    upper = torch.arange(2**24)
    uniform = ((upper.float() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24).double()
    noise = noise_of(upper << 8)
    assert (noise.double() + (-torch.log1p(-uniform)).log()).abs().max() < 2e-6
    assert noise.isfinite().all() and noise.min() > -2.812 and noise.max() < 17.329
    assert torch.equal(noise_of((upper << 8) + 255), noise)  # the lower bits do not count


@st.composite
def draws(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    logits, input_ids, arguments = draw(calls())
    random = generator(draw(st.integers(0, 2**32)))
    few = draw(st.booleans())
    arguments["measure"] = "prob" if arguments["measure"] in ("prob", "margin") else "log_odds"
    arguments["temperature"] = draw(st.sampled_from([0.1, 0.7, 1.0, 3.0, 1e-6]))
    if draw(st.booleans()):  # one a position, of which some draw nothing
        temperatures = torch.tensor([arguments["temperature"], 0.0, 1.3, -1.0, math.nan])
        arguments["temperature"] = temperatures[torch.randint(0, 5, input_ids.shape, generator=random)]
    arguments["seed"] = torch.randint(0, 3 if few else 2**62, input_ids.shape, generator=random)
    arguments["positions"] = torch.randint(0, 100 if few else 2**40, input_ids.shape, generator=random)
    if Constants(draw).value(
        st.booleans(), few=["mask_index" in arguments]
    ):  # one of each row's logits, whatever it is
        places = torch.randint(0, logits.shape[-1], (*input_ids.shape, 1), generator=random)
        arguments["floor"] = logits.float().gather(-1, places).squeeze(-1)
    return logits, input_ids, arguments


@st.composite
def draws_in_parts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], list[int]]:
    """Parts begin at multiples of 4, as one counter serves four tokens."""
    logits, input_ids, arguments = draw(draws())
    quads = logits.shape[-1] // 4
    edges = Constants(draw).value(st.lists(st.integers(0, quads), max_size=4), few=[[]])
    return logits, input_ids, arguments, [4 * edge for edge in edges if edge]


def oracle(logits, input_ids, *, mask_index=None, measure="prob", suppress_tokens=None, logits_shift=False, **drawing):
    temperature = drawing["temperature"]
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full(input_ids.shape, temperature)
    drawn = (*map((drawing | {"temperature": temperature}).get, NAMES), None, "exclude")
    return reference(logits, input_ids, MASK, mask_index, measure, suppress_tokens, logits_shift, *drawn)


NAMES = ("temperature", "seed", "positions", "floor")


@given(call=draws())
@settings(max_examples=300)
def test_agrees_with_the_oracle(native_backend, call):
    """Equal tokens, so equal noise in every bit."""
    logits, input_ids, arguments = call
    result = fk.predict_tokens(logits, input_ids, MASK, **arguments)
    # The oracle's logits are those divided by the temperature, rounded, as here; so only terms differ.
    assert_close(result, oracle(logits, input_ids, **arguments), arguments["measure"])


@given(call=draws_in_parts())
@settings(max_examples=150)
def test_parts_agree_with_the_oracle(native_backend, call):
    logits, input_ids, arguments, edges = call
    result = in_parts(logits, input_ids, edges, **arguments)
    assert_close(result, oracle(logits, input_ids, **arguments), arguments["measure"])


@pytest.mark.parametrize("isa", usable_cpu_isas())
@given(call=draws())
@settings(max_examples=100)
def test_every_instruction_set_agrees_with_the_oracle(isa, call):
    logits, input_ids, arguments = call
    with fk.use_backend("cpu"), pytest.MonkeyPatch.context() as environment:
        environment.setenv("FREEDAVE_CPU_ISA", isa)
        result = fk.predict_tokens(logits, input_ids, MASK, **arguments)
    assert_close(result, oracle(logits, input_ids, **arguments), arguments["measure"])


@DRAWN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(native_backend, dtype, measure):
    logits = (torch.randn(4, 151936, generator=generator(0)) * 3).to(dtype)
    logits[0, 1234] = 40.0
    arguments = {"measure": measure, "temperature": 0.8, "seed": torch.arange(4), "positions": torch.arange(4)}
    result = fk.predict_tokens(logits, torch.full((4,), MASK), MASK, **arguments)
    assert result[0][0] == 1234
    assert_close(result, oracle(logits, torch.full((4,), MASK), **arguments), measure)


def test_every_token_has_its_own_noise(backend):
    """Equal logits: the token is the one with the largest noise, wherever it stands."""
    vocab, rows = 20_000, 40
    seed, positions = torch.full((rows,), 2**63 - 5), torch.arange(rows) + 2**33
    noise = token_noise(seed, positions, 0, vocab)
    best = noise.max(-1).values
    expected = torch.where(noise == best[:, None], torch.arange(vocab), vocab).amin(-1)
    drawing = {"temperature": 2.0, "seed": seed, "positions": positions}
    token_ids, confidence = fk.predict_tokens(torch.ones(rows, vocab), torch.full((rows,), MASK), MASK, **drawing)
    assert torch.equal(token_ids, expected)
    assert confidence.tolist() == pytest.approx([1 / vocab] * rows, rel=1e-6)


def test_tokens_below_the_floor_are_not_drawn(backend):
    """The others are, as often as their probability among themselves says, which is their confidence. Ties stay."""
    logits = torch.tensor([2.0, 1.0, 0.5, 1.0, 0.999]).expand(200, 5)
    floor = fk.logit_floor(logits[:1], top_k=2, temperature=0.8)
    assert floor.tolist() == [1.0]
    token_ids, confidence = fk.predict_tokens(
        logits, torch.full((200,), MASK), MASK, temperature=0.8, seed=5, floor=floor.expand(200)
    )
    chances = (torch.where(logits[0] >= 1, logits[0], -INF) / 0.8).softmax(-1)
    assert set(token_ids.tolist()) == {0, 1, 3}
    assert ((torch.bincount(token_ids, minlength=5) / 200 - chances).abs() < 0.12).all()
    torch.testing.assert_close(confidence, chances[token_ids], rtol=1e-6, atol=0)


def test_a_floor_that_is_missed_leaves_nothing(backend):
    """A position is not predicted where all its tokens are below; -inf and NaN leave everything."""
    logits = torch.randn(4, 5000, generator=generator(4))
    floor, input_ids = torch.tensor([100.0, -INF, math.nan, INF]), torch.full((4,), MASK)
    token_ids, confidence = fk.predict_tokens(logits, input_ids, MASK, temperature=1.0, seed=5, floor=floor)
    plain = fk.predict_tokens(logits, input_ids, MASK, temperature=1.0, seed=5)
    assert token_ids[[0, 3]].tolist() == [MASK, MASK] and confidence[[0, 3]].tolist() == [-INF, -INF]
    assert torch.equal(token_ids[1:3], plain[0][1:3]) and torch.equal(confidence[1:3], plain[1][1:3])
    logits[1, 4000] = math.nan  # is below no floor
    broken = fk.predict_tokens(logits, input_ids, MASK, temperature=1.0, seed=5, floor=torch.full((4,), 2.0))
    assert broken[1].isneginf().tolist() == [False, True, False, False]


@pytest.mark.parametrize("vocab", [2, 5, 64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_those_of_the_softmax(vocab, temperature):
    """Chi-square of 100,000 draws; a wrong distribution by a percent would show."""
    count = 100_000
    logits = torch.randn(vocab, generator=generator(vocab))
    drawing = {"temperature": temperature, "seed": 7, "positions": torch.arange(count)}
    with fk.use_backend("cpu"):
        token_ids, _ = fk.predict_tokens(logits.expand(count, vocab), torch.full((count,), MASK), MASK, **drawing)
    expected = count * (logits.double() / temperature).softmax(-1)
    statistic = ((torch.bincount(token_ids, minlength=vocab) - expected) ** 2 / expected).sum().item()
    freedom = vocab - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


@DRAWN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_division_does_not_show(backend, dtype, measure):
    """Bitwise, whatever parts the vocabulary is divided into at multiples of 4,096, and alone or among others."""
    count = unless_interpreted(backend, 5, 2)
    logits = (torch.randn(count, 20000, generator=generator(1)) * 2).to(dtype)
    input_ids, seed, positions = torch.full((count,), MASK), torch.arange(count) * 2**40, torch.arange(count) + 9
    arguments = {"measure": measure, "temperature": 0.9}
    whole = in_parts(logits, input_ids, [], seed=seed, positions=positions, **arguments)
    assert torch.equal(whole[0], oracle(logits, input_ids, seed=seed, positions=positions, **arguments)[0])
    for edges in ([4096], [12288, 16384], range(0, 20000, 4096)):
        again = in_parts(logits, input_ids, edges, seed=seed, positions=positions, **arguments)
        assert all(map(torch.equal, again, whole))
    for row in range(count):
        alone = slice(row, row + 1)
        drawing = {"seed": seed[alone], "positions": positions[alone]}
        result = in_parts(logits[alone].clone(), input_ids[:1], [4096], **drawing, **arguments)
        assert all(torch.equal(one, many[alone]) for one, many in zip(result, whole, strict=True))


@DRAWN
def test_states_are_those_of_the_oracle(native_backend, measure):
    """So states of one backend can be merged by another."""
    logits = torch.randn(2, 3, 9000, generator=generator(0)) * 3
    logits[0, 0, 4096:8192] = -INF
    input_ids = torch.tensor([[MASK, MASK, 1], [2, MASK, MASK]])
    suppress, seed = torch.tensor([100_005, 100_100, 3]), torch.tensor([[5], [6]]).expand(2, 3)
    positions = torch.arange(3).expand(2, 3)
    temperature = torch.tensor([[1.5], [0.0]]).expand(2, 3)
    drawing = {"temperature": temperature, "seed": seed, "positions": positions}
    states = fk.partial_predictions(
        logits, input_ids, MASK, first_token_id=100_000, measure=measure, suppress_tokens=suppress, **drawing
    )
    expected = reference_partial(
        logits, input_ids, MASK, 100_000, None, measure, suppress, False, *map(drawing.get, NAMES)
    )
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=0)
    merged = fk.merge_predictions(states, input_ids, measure=measure, temperature=temperature)
    assert_close(merged, reference_merge(expected, input_ids, measure, True), measure)


def test_a_single_token_is_certain(backend):
    for measure, certain in (("prob", 1.0), ("log_odds", LARGEST_LOG_ODDS)):
        logits = torch.full((1, 9), -INF)
        logits[0, 6] = -2.0
        result = fk.predict_tokens(logits, torch.tensor([MASK]), MASK, measure=measure, temperature=0.5, seed=3)
        assert (result[0].item(), result[1].item()) == (6, certain)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_broken_rows_are_never_drawn(backend, value):
    logits = torch.randn(2, 9000, generator=generator(2))
    logits[0, 5000] = value
    token_ids, confidence = fk.predict_tokens(logits, torch.full((2,), MASK), MASK, temperature=1.0, seed=3)
    assert token_ids[0] == MASK and confidence[0] == -INF and confidence[1] > 0


def test_seeds_and_positions_by_default(backend):
    """One seed for all, and the positions of a sequence; 64 bits, with a sign or without."""
    logits, input_ids = torch.randn(2, 5, 40, generator=generator(3)), torch.full((2, 5), MASK)
    ours = fk.predict_tokens(logits, input_ids, MASK, temperature=1.0, seed=2**64 - 3)
    seed, positions = torch.full((2, 5), -3), torch.arange(5).expand(2, 5)
    theirs = fk.predict_tokens(logits, input_ids, MASK, temperature=1.0, seed=seed, positions=positions)
    assert all(map(torch.equal, ours, theirs))


def test_without_a_temperature_nothing_is_drawn(backend):
    logits, input_ids = torch.randn(2, 5, 40, generator=generator(3)), torch.full((2, 5), MASK)
    ours = fk.predict_tokens(logits, input_ids, MASK, temperature=0.0, seed=3)
    assert all(map(torch.equal, ours, fk.predict_tokens(logits, input_ids, MASK)))


@DRAWN
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_each_position_has_its_temperature(backend, measure, parts):
    """Bitwise as alone, with a number for all; and where there is none, as without a temperature, to the last bit."""
    logits = torch.randn(6, 12000, generator=generator(4)) * 3
    logits[4] = logits[1]  # beside a draw from the same logits
    logits[5, 7000] = logits[5, 200] = 30.0  # the largest one twice
    input_ids, seed, positions = torch.full((6,), MASK), torch.arange(6) + 3, torch.arange(6)
    temperature = torch.tensor([0.7, 0.0, 2.5, -1.0, 0.9, math.nan])
    floor = torch.where(temperature > 0, 0.5, -INF)
    predict = functools.partial(in_parts, edges=[4096]) if parts else in_one
    drawing = {"seed": seed, "positions": positions, "floor": floor}
    found = predict(logits, input_ids, measure=measure, temperature=temperature, **drawing)
    for row, each in enumerate(temperature.tolist()):
        alone = {name: value[row : row + 1] for name, value in drawing.items()} if each > 0 else {}
        options = {"temperature": each, **alone} if each > 0 else {}
        expected = predict(logits[row : row + 1], input_ids[:1], measure=measure, **options)
        assert all(torch.equal(one, many[row : row + 1]) for one, many in zip(expected, found, strict=True)), row
    assert found[0][5] == 200


def in_one(logits, input_ids, **arguments):
    return fk.predict_tokens(logits, input_ids, MASK, **arguments)


def test_a_temperature_is_rounded_to_float32(backend):
    logits, input_ids = torch.randn(4, 900, generator=generator(5)), torch.full((4,), MASK)
    drawing = {"seed": torch.arange(4), "positions": torch.arange(4)}
    one = fk.predict_tokens(logits, input_ids, MASK, temperature=0.7, **drawing)
    each = fk.predict_tokens(logits, input_ids, MASK, temperature=torch.full((4,), 0.7), **drawing)
    assert all(map(torch.equal, one, each))


def test_opcheck():
    logits, input_ids = torch.randn(2, 3, 40, generator=generator(8)), torch.full((2, 3), MASK)
    drawing = (torch.full((2, 3), 0.7), torch.ones_like(input_ids), torch.arange(3).expand(2, 3), torch.zeros(2, 3))
    plain = (None, "prob", None, False)
    torch.library.opcheck(torch.ops.freedave.predict_tokens.default, (logits, input_ids, MASK, *plain, *drawing))
    partial = torch.ops.freedave.partial_predictions.default
    torch.library.opcheck(partial, (logits, input_ids, MASK, 4, *plain, *drawing))
    states = partial(logits, input_ids, MASK, 4, *plain, *drawing)
    torch.library.opcheck(torch.ops.freedave.merge_predictions.default, (states, input_ids, "prob", True))


def test_compiles_without_graph_breaks():
    def step(logits, input_ids):
        return fk.predict_tokens(logits * 2, input_ids, MASK, temperature=0.5, seed=3)

    logits, input_ids = torch.randn(2, 4, 30, generator=generator(9)), torch.full((2, 4), MASK)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(logits, input_ids), step(logits, input_ids)))


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be 0 or between 1e-30 and 1e30, got -0.5"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0 or between 1e-30 and 1e30, got nan"),
        ({"temperature": "warm"}, TypeError, "temperature must be a float, got str"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must have shape \(2, 3\).*got \(2,\)"),
        ({"temperature": torch.ones(2, 3).double()}, TypeError, "temperature must be float32, got float64"),
        ({"temperature": torch.ones(2, 3, device="meta")}, ValueError, elsewhere("temperature", "logits")),
        ({"seed": None}, ValueError, "seed must be an int or an int64 tensor with a temperature, got None"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits, got 18446744073709551616"),
        ({"seed": IDS.int()}, TypeError, "seed must be int64, got int32"),
        ({"seed": IDS[0]}, ValueError, r"seed must have shape \(2, 3\).*got \(3,\)"),
        ({"positions": IDS[:, :2]}, ValueError, r"positions must have shape \(2, 3\).*got \(2, 2\)"),
        ({"positions": IDS.to("meta")}, ValueError, elsewhere("positions", "logits")),
        ({"floor": IDS}, TypeError, "floor must be float32, got int64"),
        ({"floor": 0.5}, TypeError, "floor must be a float32 tensor, got float"),
        ({"floor": torch.zeros(2)}, ValueError, r"floor must have shape \(2, 3\).*got \(2,\)"),
        ({"floor": torch.zeros(2, 3, device="meta")}, ValueError, elsewhere("floor", "logits")),
        ({"temperature": 0.0, "floor": torch.zeros(2, 3)}, ValueError, "floor needs a temperature above 0"),
        ({"measure": "margin"}, ValueError, "with a temperature measure must be 'prob' or 'log_odds', got 'margin'"),
        ({"first_token_id": 6}, ValueError, "with a temperature first_token_id must be a multiple of 4, got 6"),
    ],
    ids=str,
)
def test_argument_errors(backend, change, error, message):
    arguments = {"temperature": 0.7, "seed": 1} | change
    with pytest.raises(error, match=f"partial_predictions: {message}"):
        fk.partial_predictions(torch.zeros(2, 3, 10), IDS, MASK, **arguments)


def test_argument_errors_of_the_merge(backend):
    states = torch.zeros(2, 3, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="merge_predictions: temperature must be 0 or between"):
        fk.merge_predictions(states, IDS, temperature=-1.0)
    with pytest.raises(ValueError, match="merge_predictions: with a temperature measure must be"):
        fk.merge_predictions(states, IDS, temperature=1.0, measure="neg_entropy")
