"""The demo's measurement: accuracy, losslessness and cost of every mode on held-out problems."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

import freedave
from freedave.demo import comparison
from freedave.demo.comparison import (
    STATIC,
    Comparison,
    DemoSettings,
    Mode,
    Tally,
    compare,
    decode,
    identical,
    response_text,
)
from freedave.demo.tasks import TASKS, Problem, problems

SETTINGS = DemoSettings(problems_per_task=2, draft_steps=(8,))


@pytest.fixture(scope="module")
def lm() -> freedave.DiffusionLM:
    return freedave.load_model("demo")


@pytest.fixture
def one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Additions alone."""
    monkeypatch.setattr(comparison, "TASKS", {"addition": TASKS["addition"]})


@pytest.fixture(scope="module")
def result(lm: freedave.DiffusionLM) -> Comparison:
    return compare(lm, SETTINGS)


def test_freedave_gives_the_static_answers_in_fewer_forwards(result: Comparison) -> None:
    static, auto, nested, recycled, pooled, near, pipelined = (result.totals[mode] for mode in SETTINGS.modes)
    assert result.lossless
    for drafted in (auto, nested, recycled, near, pooled, pipelined):
        assert drafted.problems == static.problems == len(TASKS) * 2
        assert drafted.right == static.right and drafted.tokens == static.tokens
    assert recycled.forwards <= nested.forwards < static.forwards / 3
    assert pooled.forwards <= near.forwards < static.forwards / 3
    assert pipelined.forwards < pooled.forwards < recycled.forwards


def test_the_embedded_model_answers_held_out_problems(lm: freedave.DiffusionLM) -> None:
    held_out = [problem for task in TASKS for problem in problems(task, "test", 5, seed=1)]
    outputs = [decode(lm, problem, Mode(8), SETTINGS) for problem in held_out]
    right = [problem.check(response_text(lm, output)) for problem, output in zip(held_out, outputs, strict=True)]
    assert sum(right) >= 19


def test_tallies_add_up_what_generate_reports(lm: freedave.DiffusionLM, result: Comparison) -> None:
    held_out = problems("sorting", "test", 2, comparison.SEED)
    outputs = [
        freedave.generate(
            lm,
            torch.tensor([lm.tokenizer(problem.prompt)["input_ids"]]),
            max_new_tokens=comparison.MAX_NEW_TOKENS,
            draft_steps=8,
            block_length=16,
            drafting="recycled",
        )
        for problem in held_out
    ]
    tally = result.tallies["sorting"][Mode(8)]
    assert tally.forwards == sum(output.num_forwards for output in outputs)
    assert tally.tokens == sum(output.stats.tokens for output in outputs)
    assert tally.right == sum(
        problem.check(response_text(lm, output)) for problem, output in zip(held_out, outputs, strict=True)
    )
    assert result.totals[STATIC].forwards == sum(task[STATIC].forwards for task in result.tallies.values())


def test_the_longest_response_fits(lm: freedave.DiffusionLM) -> None:
    longest = max(
        len(lm.tokenizer(problem.response)["input_ids"])
        for task in TASKS
        for problem in problems(task, "test", 500, seed=2)
    )
    assert longest < comparison.MAX_NEW_TOKENS


@pytest.mark.usefixtures("one_task")
def test_progress_is_reported_after_each_decode(lm: freedave.DiffusionLM) -> None:
    decodes: Counter[comparison.Mode] = Counter()
    compare(lm, SETTINGS, on_decode=lambda mode, output: decodes.update({mode: output.num_forwards > 0}))
    assert decodes == dict.fromkeys(SETTINGS.modes, SETTINGS.problems_per_task)


def test_the_worked_example_has_every_mode(result: Comparison) -> None:
    assert tuple(result.example.outputs) == SETTINGS.modes
    assert result.example.problem.task == "addition"


def test_an_answer_that_is_drawn(lm: freedave.DiffusionLM, result: Comparison) -> None:
    """Another one than the likeliest, in far fewer forwards than static sampling takes for it."""
    drawn = result.drawn
    assert drawn.identical and drawn.output.num_forwards < drawn.static.num_forwards / 3
    assert response_text(lm, drawn.output) != response_text(lm, result.example.outputs[STATIC])
    drawn.output.step_map[0, 0] += 1
    try:
        assert not drawn.identical and not result.lossless
    finally:
        drawn.output.step_map[0, 0] -= 1
    assert result.lossless


@pytest.mark.usefixtures("one_task")
def test_a_decode_that_differs_is_noticed(lm: freedave.DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def different_steps(*arguments: object, **settings: object) -> freedave.DecodeOutput:
        output = freedave.generate(*arguments, **settings)  # type: ignore[arg-type]
        if settings["drafting"] == "nested":
            output.step_map = output.step_map.flip(1)
        return output

    monkeypatch.setattr(comparison, "generate", different_steps)
    result = compare(lm, SETTINGS)
    assert not result.lossless
    assert [tally.identical for tally in result.totals.values()] == [2, 2, 0, 2, 2, 2, 2]


def test_identical_means_tokens_and_steps(lm: freedave.DiffusionLM) -> None:
    (problem,) = problems("addition", "test", 1, seed=3)
    output = decode(lm, problem, STATIC, SETTINGS)
    for part in ("sequences", "step_map"):
        other = dataclasses.replace(output, **{part: getattr(output, part).clone()})
        assert identical(other, output)
        getattr(other, part)[0, -1] += 1
        assert not identical(other, output)


def test_an_answer_ends_at_the_first_end_of_sequence(lm: freedave.DiffusionLM) -> None:
    problem = Problem("addition", "1+2=", "1+2+0:03 #03")
    output = decode(lm, problem, STATIC, SETTINGS)
    response = lm.tokenizer(problem.response)["input_ids"]
    output.sequences = torch.full_like(output.sequences, lm.eos_token_id).clone()
    new = output.sequences[0, -output.step_map.shape[1] :]
    new[: len(response)] = torch.tensor(response)
    new[len(response) + 1] = response[0]
    assert response_text(lm, output) == problem.response
    (stop,) = lm.tokenizer("#")["input_ids"]
    several = freedave.DiffusionLM(
        lm.model, lm.mask_token_id, block_length=4, eos_token_id=[lm.eos_token_id, stop], tokenizer=lm.tokenizer
    )
    assert response_text(several, output) == "1+2+0:03 "


def test_modes() -> None:
    drafted = ["nested K={}", "recycled K={}", "pooled K={}", "pooled K={}, ahead 1", "pipelined K={}"]
    names = ["static", "pooled auto", *(name.format(steps) for steps in (4, 8) for name in drafted)]
    assert [mode.name for mode in DemoSettings(draft_steps=(4, 8)).modes] == names
    assert Tally(2, 2, 2, 10, 30) + Tally(1, 0, 1, 5, 10) == Tally(3, 2, 3, 15, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problems_per_task": 0}, "at least 1 problem a task"),
        ({"draft_steps": (8, 1)}, r"draft_steps must be at least 2 \(1 is static decoding\), got 1"),
    ],
)
def test_settings_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings(**settings)  # type: ignore[arg-type]
