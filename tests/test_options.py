"""Decoding options: one dataclass, which everything that takes options agrees with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy
import pytest
import torch
from tiny_models import golden_lm

import freedave
from freedave.decode.options import OPTION_NAMES, Choice, DecodingOptions
from freedave.decode.settings import NEEDED_MEASURE, resolve_settings
from freedave_kernels.contract import DRAFTINGS, ORDERS, POOLED_DRAFTINGS, RULES

CHOICES = {
    each.name: each.metadata["kind"].words
    for each in fields(DecodingOptions)
    if isinstance(each.metadata["kind"], Choice)
}


def test_example() -> None:
    """What is not said is what `generate` does by itself; numbers of NumPy and tensors are numbers."""
    options = DecodingOptions(draft_steps=numpy.int64(4), block_length=torch.tensor(16), cache="none")
    assert (options.draft_steps, options.block_length, options.cache) == (4, 16, "none")
    assert (options.order, options.drafting, options.threshold) == ("confidence", "pooled", None)
    assert type(options.draft_steps) is int


def options_of(taker: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(taker).parameters
    return {name: parameters[name].default for name in OPTION_NAMES}


@pytest.mark.parametrize("taker", [freedave.generate, freedave.custom_generate])
def test_whoever_takes_options_names_all_of_them_with_their_defaults(taker: Callable[..., Any]) -> None:
    assert options_of(taker) == {each.name: each.default for each in fields(DecodingOptions)}


def test_so_does_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from freedave.integrations.lm_eval.model import FreeDaveLM

    assert options_of(FreeDaveLM) == options_of(freedave.generate)


def test_options_of_generate_are_documented() -> None:
    assert DecodingOptions.__doc__ is not None and freedave.generate.__doc__ is not None
    for name in OPTION_NAMES:
        assert f"\n        {name}: " in DecodingOptions.__doc__
        assert name in freedave.generate.__doc__


def test_choices_are_those_of_the_ops() -> None:
    assert CHOICES["order"] == ORDERS and CHOICES["rule"] == RULES
    assert CHOICES["drafting"] == (*DRAFTINGS, *POOLED_DRAFTINGS)


@pytest.mark.parametrize("executor", ["planned", "graph"])
def test_every_choice_decodes(executor: str) -> None:
    lm = golden_lm("full", block_length=4)
    prompt = torch.tensor([[5, 6, 7]])
    for name, words in CHOICES.items():
        for word in words:
            settings = {"max_new_tokens": 8, "draft_steps": 2, "executor": executor} | {name: word}
            if name == "rule":
                settings |= {"threshold": 0.5, "measure": NEEDED_MEASURE.get(word, "prob")}
            assert freedave.generate(lm, prompt, **settings).stats.tokens == 8  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_a_bad_value_is_refused_by_name(name: str) -> None:
    default = next(each.default for each in fields(DecodingOptions) if each.name == name)
    for value in ([], object(), *([] if default is None else [None])):
        with pytest.raises(TypeError, match=f"generate: {name} must be "):
            DecodingOptions(**{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        resolve_settings(golden_lm(), 1, 1, bogus=1)
