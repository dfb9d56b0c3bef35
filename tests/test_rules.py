"""What a threshold bounds, in `generate` and `Decoder`: drafts commit what static decoding by the same rule commits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import golden_lm, prompt

import freedave
from freedave.decode.settings import SequenceSettings, least_log_odds, resolve_settings
from freedave_kernels.contract import DRAFTINGS, POOLED_DRAFTINGS

FAMILIES = [("block_causal", "auto"), ("full", "none"), ("full", "dual"), ("full_shifted", "prefix")]
# With numbers that let some steps commit several positions, and others one.
RULES: list[tuple[str, str, float]] = [
    ("strict", "prob", 0.6),
    ("strict", "log_odds", 0.6),
    ("factor", "prob", 2.0),
    ("entropy_bound", "neg_entropy", 3.0),
]


@pytest.mark.parametrize(("rule", "measure", "threshold"), RULES)
@pytest.mark.parametrize("drafting", [*DRAFTINGS, *POOLED_DRAFTINGS])
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
@pytest.mark.parametrize("executor", ["planned", "graph"])
def test_lossless(
    executor: str, family: str, cache: str, drafting: str, rule: str, measure: str, threshold: float
) -> None:
    """Tokens and the step of each; fewer steps than positions, as a step of one position each has, and more than blocks."""
    lm = golden_lm(family)
    common: dict[str, Any] = {
        "block_length": 8,
        "cache": cache,
        "rule": rule,
        "measure": measure,
        "threshold": threshold,
    }
    for seed in range(3):
        row = prompt(6 + seed, seed)
        options = common | {"executor": executor, "drafting": drafting}
        out = freedave.generate(lm, row, 24, 4, check_lossless=True, **options)
        static = freedave.generate(lm, row, 24, 1, executor="planned", **common)
        assert torch.equal(out.sequences, static.sequences) and torch.equal(out.step_map, static.step_map)
        assert 3 < int(static.step_map.max()) + 1 < 24
        assert out.num_forwards <= static.num_forwards


@pytest.mark.parametrize("executor", ["planned", "graph"])
@pytest.mark.parametrize(("rule", "measure", "thresholds"), [(*RULES[2][:2], (2.0, 0.5)), (*RULES[3][:2], (3.0, 9.0))])
def test_each_sequence_has_its_own_number(
    rule: str, measure: str, thresholds: tuple[float, ...], executor: str
) -> None:
    lm = golden_lm()
    options: dict[str, Any] = {"block_length": 8, "rule": rule, "measure": measure}
    settings = resolve_settings(lm, 1, 16, draft_steps=4, threshold=thresholds[0], executor=executor, **options)
    engine = freedave.Decoder(lm, settings, slots=2, capacity=64)
    sequences = [engine.add(prompt(6)[0].tolist(), SequenceSettings(threshold=each)) for each in (None, thresholds[1])]
    while engine.sequences:
        engine.launch()
        engine.poll()
    for sequence, threshold in zip(sequences, thresholds, strict=True):
        alone = freedave.generate(lm, prompt(6), 16, 1, threshold=threshold, executor="planned", **options)
        assert sequence.generated(sequence.tokens) == alone.sequences[0, 6:].tolist()
        assert sequence.generated(sequence.step_map) == alone.step_map[0].tolist()
    assert sequences[0].steps_taken != sequences[1].steps_taken


@pytest.mark.parametrize(
    ("rule", "measure"),
    [("threshold", "log_odds"), ("strict", "log_odds"), ("factor", "prob"), ("entropy_bound", "neg_entropy")],
)
def test_a_rule_has_its_measure(rule: str, measure: str) -> None:
    """Where nobody says what positions are ranked by."""
    assert resolve_settings(golden_lm(), 1, 8, threshold=0.3, rule=rule).measure == measure


def test_what_must_be_exceeded() -> None:
    """The next float64 is to be reached, in probabilities or log-odds."""
    for measure in ("prob", "log_odds"):
        settings = resolve_settings(golden_lm(), 1, 8, threshold=0.3, rule="strict", measure=measure)
        least = math.nextafter(0.3, 1.0)
        assert settings.step_rule == "threshold"
        assert settings.least_confidence == (least if measure == "prob" else least_log_odds(least))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "factor"}, "rule='factor' needs a threshold, its number; got None"),
        ({"rule": "strict"}, "rule='strict' needs a threshold, its number; got None"),
        (
            {"rule": "factor", "threshold": 1.0, "measure": "log_odds"},
            "rule='factor' needs measure='prob', got measure=",
        ),
        (
            {"rule": "entropy_bound", "threshold": 0.3, "measure": "prob"},
            "rule='entropy_bound' needs measure='neg_entropy', got measure='prob'",
        ),
        ({"rule": "strict", "threshold": 0.3, "measure": "margin"}, "threshold is a probability: it needs measure="),
        ({"rule": "softer"}, "rule must be one of threshold, strict, factor, entropy_bound, got 'softer'"),
    ],
    ids=str,
)
def test_bad_rules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freedave.generate(golden_lm(), prompt(), 8, **options)
