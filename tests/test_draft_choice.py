"""How many drafts: on simulated machines and models, close to the best fixed choice and never slower than static decoding."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter

import pytest
from draft_machines import FIXED, Fixed, Machine, Model, Noise, Run, simulate

from freedave.decode.acceptance import Acceptance, Chain
from freedave.decode.draft_choice import DraftChooser, Experience
from freedave.decode.forward_cost import CostModel
from freedave.decode.outlook import Outlook, outlook

MACHINES: dict[str, Machine] = {
    "flat to 256, then linear": lambda work: 6e-3 * max(1.0, work / 256),
    "linear": lambda work: 1e-4 * work,
    "a fixed part, then linear": lambda work: 2e-3 + 4e-5 * work,
    "steps": lambda work: 2e-3 + 1e-3 * math.ceil(work / 64),
}
MODELS: dict[str, Model] = {
    "none": lambda draft, tokens: 0.0,
    "half": lambda draft, tokens: 0.5,
    "four of five": lambda draft, tokens: 0.8,
    "nearly all": lambda draft, tokens: 0.95,
    "all": lambda draft, tokens: 1.0,
    "changing": lambda draft, tokens: 0.0 if tokens // 400 % 2 else 0.95,
}
NOISES: dict[str, Noise] = {
    "quiet": lambda forward, draw: 1.0,
    "jitter": lambda forward, draw: draw.lognormvariate(0, 0.08),
    "interrupted": lambda forward, draw: (
        draw.lognormvariate(0, 0.1) * (draw.uniform(2, 6) if draw.random() < 0.15 else 1)
    ),
    "doubled at times": lambda forward, draw: draw.lognormvariate(0, 0.05) * (2 if forward // 60 % 3 == 1 else 1),
}
TOKENS, SEEDS = 1600, 3


def speed(run: Run) -> float:
    return run.speed(100, TOKENS)


@functools.cache
def best_fixed(machine: str, model: str, block: int, batch: int) -> tuple[float, float]:
    """Tokens a second of the best fixed choice, and of static decoding."""
    speeds = {
        way: sum(
            speed(
                simulate(
                    Fixed(*way), MACHINES[machine], MODELS[model], tokens=TOKENS, block=block, batch=batch, seed=seed
                )
            )
            for seed in range(SEEDS)
        )
        / SEEDS
        for way in FIXED
    }
    return max(speeds.values()), speeds[1, 1]


def test_example() -> None:
    """A machine that takes no longer for 256 tokens than for one, and a model whose drafts are mostly right."""
    chooser = DraftChooser(Experience())
    run = simulate(chooser, MACHINES["flat to 256, then linear"], MODELS["four of five"], tokens=400)
    choice = run.choices[-1]
    assert choice.drafts >= 8
    assert chooser.why().startswith("mostly ")
    static = simulate(Fixed(1, 1), MACHINES["flat to 256, then linear"], MODELS["four of five"], tokens=400)
    assert run.seconds[-1] < static.seconds[-1] / 3


@functools.cache
def ratios(machine: str, model: str, noise: str, block: int) -> tuple[float, float]:
    """Tokens a second against the best fixed choice and static decoding, after the first hundred tokens."""
    best, static = best_fixed(machine, model, block, 1)
    speeds = [
        speed(
            simulate(
                DraftChooser(Experience()),
                MACHINES[machine],
                MODELS[model],
                tokens=TOKENS,
                block=block,
                noise=NOISES[noise],
                seed=seed,
            )
        )
        for seed in range(SEEDS)
    ]
    return sum(speeds) / SEEDS / best, sum(speeds) / SEEDS / static


BLOCKS = [4, 16]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_never_far_from_the_best_fixed_choice(machine: str, model: str, noise: str, block: int) -> None:
    """Nor below static decoding. Where one of seven forwards is interrupted for longer than it takes, what forwards cost is
    known less well."""
    best, static = ratios(machine, model, noise, block)
    assert best >= (0.9 if noise == "interrupted" else 0.97)
    assert static >= (0.94 if noise == "interrupted" else 0.97)


def test_regret() -> None:
    """On average there is none: a choice for each forward makes up for what finding it costs."""
    for machine in MACHINES:
        found = [ratios(machine, model, noise, block)[0] for model in MODELS for noise in NOISES for block in BLOCKS]
        assert sum(found) / len(found) >= 0.99


def test_a_slow_moment_is_the_machines() -> None:
    """Neighbours that double all times for a while move no curve, and one slow forward neither."""
    costs = CostModel()
    curve = costs.curve("decode", 1)
    draw = random.Random(0)
    for n in range(200):
        work = draw.choice([16.0, 32.0, 64.0, 128.0])
        slow = 2.0 if 100 <= n < 150 or n == 60 else 1.0
        costs.learn(curve, work, slow * (2e-3 + 4e-5 * work))
        if n >= 40:
            assert curve.seconds(128) / curve.seconds(16) == pytest.approx(7.12 / 2.64, rel=0.12)
        if n == 149:
            assert costs.drift == pytest.approx(2, rel=0.25)
    assert costs.drift == pytest.approx(1, rel=0.25)


def test_a_curve_goes_on_as_a_line_and_never_falls() -> None:
    costs = CostModel()
    curve = costs.curve("decode", 1)
    assert curve.seconds(10) < curve.seconds(1000)  # nothing is known
    costs.learn(curve, 100, 5e-3)
    assert curve.seconds(100) == pytest.approx(5e-3)
    assert 2.4e-3 < curve.seconds(1) < 5e-3 < curve.seconds(200) < 1e-2
    assert curve.hopeful_seconds(300) == pytest.approx(5e-3)  # as on a GPU
    assert curve.seconds(50) * 0.5 < curve.hopeful_seconds(50) < curve.seconds(50) * 0.7
    for _ in range(30):
        costs.learn(curve, 100, 5e-3)
        costs.learn(curve, 400, 4e-3)
    assert curve.seconds(100) <= curve.seconds(250) <= curve.seconds(400) <= curve.seconds(4000)


def test_another_number_of_sequences_borrows_the_form() -> None:
    costs = CostModel()
    one = costs.curve("decode", 1)
    for _ in range(20):
        costs.learn(one, 16, 2e-3)
        costs.learn(one, 256, 8e-3)
    four = costs.curve("decode", 4)
    assert four.seconds(256) == one.seconds(256)
    for _ in range(5):
        costs.learn(four, 64, 2 * one.seconds(64))
    assert four.seconds(256) > 1.4 * one.seconds(256)
    assert costs.curve("decode", 5) is four and costs.curve("prefix", 1) is not one


def test_acceptance_follows_what_was_seen() -> None:
    acceptance = Acceptance()
    before = acceptance.reached()
    assert before[0] == 1 and before[1] == pytest.approx(0.7)
    for _ in range(100):
        acceptance.learn([Chain(8, 3, 3)])
    reached = acceptance.reached()
    assert reached[2] > 0.95 and reached[3] < 0.05
    assert acceptance.reached(1.0)[3] > reached[3]
    for _ in range(100):
        acceptance.learn([Chain(8, 8, 8)])
    assert acceptance.reached()[7] > 0.85
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.learn([Chain(1, 1, 1)])  # static decoding says nothing
    assert acceptance.reached() == before


def test_drafts_that_serve_later_are_worth_that() -> None:
    """Where drafts are pooled: of 8 drafts 4 are right at once, and half of the others in the next forwards."""
    acceptance = Acceptance()
    reached = acceptance.reached()
    assert acceptance.useful(reached) == pytest.approx(reached)  # nothing is known of it
    for _ in range(100):
        acceptance.learn([Chain(8, 4, 6)])
    useful = acceptance.useful(acceptance.reached())
    assert sum(useful[:8]) == pytest.approx(6, abs=0.1)  # as many as the static steps of a forward
    # The more drafts there are, the more often a later chain goes through one of them.
    assert useful[4] < useful[5] < useful[7] < useful[15] < 0.9


@pytest.mark.parametrize(("later", "fewest", "most"), [(0.0, 2, 5), (0.9, 12, 16)])
def test_pooled_drafts_are_as_many_as_serve_at_any_time(later: float, fewest: int, most: int) -> None:
    """A chain breaks at its fifth draft. What lies behind is worth its time if it spares a later forward's."""
    chooser, one = DraftChooser(Experience(), lookaheads=(1,)), outlook(16, 4, 200, 4, 1, 0, None, 0.0, 1)
    for _ in range(200):
        choice = chooser.choose([one])
        work, right = chooser.expected_work, min(choice.drafts, 4)
        steps = right + round(later * (choice.drafts - right))
        chooser.learn(work, 2e-3 + 4e-5 * work, [Chain(choice.drafts, right, steps)])
    chosen = Counter(chooser.choose([one]).drafts for _ in range(50)).most_common(1)[0][0]
    assert fewest <= chosen <= most


def test_choosing_looks_at_few_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing must cost little of a forward: what was decided holds for all forwards alike until a new plan is made."""
    looks: list[Outlook] = []
    gains = Outlook.gains
    monkeypatch.setattr(Outlook, "gains", lambda self, *args: (looks.append(self), gains(self, *args))[1])
    chooser, draw = DraftChooser(Experience(), lookaheads=(1,)), random.Random(0)
    forwards = 2000
    for _ in range(forwards):
        one = outlook(draw.choice([4, 9, 16]), draw.randint(1, 4), 200, 4, 1, 0, None, 0.0, 1)
        choice = chooser.choose([one])
        work, right = chooser.expected_work, draw.randint(1, choice.drafts)
        chooser.learn(work, 2e-3 + 4e-5 * work, [Chain(choice.drafts, right, right)])
    assert len(looks) <= 1.5 * forwards


def test_static_decoding_of_pooled_drafts_shows_nothing() -> None:
    """What the first draft shows of later blocks is work that static decoding does not have."""
    one = outlook(16, 4, 200, 4, 1, 0, None, 0.0, 1)
    assert one.work(1, 1, 1) == 4 and one.work(1, 1, 8) == 16
    assert one.work(8, 1, 8) == one.work(8, 1, 1) + 12
    chooser = DraftChooser(Experience(), lookaheads=(1,))
    for _ in range(300):
        choice = chooser.choose([one])
        chooser.learn(chooser.expected_work, 1e-4 * chooser.expected_work, [Chain(choice.drafts, 1, 1)])
    assert Counter(chooser.choose([one]) for _ in range(50)).most_common(1)[0][0][::3] == (1, 1)


def test_what_was_usual_comes_back_where_nothing_was_seen_of_late() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.learn([Chain(8, 1, 1)])
    for _ in range(400):
        acceptance.learn([Chain(1, 1, 1)])
    assert acceptance.reached()[1] < 0.05


def test_work_of_drafts_in_blocks() -> None:
    """Three masks in a block of four, drafts of one step: the fourth fills the block, and needs the next one."""
    one = outlook(6, 3, 100, 4, 1, 4, None, 0.0)
    assert [one.work(drafts, 1, 1) for drafts in (1, 2, 3, 4, 5, 6, 9)] == [8, 12, 16, 24, 28, 32, 32]
    assert one.work(1, 8, 1) == 4 + 12  # a complete block, and as far as eight steps go
    assert one.follows(1, 1) == [3, 2, 1, 4, 3, 2]
    assert one.follows(8, 1)[0] == 11
    assert outlook(3, 2, 0, 4, 2, 50, 10, 0.0).work(2, 1, 1) == 60
    assert (
        outlook(1, 2, 0, 4, 1, 0, None, 0.5).work(1, 1, 1) == 0.5 * 4 + 0.5 * 2
    )  # half of the work is the projection's
    assert outlook(6, 3, 100, 4, 1, 4, None, 0.0) is one


def test_a_choice_does_not_flap() -> None:
    """With neighbours that double the times now and then, the number of drafts stays about what it is without."""
    machine, model = MACHINES["a fixed part, then linear"], MODELS["four of five"]
    drafts = {
        name: Counter(
            choice.drafts
            for choice in simulate(DraftChooser(Experience()), machine, model, tokens=TOKENS, noise=noise).choices[50:]
        )
        for name, noise in NOISES.items()
    }
    for counts in drafts.values():
        most = sum(times for count, times in counts.items() if 3 <= count <= 6)
        assert most >= 0.6 * counts.total()


def test_static_decoding_is_kept_where_it_is_fastest() -> None:
    """With next to no trials in vain: drafts cost what they may bring, and are never right."""
    chooser = DraftChooser(Experience())
    run = simulate(chooser, MACHINES["linear"], MODELS["none"], tokens=1000)
    assert sum(choice.drafts > 1 for choice in run.choices[100:]) <= 20
