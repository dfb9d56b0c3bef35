"""draft_steps="auto" on both executors: static decoding's tokens whatever is chosen; choices follow the cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_batches import FAMILIES, decoder, padded
from test_decoding import BLOCK_CAUSAL, FULL
from test_pooled_decoding import any_options
from tiny_models import golden_lm, prompt

import freedave
from freedave.decode import experience
from freedave.decode.acceptance import Acceptance, Chain
from freedave.decode.captured_steps import CapturedSteps
from freedave.decode.draft_choice import Choice, DraftChooser, Experience
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.options import DecodingOptions
from freedave.decode.outlook import Outlook
from freedave.decode.planned_executor import PlannedExecutor
from freedave.decode.settings import SequenceSettings
from freedave.decode.shapes import Shape
from freedave.demo.tasks import TASKS, problems
from freedave_kernels.contract import DRAFTINGS, POOLED_DRAFTINGS

EXECUTOR = pytest.mark.parametrize("executor", ["planned", "graph"])
DRAFTING = pytest.mark.parametrize("drafting", [*DRAFTINGS, *POOLED_DRAFTINGS])


class Machine:
    """A clock that goes on by what a machine would take for each forward."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self._seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now

    def compute(self, tokens: int) -> None:
        self.now += self._seconds(tokens)


def run_on(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> Machine:
    """Lets all models run on a machine whose forwards of n tokens take `seconds(n)`; what was learnt is forgotten."""
    machine = Machine(seconds)
    computed = freedave.DiffusionLM.packed_features

    def features(self: Any, forward: Any, rows: torch.Tensor) -> torch.Tensor:
        machine.compute(forward.input_ids.shape[1])
        return computed(self, forward, rows)

    monkeypatch.setattr(freedave.DiffusionLM, "packed_features", features)
    monkeypatch.setattr(PlannedExecutor, "clock", machine)
    monkeypatch.setattr(experience, "_experience", {})
    return machine


@pytest.mark.parametrize(
    ("seconds", "fewest", "most"),
    [
        pytest.param(lambda tokens: 1e-4 * tokens, 55, 64, id="every token costs the same"),
        pytest.param(lambda tokens: 1e-3, 4, 25, id="tokens cost nothing"),
    ],
)
def test_example(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], fewest: int, most: int) -> None:
    """Where tokens cost nothing many drafts are forwarded, and where drafts cost what they bring, next to none."""
    run_on(monkeypatch, seconds)
    lm = golden_lm(block_length=8)
    for seed in range(4):
        out = freedave.generate(lm, prompt(8, seed), 64, "auto", check_lossless=True)
    assert fewest <= out.num_forwards <= most
    assert sum(out.stats.drafts_chosen.values()) == out.num_forwards
    chosen = max(out.stats.drafts_chosen, key=lambda way: out.stats.drafts_chosen[way])
    assert out.stats.drafts_reason.startswith(f"mostly {chosen} (")


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Every choice is drawn at random."""
    draw = random.Random(0)

    def choose(self: DraftChooser, outlooks: list[Outlook], other_work: float = 0.0) -> Choice:
        counts = [draw.choice(self._levels), *(draw.choice([1, 2, 3, 5, 8, 16]) for _ in range(3))]
        self.chosen[counts[0], counts[1]] += 1
        return Choice(*counts)

    monkeypatch.setattr(DraftChooser, "choose", choose)
    monkeypatch.setattr(DraftChooser, "learn", lambda *_: None)
    monkeypatch.setattr(DraftChooser, "why", lambda _: "drawn")
    return draw


@EXECUTOR
@DRAFTING
@pytest.mark.parametrize("case", [*BLOCK_CAUSAL, *FULL])
def test_golden_decodes_whatever_is_chosen(
    anything: random.Random, case: dict[str, Any], drafting: str, executor: str
) -> None:
    cache = "auto" if case["family"] == "block_causal" else case["cache"]
    lm = golden_lm(case["family"], block_length=case["block_length"])
    for seed in range(2):
        anything.seed(seed)
        out = freedave.generate(
            lm,
            torch.tensor([case["prompt"]]),
            len(case["sequence"]) - len(case["prompt"]),
            "auto",
            case["block_length"],
            order=case["order"],
            drafting=drafting,
            cache=cache,
            executor=executor,
        )
        assert out.sequences[0].tolist() == case["sequence"]
        assert out.step_map[0].tolist() == case["step"]
        # Steps of a single slot, with a prompt or a refresh, have one draft anyway.
        own = sum(times for shape, times in out.stats.shapes.items() if "first" in shape)
        assert sum(out.stats.drafts_chosen.values()) == out.num_forwards - own


@EXECUTOR
@DRAFTING
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_random_decodes_whatever_is_chosen(
    anything: random.Random, family: str, cache: str, drafting: str, executor: str
) -> None:
    """Batches, ends, thresholds, several positions a step: 1,024 decodes with those of all parameters."""
    lm = golden_lm(family)
    for seed in range(32 if executor == "planned" else 8):
        draw = random.Random(seed)
        options = any_options(draw) | {"draft_steps": "auto", "executor": executor}
        input_ids, mask = padded([draw.choice([1, 4, 5, 12]) for _ in range(draw.choice([1, 3]))], "left")
        anything.seed(seed)
        freedave.generate(
            lm, input_ids, attention_mask=mask, drafting=drafting, cache=cache, check_lossless=True, **options
        )


@pytest.mark.parametrize(("family", "cache"), FAMILIES)
@pytest.mark.parametrize("block_length", [4, 8])
@pytest.mark.parametrize("drafting", ["nested", "recycled"])
def test_the_outlook_foretells_what_is_computed(
    monkeypatch: pytest.MonkeyPatch, anything: random.Random, family: str, cache: str, block_length: int, drafting: str
) -> None:
    """To the token, and how many drafts there are for the next forward, without planning it."""
    lm = golden_lm(family)
    engine = decoder(
        lm, slots=1, capacity=96, cache=cache, block_length=block_length, drafting=drafting, draft_steps="auto"
    )
    executor = engine._executor
    assert isinstance(executor, PlannedExecutor)
    executor._head_share = 0.0  # so that work is tokens
    sequence: Any = engine.add(prompt(9)[0].tolist(), SequenceSettings(max_new_tokens=40))
    foretold = []
    choose = DraftChooser.choose

    def spied(self: DraftChooser, outlooks: list[Outlook], other_work: float = 0.0) -> Choice:
        choice = choose(self, outlooks, other_work)
        foretold.append(
            (outlooks[0].work(choice.drafts, choice.lookahead, choice.shown) + other_work, outlooks[0], choice)
        )
        return choice

    monkeypatch.setattr(DraftChooser, "choose", spied)
    errors = []
    while engine.sequences:
        before = executor.positions_computed
        engine.launch()
        work, outlook, choice = foretold[-1]
        errors.append(abs(work - (executor.positions_computed - before)))
        accepted = engine.poll()[0].steps - 1
        if not sequence.finished and drafting == "nested":  # recycled ones go on through rejected drafts, too
            follow = min(
                outlook.follows(choice.lookahead, choice.shown)[min(accepted, outlook.drafts - 1)], choice.build
            )
            assert len(sequence.drafts) <= follow
    if cache in (
        "prefix",
        "dual",
    ):  # drafts that are complete in their block are left out, next blocks with "dual" added
        assert sum(errors) <= 0.25 * executor.positions_computed
    else:
        assert errors.count(0) >= 0.9 * len(errors)


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [
        (1, lambda tokens: 2e-3 + 4e-5 * tokens),  # two cores
        (1, lambda tokens: 6e-3 + 2e-5 * max(tokens - 160, 0)),  # a large model on a GPU
        (8, lambda tokens: 2e-3 + 4e-5 * tokens),  # drafts do not pay
    ],
    ids=["cores", "gpu", "cores, a batch"],
)
def test_the_default_is_near_the_best_fixed_setting(
    monkeypatch: pytest.MonkeyPatch, batch: int, seconds: Callable[[int], float]
) -> None:
    """Of the embedded model, once some answers have been decoded; and faster than 8 drafts and than static decoding."""
    machine = run_on(monkeypatch, seconds)
    lm = freedave.load_model("demo")
    texts = [problem.prompt for problem in problems("addition", "test", batch, 0)]
    prompts = lm.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")

    def took(**options: Any) -> float:
        began = machine.now
        freedave.generate(lm, **prompts, max_new_tokens=96, **options)
        return machine.now - began

    fixed = {steps: took(draft_steps=steps, lookahead_steps=1) for steps in (1, 2, 8, 16)[: 4 if batch == 1 else 2]}
    eight = took(draft_steps=8)
    for _ in range(3):
        chosen = took()
    assert chosen < 1.1 * min(fixed.values())
    assert chosen < eight and chosen < 1.03 * fixed[1]


def test_a_prompt_teaches_nothing_about_other_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = []
    monkeypatch.setattr(DraftChooser, "learn", lambda self, work, seconds, chains: learnt.append((work, seconds)))
    out = freedave.generate(golden_lm(), prompt(200), 16, "auto", prefill_chunk=64)
    without = [seconds is None for _, seconds in learnt]
    assert without == [True] + [False] * (len(learnt) - 1)
    assert len(learnt) < out.num_forwards  # forwards that only store


def test_what_is_learnt_stays_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another object around the same model, as transformers' `generate` makes one for each call, finds it."""
    run_on(monkeypatch, lambda tokens: 1e-3)
    outs = [freedave.generate(golden_lm(block_length=8), prompt(8, seed), 40, "auto") for seed in range(3)]
    (learnt,) = experience._experience.values()
    (progress,) = learnt.progress.values()
    assert progress.forwards == sum(out.num_forwards - 1 for out in outs)  # but those with the prompts


def test_the_pool_has_room_for_whatever_is_chosen() -> None:
    engine = decoder(golden_lm(block_length=8), slots=2, capacity=96, drafting="pooled", draft_steps="auto")
    executor = engine._executor
    assert isinstance(executor, PlannedExecutor) and executor._pool is not None
    assert executor._pool.num_states == 48


def test_static_decoding_is_what_one_pooled_draft_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "auto" can be as fast as static decoding, where that is fastest."""
    monkeypatch.setattr(DraftChooser, "choose", lambda *_: Choice(1, 1, 1, 1))
    for drafting in ("recycled", "pooled", "pipelined"):
        out = freedave.generate(
            golden_lm(block_length=8), prompt(8), 32, "auto", drafting=drafting, check_lossless=True
        )
        assert out.static is not None
        assert out.stats.positions_computed == out.static.stats.positions_computed


def test_a_lookahead_that_is_given_is_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(monkeypatch, lambda tokens: 1e-3)
    out = freedave.generate(golden_lm(), prompt(8), 40, "auto", lookahead_steps=2, drafting="recycled")
    assert {way.split()[-1] for way in out.stats.drafts_chosen} <= {"1", "2"}


def test_other_temperatures_learn_on_their_own() -> None:
    """How likely drafts are right depends on it; what forwards cost does not."""
    lm = golden_lm(block_length=8)
    learnt = lambda: experience._experience[lm.model]  # noqa: E731
    freedave.generate(lm, prompt(8), 24, "auto")
    kinds, curves = len(learnt().acceptance), set(learnt().costs._curves)
    freedave.generate(lm, prompt(8), 24, "auto", temperature=1.0, seed=1)
    assert len(learnt().acceptance) == kinds + 1 and set(learnt().costs._curves) == curves
    freedave.generate(lm, prompt(8), 24, "auto", temperature=1.03, seed=2)  # nearly the same
    assert len(learnt().acceptance) == kinds + 1
    freedave.generate(lm, prompt(8), 24, "auto", temperature=0.01, seed=2)  # but never that of no temperature
    assert len(learnt().acceptance) == kinds + 2
    freedave.generate(lm, prompt(8), 24, "auto", measure="margin")
    assert len(learnt().acceptance) == kinds + 3


def test_steps_of_fixed_shapes_follow_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the graph executor, by the same rule as on the planned one: static steps where tokens cost, else many drafts."""
    lm = freedave.load_model("demo")
    token_ids = lm.tokenizer("12+34=")["input_ids"]
    forwards = []
    for seconds in (lambda tokens: 1e-4 * tokens, lambda tokens: 1e-3):
        fixed_shapes_on(monkeypatch, seconds)
        for _ in range(3):
            out = freedave.generate(lm, torch.tensor([token_ids]), 64, "auto", 4, executor="graph", check_lossless=True)
        forwards.append(out.num_forwards)
        assert sum(out.stats.drafts_chosen.values()) == out.num_forwards - 1  # but the prompt's
        chosen = max(out.stats.drafts_chosen, key=lambda way: out.stats.drafts_chosen[way])
        assert out.stats.drafts_reason.startswith("mostly ") and chosen in out.stats.drafts_reason
    assert forwards[0] >= 3 * forwards[1]


def fixed_shapes_on(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> Machine:
    """As `run_on`, for the steps of the graph executor."""
    machine = Machine(seconds)
    ran = CapturedSteps._run

    def run(self: CapturedSteps, shape: Shape, step: Any, compiled: bool) -> torch.Tensor:
        machine.compute(shape.tokens)
        return ran(self, shape, step, compiled)

    monkeypatch.setattr(CapturedSteps, "_run", run)
    monkeypatch.setattr(GraphExecutor, "clock", machine)
    monkeypatch.setattr(experience, "_experience", {})
    return machine


def test_a_shape_is_made_only_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if steps were captured: what a shape takes until it is ready is known from the last one that was made."""
    monkeypatch.setattr(CapturedSteps, "ready", lambda self, shape: shape in self.steps and self.steps[shape].runs > 1)
    made = []
    for price in (1e9, 0.0):
        fixed_shapes_on(monkeypatch, lambda tokens: 1e-5 * tokens)
        monkeypatch.setattr(
            CapturedSteps, "new_seconds", property(lambda _, price=price: price, lambda *_: None), False
        )
        lm = golden_lm(block_length=8)
        engine = decoder(lm, slots=1, capacity=96, draft_steps="auto", executor="graph")
        for seed in range(2):
            engine.add(prompt(8, seed)[0].tolist(), SequenceSettings(max_new_tokens=60))
            while engine.sequences:
                engine.launch()
                engine.poll()
        made.append({shape.drafts for shape in engine._executor.steps.ran if not shape.one})
    dear, free = made
    assert dear == {8}  # with the first, of which nothing was known
    assert 1 in free


def test_a_shape_is_made_once_it_would_have_saved_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no answer pays for is made after several, by an executor that stays."""
    monkeypatch.setattr(CapturedSteps, "ready", lambda self, shape: shape in self.steps and self.steps[shape].runs > 1)
    monkeypatch.setattr(CapturedSteps, "new_seconds", property(lambda _: 0.2, lambda *_: None), False)
    fixed_shapes_on(monkeypatch, lambda tokens: 1e-5 * tokens)
    engine = decoder(golden_lm(block_length=8), slots=1, capacity=96, draft_steps="auto", executor="graph")
    made: list[set[int]] = []
    for seed in range(12):
        engine.add(prompt(8, seed)[0].tolist(), SequenceSettings(max_new_tokens=60))
        while engine.sequences:
            engine.launch()
            engine.poll()
        made.append({shape.drafts for shape in engine._executor.steps.ran if not shape.one})
    assert made[0] == {8} and len(made[-1]) > 1


def test_more_drafts_are_tried_where_nobody_knows_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's forward takes as long with more tokens, but nothing tells before one was run."""
    monkeypatch.setattr(CapturedSteps, "ready", lambda self, shape: shape in self.steps and self.steps[shape].runs > 1)
    monkeypatch.setattr(CapturedSteps, "new_seconds", property(lambda _: 0.02, lambda *_: None), False)
    fixed_shapes_on(monkeypatch, lambda tokens: 1e-3)
    lm = freedave.load_model("demo")
    prompts = [lm.tokenizer(problem.prompt)["input_ids"] for problem in problems("sorting", "test", 12, 0)]
    forwards = {}
    for drafts in (8, 16, "auto"):
        engine = decoder(lm, slots=1, capacity=160, draft_steps=drafts, block_length=16, executor="graph")
        counts = []
        for token_ids in prompts:
            engine.add(token_ids, SequenceSettings(max_new_tokens=64))
            before = engine.forwards
            while engine.sequences:
                engine.launch()
                engine.poll()
            counts.append(engine.forwards - before)
        forwards[drafts] = sum(counts[7:])  # the first answers pay for trials
    assert forwards["auto"] == forwards[16] < forwards[8]


def test_a_step_that_was_fetched_late_teaches_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = fixed_shapes_on(monkeypatch, lambda tokens: 1e-3)
    learnt = []
    monkeypatch.setattr(DraftChooser, "learn", lambda self, work, seconds, *_: learnt.append(seconds))
    engine = decoder(golden_lm(), slots=1, capacity=64, draft_steps="auto", executor="graph")
    engine.add(prompt(8)[0].tolist(), SequenceSettings(max_new_tokens=30))
    for step in range(6):
        engine.launch()
        machine.now += 1.0 if step == 3 else 0.0
        engine.poll()
    assert [seconds is None for seconds in learnt] == [False, False, True, False]  # the prompt's step had no choice
    assert [seconds for seconds in learnt if seconds] == pytest.approx([1e-3] * 3)


def test_a_step_is_learnt_from_while_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for that: it comes after a launch; after the last one nothing runs, so that it comes at once."""
    order: list[str] = []
    fixed_shapes_on(monkeypatch, lambda tokens: 1e-3)
    ran, learn = CapturedSteps._run, DraftChooser.learn
    monkeypatch.setattr(CapturedSteps, "_run", lambda *args: (order.append("run"), ran(*args))[1])
    monkeypatch.setattr(DraftChooser, "learn", lambda *args: (order.append("learn"), learn(*args))[1])
    engine = decoder(golden_lm(), slots=2, capacity=64, draft_steps="auto", executor="graph")
    for seed in range(2):
        engine.add(prompt(8)[0].tolist(), SequenceSettings(max_new_tokens=16 + 8 * seed))
    steps = 0
    while engine.sequences:
        engine.launch()
        engine.poll()
        steps += 1
    prompts, chosen = ["run", "run"], steps - 1
    assert order == [*prompts, "run", *["run", "learn"] * (chosen - 1), "learn"] and chosen > 3


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="draft_steps must be 'auto' or an integer of at least 1, got 'many'"):
        DecodingOptions(draft_steps="many")  # type: ignore[arg-type]


def test_nothing_learnt_is_shared_by_models() -> None:
    one, other = Experience(), Experience()
    DraftChooser(one).learn(10.0, 1e-3, [Chain(4, 2, 2)])
    assert one.acceptance[None].reached() != Acceptance().reached() and not other.acceptance


def test_pooled_drafts_are_as_many_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trained model, whose drafts that a chain did not reach serve later on: near the best number, for every task."""
    machine = run_on(monkeypatch, lambda tokens: 1.2e-3 + 1.88e-5 * tokens)  # as on two cores
    lm = freedave.load_model("demo")
    prompts = []
    for task in TASKS:
        ids = [lm.tokenizer(problem.prompt)["input_ids"] for problem in problems(task, "test", 60, 0)]
        prompts.append(torch.tensor([each for each in ids if len(each) == len(ids[0])][:4]))

    def seconds(draft_steps: Any, **options: Any) -> float:
        began = machine.now
        for each in prompts:
            freedave.generate(lm, each, 96, draft_steps, 16, **options)
        return machine.now - began

    best = min(seconds(1), seconds(2, lookahead_steps=1), seconds(4, lookahead_steps=1), seconds(8, lookahead_steps=1))
    found = [seconds("auto") for _ in range(3)]
    assert best / found[0] > 0.9
    assert 2 * best / (found[1] + found[2]) > 0.95
