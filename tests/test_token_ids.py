"""Token ids as callers have them: Python's, numpy's and torch's integers; everything else is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import MASK, golden_lm, golden_model, prompt

import freedave
from freedave.models.diffusion_lm import as_token_ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        (3, (3,)),
        ([], ()),
        ([3, 5], (3, 5)),
        (np.int64(3), (3,)),
        ([np.int32(3), 5], (3, 5)),
        (np.array([3, 5]), (3, 5)),
        (np.array(3), (3,)),
        (torch.tensor(3), (3,)),
        (torch.tensor([3]), (3,)),
        (torch.tensor([3, 5]), (3, 5)),
        ({3}, (3,)),
        (range(3), (0, 1, 2)),
    ],
    ids=repr,
)
def test_integral_numbers(given, expected):
    ids = as_token_ids(given)
    assert ids == expected and all(type(token_id) is int for token_id in ids)


@pytest.mark.parametrize(
    "given",
    [3.5, [3.5], True, [1, False], "3", ["3"], np.float32(3), np.True_, torch.tensor(3.0), torch.tensor([True]), [[3]]],
    ids=repr,
)
def test_anything_else_is_refused(given):
    with pytest.raises(TypeError, match="a token id must be an integer, got .*"):
        as_token_ids(given)


def test_where_they_are_given():
    """To a model, to `generate`, as its stop sequences, and as an attribute."""
    expected = freedave.generate(golden_lm(), prompt(), 12, eos_token_id=5).sequences
    lm = freedave.DiffusionLM(golden_model("block_causal"), np.int64(MASK), block_length=4, eos_token_id=np.int64(5))
    assert type(lm.mask_token_id) is int and lm.eos_token_id == 5
    assert torch.equal(freedave.generate(lm, prompt(), 12).sequences, expected)
    assert torch.equal(freedave.generate(golden_lm(), prompt(), 12, eos_token_id=torch.tensor(5)).sequences, expected)
    for arguments in ({"eos_token_id": [3.5]}, {"stop_sequences": [[3.5]]}):
        with pytest.raises(TypeError, match=r"a token id must be an integer, got 3\.5 \(float\)"):
            freedave.generate(golden_lm(), prompt(), 4, **arguments)
    with pytest.raises(TypeError, match=r"got 3\.5 \(float\)"):
        lm.eos_token_id = 3.5
    with pytest.raises(TypeError, match=r"got 63\.0 \(float\)"):
        freedave.DiffusionLM(golden_model("block_causal"), 63.0, block_length=4)
