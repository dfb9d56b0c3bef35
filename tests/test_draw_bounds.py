"""Tokens that are left out of a draw because their noise cannot be large enough: none that would have been drawn is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import INTERPRETED, NATIVE_BACKENDS, on_backend
from states import INF, generator
from test_predict_tokens import DTYPES, MASK, assert_close

import freedave_kernels as fk
from freedave_kernels._C import usable_cpu_isas
from freedave_kernels.reference.predict_tokens import predict_tokens as reference
from freedave_kernels.reference.sampling import token_noise

VOCAB = 40_003  # three chunks of the CPU's, the last of which ends within a tile
# The ends of what kernels take together (fours, vectors, tiles of 2,048, chunks of 16,384), and some in between.
PLACES = [0, 3, 4, 63, 127, 128, 1000, 2047, 2048, 16383, 16384, 20001, 32768, 39935, 39936, 40000, 40002]
# Counters whose word is 0 in its upper 24 bits: (seed, token), at position 5. No noise is larger.
LARGEST = [(803, 27480), (1380, 6670), (1516, 35622), (1598, 25648), (2886, 12062)]


# Where Triton compiles, it is among them; its interpreter would take minutes.
OTHERS = [name for name in NATIVE_BACKENDS if name != "cpu" and not (name == "triton" and INTERPRETED)]


@pytest.fixture(params=[*(f"cpu {isa}" for isa in usable_cpu_isas()), *OTHERS])
def kernels(request, monkeypatch):
    """Of every backend, and for each instruction set of the CPU's."""
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv("FREEDAVE_CPU_ISA", isa)
    yield from on_backend(name)


def drawn(logits, seed, positions, temperature=1.0, **arguments):
    """The tokens, after all was compared with the oracle."""
    input_ids = torch.full(logits.shape[:-1], MASK)
    drawing = {"temperature": temperature, "seed": seed, "positions": positions}
    result = fk.predict_tokens(logits, input_ids, MASK, **drawing, **arguments)
    suppress, floor = arguments.get("suppress_tokens"), arguments.get("floor")
    drawn = (torch.full(input_ids.shape, temperature), seed, positions, floor, None, "exclude")
    expected = reference(logits, input_ids, MASK, None, "prob", suppress, False, *drawn)
    assert_close(result, expected, "prob")
    return result[0]


def keys(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows) * 2**33 + 7, torch.arange(rows) + 2**40


def peaked(rows: int, vocab: int = VOCAB) -> torch.Tensor:
    """As a language model's: most logits spread over 25 units, a few are large, one of a hundred rows' is far above."""
    logits = torch.randn(rows, vocab, generator=generator(rows)) * 3
    places = torch.rand(rows, vocab, generator=generator(1)).topk(20).indices
    return logits.scatter(1, places, torch.rand(rows, 20, generator=generator(2)) * 12 + 13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40])  # few rows are shared by chunks
def test_peaked_rows(kernels, dtype, rows):
    for temperature in (0.3, 1.0, 2.5):
        drawn(peaked(rows).to(dtype), *keys(rows), temperature)


def test_peaked_rows_by_threads(threads):
    with fk.use_backend("cpu"):
        for rows in (1, 3, 40):
            drawn(peaked(rows), *keys(rows))


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.5, 7.0])
def test_rows_of_which_much_or_little_might_win(kernels, scale):
    drawn(torch.randn(4, VOCAB, generator=generator(5)) * scale, *keys(4))


def rivals(seed: torch.Tensor, positions: torch.Tensor, places: list[int], rest: torch.Tensor, by: float):
    """Rows of which the middle has the largest logit, 30, and each place one by which its noisy logit is larger by `by`."""
    noise = token_noise(seed, positions, 0, rest.shape[-1])
    logits, rows, leader = rest.clone(), torch.arange(len(places)), rest.shape[-1] // 2
    logits[:, leader] = 30.0
    logits[rows, places] = 30.0 + noise[:, leader] - noise[rows, places] + by
    return logits


@pytest.mark.parametrize("by", [1e-4, -1e-4])
@pytest.mark.parametrize("below", [30.0, 8.0])  # the other logits: hopeless, or such that words must be looked at
def test_the_winner_may_stand_anywhere(native_backend, by, below):
    """In the first, the last and any other place, below the largest logit or above it."""
    seed, positions = keys(len(PLACES))
    rest = torch.randn(len(PLACES), VOCAB, generator=generator(6)) - below
    tokens = drawn(rivals(seed, positions, PLACES, rest, by), seed, positions)
    assert tokens.tolist() == (PLACES if by > 0 else [VOCAB // 2] * len(PLACES))


@pytest.mark.parametrize("by", [2e-5, -2e-5])
@pytest.mark.parametrize("rest", [-100.0, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_largest_noise_decides(kernels, by, rest, temperature):
    """The winner lies as far below the largest logit as any can; by a few units less, the largest logit's token wins."""
    seed, places = torch.tensor([seed for seed, _ in LARGEST]), [token for _, token in LARGEST]
    positions = torch.full_like(seed, 5)
    noise = token_noise(seed, positions, 0, VOCAB)[torch.arange(len(places)), places]
    assert (noise > 17.3286).all()
    others = torch.full((len(places), VOCAB), rest)
    logits = rivals(seed, positions, places, others, by) * temperature
    rows = torch.arange(len(places))
    first = torch.tensor(places) // 16384 * 16384
    logits[rows, first] = logits[rows, places]  # a chunk's bound is then that of a token that does not win
    assert drawn(logits, seed, positions, temperature).tolist() == (places if by > 0 else [VOCAB // 2] * len(places))


def test_two_values_as_far_apart_as_noise_goes(kernels):
    """Whether the lower value is out is a matter of one step of a float."""
    for largest, count in itertools.product((17.3286, 17.3287, 17.33, 20.14), (1, 30)):
        logits = torch.full((len(LARGEST), VOCAB), -largest)
        logits[:, torch.randperm(VOCAB, generator=generator(count))[:count]] = 0.0
        seed = torch.tensor([seed for seed, _ in LARGEST])
        drawn(logits, seed, torch.full_like(seed, 5))


@pytest.mark.parametrize("exponent", [18, 23, 27])
def test_of_equal_noisy_logits_the_lowest_token_is_drawn(kernels, exponent):
    """Noise is lost in so large logits, or counts in few steps: ties, of which the largest logit's may stand last."""
    rows, unit = 12, 2.0 ** (exponent - 23)
    steps = torch.randint(-30, 1, (rows, VOCAB), generator=generator(8))
    logits = 2.0**exponent + steps * unit
    logits[:, VOCAB - 1] = 2.0**exponent + unit
    drawn(logits, *keys(rows))
    drawn(torch.where(torch.arange(VOCAB) % 4999 == 4998, 2.0**exponent, 0.0).expand(rows, VOCAB), *keys(rows))


@pytest.mark.parametrize("value", [math.nan, INF, 1e30])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_what_is_suppressed_bounds_nothing(kernels, value, scale):
    """Neither hides the logits around it, nor lets others pass for hopeless."""
    tokens = torch.arange(VOCAB)
    for suppress in (tokens[tokens % 97 == 0], tokens[tokens % 32 >= 16]):
        logits = torch.randn(4, VOCAB, generator=generator(9)) * scale
        logits[:, suppress] = value
        drawn(logits, *keys(4), suppress_tokens=suppress)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_is_below_the_floor_bounds_nothing(kernels, scale):
    logits = torch.randn(6, VOCAB, generator=generator(10)) * scale
    drawn(logits, *keys(6), floor=logits.topk(50).values[:, -1])
    drawn(logits, *keys(6), floor=torch.tensor([-1.0, 0.0, 1.0, -INF, math.nan, 2.0]))


@pytest.mark.parametrize("how", ["never", "floor", "suppressed"])
def test_one_token_is_left(kernels, how):
    """Where nothing else could win, it is drawn, however little it has."""
    places = torch.tensor(PLACES)
    logits = torch.randn(len(PLACES), VOCAB, generator=generator(11)) * 2
    tokens, arguments = torch.arange(VOCAB), {}
    if how == "suppressed":
        places = places[5:6].expand(len(PLACES))
        arguments["suppress_tokens"] = tokens[tokens != places[0]]
    elif how == "floor":
        logits.scatter_(1, places[:, None], 20.0)
        arguments["floor"] = torch.full((len(PLACES),), 19.0)
    else:
        logits = torch.where(tokens == places[:, None], -1e4, -INF)
    assert torch.equal(drawn(logits, *keys(len(PLACES)), **arguments), places)


@pytest.mark.parametrize("temperature", [1.0, 0.37])
def test_no_token_is_passed_over(kernels, temperature):
    """A token is left out where its word cannot win, which must hold to the last rounding: logits a few units in the last
    place apart, of every size, to which noise adds all, half a unit or nothing.
    """
    rows, vocab = 80, 3001
    unit = torch.randint(-6, 7, (rows, vocab), generator=generator(4))
    size = torch.arange(rows)[:, None] % 40 - 5
    logits = (2.0**size + unit * 2.0 ** (size - 23)) * torch.where(torch.arange(rows)[:, None] < 40, 1, -1)
    drawn(logits, torch.arange(rows) + 2**40, torch.arange(rows), temperature)


def test_hopeless_tokens(kernels):
    """One chunk, of which every group of 256 tokens among the first 1,024 has one that leaves no other a chance."""
    logits = torch.randn(6, 16384, generator=generator(12)) - 40.0
    logits[:, 5:1024:256] = 0.0
    assert set(drawn(logits, *keys(6)).tolist()) <= {5, 261, 517, 773}
