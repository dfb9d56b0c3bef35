"""generate(measure=...): what positions are ranked by, lossless whichever it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_decoding import BLOCK_CAUSAL, DRAFTINGS, FULL
from tiny_models import golden_lm, prompt

import freedave
from freedave.decode.settings import least_log_odds
from freedave.demo.tasks import TASKS, problems
from freedave_kernels.contract import MEASURES, POOLED_DRAFTINGS


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("family", ["block_causal", "full"])
def test_example(family: str, drafting: str, measure: str) -> None:
    """The tokens and steps of static decoding by the same measure, in fewer forwards."""
    lm = golden_lm(family)
    for seed in range(3):
        out = freedave.generate(
            lm, prompt(8, seed), 24, block_length=8, drafting=drafting, measure=measure, check_lossless=True
        )
        assert out.static is not None and out.num_forwards < out.static.num_forwards


@pytest.mark.parametrize("case", [*BLOCK_CAUSAL, *FULL])
def test_golden_decodes_by_probabilities(case: dict[str, Any]) -> None:
    """The same as by log-odds, the default: the confidences of these decodes are apart."""
    out = freedave.generate(
        golden_lm(case["family"], block_length=case["block_length"]),
        torch.tensor([case["prompt"]]),
        max_new_tokens=len(case["sequence"]) - len(case["prompt"]),
        block_length=case["block_length"],
        order=case["order"],
        cache=case.get("cache", "auto"),
        measure="prob",
    )
    assert out.sequences[0].tolist() == case["sequence"]
    assert out.step_map[0].tolist() == case["step"]


@pytest.mark.parametrize("measure", ["prob", "log_odds"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.5, 1.0, 1.5])
def test_a_threshold_is_a_probability(threshold: float, measure: str) -> None:
    """Whatever positions are ranked by, as the probabilities of these decodes are apart from it."""
    lm = golden_lm(block_length=8)
    out = freedave.generate(lm, prompt(), 32, threshold=threshold, measure=measure, check_lossless=True)
    theirs = freedave.generate(lm, prompt(), 32, threshold=threshold)
    assert torch.equal(out.sequences, theirs.sequences) and torch.equal(out.step_map, theirs.step_map)


@pytest.mark.parametrize("threshold", [1e-30, 0.1, 0.5, 0.9, 0.95, 1 - 2.0**-24, 1 - 2.0**-40, 1.0])
def test_thresholds_are_converted_once(threshold: float) -> None:
    """Float64 probabilities reach the threshold from the converted one on, and below it they do not."""
    least = least_log_odds(threshold)
    width = 1e-9 if threshold < 0.999 else 1e-3  # probabilities near 1 are rounded to few values
    near = sorted([least * (1 - width) - 1e-9, least * (1 + width) + 1e-9])
    assert [1 / (1 + math.exp(-log_odds)) >= threshold for log_odds in near] == [False, True]


def test_thresholds_at_the_ends() -> None:
    assert least_log_odds(0.0) == least_log_odds(-1.0) == -math.inf
    assert least_log_odds(1.5) == math.inf


@pytest.mark.parametrize("drafting", POOLED_DRAFTINGS)
def test_log_odds_rank_what_probabilities_do_not(drafting: str) -> None:
    """The embedded model is so sure of many positions that their float32 probabilities are 1.0: it fills them in another
    order then, and pooled drafts foresee that order as well."""
    lm = freedave.load_model("demo")
    assert lm.tokenizer is not None
    forwards, steps = dict.fromkeys(("prob", "log_odds"), 0), dict[str, list[list[int]]](prob=[], log_odds=[])
    for problem in (problem for task in TASKS for problem in problems(task, "test", 1, 0)):
        row = torch.tensor([lm.tokenizer(problem.prompt)["input_ids"]])
        for measure in forwards:
            options = {"executor": "planned", "drafting": drafting, "measure": measure, "check_lossless": True}
            out = freedave.generate(lm, row, 96, 8, 16, **options)
            forwards[measure] += out.num_forwards
            steps[measure] += out.step_map.tolist()
    assert steps["log_odds"] != steps["prob"]
    assert forwards["log_odds"] <= 1.1 * forwards["prob"]


@pytest.mark.parametrize("measure", ["margin", "neg_entropy"])
def test_a_threshold_needs_probabilities(measure: str) -> None:
    message = f"threshold is a probability: it needs measure='prob' or 'log_odds', got measure='{measure}'"
    with pytest.raises(ValueError, match=message):
        freedave.generate(golden_lm(), prompt(), 8, threshold=0.5, measure=measure)


def test_an_unknown_measure() -> None:
    with pytest.raises(ValueError, match="measure must be one of prob, log_odds, margin, neg_entropy, got 'odds'"):
        freedave.generate(golden_lm(), prompt(), 8, measure="odds")
