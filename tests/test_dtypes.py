"""Under autocast, and with another default dtype: what works alone works there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import golden_lm, prompt

import freedave
from freedave.fixed_shape_decoder import FixedShapeDecoder
from freedave.integrations.likelihood import noise
from freedave.settings import resolve_settings

POLICIES = pytest.mark.parametrize(
    ("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual"), ("full_shifted", "prefix")]
)
BATCH = torch.cat([prompt(8, seed) for seed in range(2)])


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def steps_of_one_shape(lm: freedave.DiffusionLM, prompts: torch.Tensor, new: int) -> torch.Tensor:
    settings = resolve_settings(lm, prompts.shape[1], new, 4)
    decoder = FixedShapeDecoder(lm, settings, slots=len(prompts), capacity=settings.sequence_length(prompts.shape[1]))
    for slot, tokens in enumerate(prompts.tolist()):
        decoder.add(slot, tokens)
    while not all(decoder.poll()):
        decoder.step()
    return decoder.tokens[:, : prompts.shape[1] + new]


def test_autocast_decodes_the_embedded_model():
    """In float32 and in bfloat16 it has the same answer."""
    lm = freedave.load_model("demo")
    input_ids = lm.tokenizer("48392+7715=", return_tensors="pt").input_ids
    expected = freedave.generate(lm, input_ids, 64, draft_steps=1).sequences
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(freedave.generate(lm, input_ids, 64).sequences, expected)
        shaped = steps_of_one_shape(lm, input_ids, 64)
    ended = int((expected[0] == lm.eos_token_id).nonzero()[0])
    assert torch.equal(shaped[:, :ended], expected[:, :ended])


@POLICIES
def test_autocast_with_every_policy(family, cache):
    """Near-ties of a random model flip, and what follows from them; most tokens are the same."""
    lm = golden_lm(family, block_length=4)
    expected = freedave.generate(lm, BATCH, 16, cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        out = freedave.generate(lm, BATCH, 16, cache=cache)
    assert out.stats.tokens == 32
    assert (out.sequences == expected.sequences)[:, 8:].float().mean() > 0.5


@POLICIES
def test_another_default_dtype_changes_nothing(family, cache, request):
    lm = golden_lm(family, block_length=4)
    expected = freedave.generate(lm, BATCH, 16, cache=cache)
    request.getfixturevalue("bfloat16_by_default")
    out = freedave.generate(lm, BATCH, 16, cache=cache, check_lossless=True)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)
    if cache in ("auto", "none"):
        assert torch.equal(steps_of_one_shape(lm, BATCH, 16), expected.sequences)


@pytest.mark.parametrize(("length", "samples"), [(3, 100), (20, 8)], ids=["every subset", "random subsets"])
def test_likelihoods_with_another_default_dtype(length, samples, request):
    expected = noise(length, samples, 0)
    request.getfixturevalue("bfloat16_by_default")
    again = noise(length, samples, 0)
    assert torch.equal(again.masked, expected.masked) and torch.equal(again.weight, expected.weight)
