"""Under autocast, and with another default dtype: what works alone works there."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from test_graph_executor import EXACT, REFRESHED, batch_of
from tiny_models import MASK, OPTIONS, golden_lm, golden_model, prompt

import freedave
from freedave import DiffusionLM
from freedave.integrations.likelihood import noise

POLICIES = pytest.mark.parametrize(
    ("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual"), ("full_shifted", "prefix")]
)
BATCH = torch.cat([prompt(8, seed) for seed in range(2)])


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


EXECUTORS = pytest.mark.parametrize("executor", ["planned", "graph"])


@EXECUTORS
def test_autocast_decodes_the_embedded_model(executor):
    """In float32 and in bfloat16 it has the same answer."""
    lm = freedave.load_model("demo")
    input_ids = lm.tokenizer("48392+7715=", return_tensors="pt").input_ids
    expected = freedave.generate(lm, input_ids, 64, draft_steps=1).sequences
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(freedave.generate(lm, input_ids, 64, executor=executor).sequences, expected)


@EXECUTORS
@POLICIES
def test_autocast_with_every_policy(family, cache, executor):
    """Near-ties of a random model flip, and what follows from them; most tokens are the same."""
    lm = golden_lm(family, block_length=4)
    expected = freedave.generate(lm, BATCH, 16, cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        out = freedave.generate(lm, BATCH, 16, cache=cache, executor=executor)
    assert out.stats.tokens == 32
    assert (out.sequences == expected.sequences)[:, 8:].float().mean() > 0.5


@EXECUTORS
@POLICIES
def test_another_default_dtype_changes_nothing(family, cache, executor, request):
    lm = golden_lm(family, block_length=4)
    expected = freedave.generate(lm, BATCH, 16, cache=cache)
    request.getfixturevalue("bfloat16_by_default")
    out = freedave.generate(lm, BATCH, 16, cache=cache, check_lossless=True, executor=executor)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)


@pytest.mark.parametrize("lengths", [[9], [3, 12, 8, 5]], ids=["one", "four"])
@pytest.mark.parametrize("block_length", [4, 16])
@pytest.mark.parametrize(("family", "cache"), EXACT + REFRESHED)
def test_static_decoding_in_the_same_shapes(family, cache, block_length, lengths):
    """What lossless means in 16 bits: the graph executor's steps with one draft that counts, of eight that are computed."""
    lm = DiffusionLM(copy.deepcopy(golden_model(family)).to(torch.bfloat16), MASK, **OPTIONS[family])
    options = {"max_new_tokens": 32, "block_length": block_length, "cache": cache, "executor": "graph"}
    out = freedave.generate(lm, draft_steps=8, check_lossless=True, **batch_of(lengths), **options)
    assert out.num_forwards < out.static.num_forwards


@pytest.mark.parametrize(("length", "samples"), [(3, 100), (20, 8)], ids=["every subset", "random subsets"])
def test_likelihoods_with_another_default_dtype(length, samples, request):
    expected = noise(length, samples, 0)
    request.getfixturevalue("bfloat16_by_default")
    again = noise(length, samples, 0)
    assert torch.equal(again.masked, expected.masked) and torch.equal(again.weight, expected.weight)
