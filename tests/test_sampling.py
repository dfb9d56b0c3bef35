"""generate(temperature=..., seed=...): what static sampling with the same seed returns, in fewer forwards."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_batches import EXECUTORS, FAMILIES, decoder, padded
from test_decoding import DRAFTINGS
from tiny_models import MASK, golden_lm, prompt

import freedave
from freedave.decode.noise import sequence_key
from freedave.decode.settings import SequenceSettings, resolve_settings
from freedave.forward import prediction
from freedave.models.diffusion_lm import DiffusionLM

TRUNCATIONS = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05}]
BY_DRAFTING = pytest.mark.parametrize("drafting", DRAFTINGS)
BY_EXECUTOR = pytest.mark.parametrize("executor", EXECUTORS)


@BY_EXECUTOR
def test_example(executor: str) -> None:
    """Token for token and step for step what static sampling returns; another seed is another sample."""
    lm = golden_lm()
    options: dict[str, Any] = {"max_new_tokens": 32, "block_length": 8, "temperature": 0.7, "check_lossless": True}
    options |= {"executor": executor, "draft_steps": 8}
    one = freedave.generate(lm, prompt(), seed=1, **options)
    again = freedave.generate(lm, prompt(), seed=1, **options)
    other = freedave.generate(lm, prompt(), seed=2, **options)
    assert one.static is not None and one.num_forwards < one.static.num_forwards
    assert torch.equal(one.sequences, again.sequences) and torch.equal(one.step_map, again.step_map)
    assert not torch.equal(one.sequences, other.sequences)


@BY_EXECUTOR
@BY_DRAFTING
@pytest.mark.parametrize(("family", "cache"), FAMILIES)
def test_random_decodes(family: str, cache: str, drafting: str, executor: str) -> None:
    """All families and caches; orders, blocks, thresholds, batches, ends and seeds that are drawn. Both executors draw what
    static decoding by the planned one draws.
    """
    lm = golden_lm(family)
    for number in range(6):
        draw = random.Random(number)
        input_ids, attention_mask = padded([draw.choice([1, 4, 9]) for _ in range(draw.choice([1, 3]))], "left")
        new, draft_steps = draw.choice([7, 20, 33]), draw.choice([2, 3, 8])
        options: dict[str, Any] = {
            "block_length": draw.choice([1, 4, 8, 16]),
            "attention_mask": attention_mask,
            "cache": cache,
            "tokens_per_step": draw.choice([1, 1, 2]),
            "threshold": draw.choice([None, None, 0.2]),
            "order": draw.choice(["confidence", "left_to_right"]),
            "measure": draw.choice(["prob", "log_odds"]),
            "eos_token_id": [draw.randrange(MASK) for _ in range(draw.choice([0, 1]))],
            "temperature": draw.choice([0.1, 0.7, 1.0, 2.0]),
            "seed": draw.randrange(2**63),
            **draw.choice([{}, *TRUNCATIONS]),
        }
        how: dict[str, Any] = {"executor": executor, "drafting": drafting, "check_lossless": True}
        out = freedave.generate(lm, input_ids, new, draft_steps, **how, **options)
        assert (out.sequences != MASK).all()
        if executor == "graph":
            static = freedave.generate(lm, input_ids, new, 1, **options)
            assert torch.equal(out.sequences, static.sequences) and torch.equal(out.step_map, static.step_map)


def test_the_likeliest_of_one_token_is_greedy() -> None:
    """However hot it is; and where all tokens may be drawn, nothing changes."""
    lm = golden_lm(block_length=8)
    greedy = freedave.generate(lm, prompt(), 24)
    drawn = freedave.generate(lm, prompt(), 24, temperature=2.0, seed=4)
    assert not torch.equal(drawn.sequences, greedy.sequences)
    for one in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        # (Every confidence is 1 then, so positions are committed in another order unless that is given.)
        ours = freedave.generate(lm, prompt(), 24, temperature=2.0, seed=4, order="left_to_right", **one)
        theirs = freedave.generate(lm, prompt(), 24, order="left_to_right")
        assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.step_map, theirs.step_map)
    for everything in ({"top_k": 10_000}, {"top_p": 1.0}):
        again = freedave.generate(lm, prompt(), 24, temperature=2.0, seed=4, **everything)
        assert torch.equal(again.sequences, drawn.sequences) and torch.equal(again.step_map, drawn.step_map)


def test_a_seed_is_a_seed() -> None:
    """The first sequence of a batch draws as it does alone, whatever K, drafting, executor and other sequences; the others
    draw with keys of their own.
    """
    lm = golden_lm(block_length=8)
    row = prompt(6)
    alone = freedave.generate(lm, row, 24, 1, temperature=0.8, seed=5, drafting="nested")
    for drafting, executor, draft_steps in itertools.product(DRAFTINGS, EXECUTORS, (2, 8)):
        how: dict[str, Any] = {"drafting": drafting, "executor": executor}
        out = freedave.generate(lm, row.expand(3, -1), 24, draft_steps, temperature=0.8, seed=5, **how)
        assert torch.equal(out.sequences[0], alone.sequences[0])
        assert len({tuple(sequence) for sequence in out.sequences.tolist()}) == 3


@BY_EXECUTOR
def test_a_sequence_may_have_a_seed(executor: str) -> None:
    """Of `Decoder.add`: what is drawn does not depend on what was added before, nor on who had the slot."""
    lm = golden_lm()
    engine = decoder(lm, slots=2, temperature=0.8, seed=1, executor=executor)
    engine.add(prompt(4, 1)[0].tolist())
    for seed in (77, 78):
        sequence = engine.add(prompt(5)[0].tolist(), seed=seed)
        while engine.sequences:
            engine.launch()
            engine.poll()
        alone = freedave.generate(lm, prompt(5), 16, 4, temperature=0.8, seed=seed)
        assert sequence.generated(sequence.tokens) == alone.sequences[0, 5:].tolist()
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        engine.add([1], seed=-1)


@BY_EXECUTOR
@pytest.mark.parametrize("drafting", ["recycled", "pooled"])
@pytest.mark.parametrize(("family", "cache"), [("block_causal", "auto"), ("full", "none"), ("full", "dual")])
def test_each_sequence_has_its_temperature(family: str, cache: str, drafting: str, executor: str) -> None:
    """Beside others that have the settings' or draw nothing, whichever comes and goes."""
    lm = golden_lm(family)
    options = {"cache": cache, "drafting": drafting, "top_p": 0.95}
    engine = decoder(lm, slots=3, temperature=0.8, seed=1, executor=executor, **options)
    temperatures = [None, 0.0, 2.5, 0.3, 0.0, 1.0, None]
    sequences = []
    for index, temperature in enumerate(temperatures):
        while not engine.free_slots:
            engine.launch()
            engine.poll()
        own = SequenceSettings(temperature=temperature)
        sequences.append(engine.add(prompt(5 + index % 3, index)[0].tolist(), own, seed=index + 5))
    while engine.sequences:
        engine.launch()
        engine.poll()
    answers = set()
    for index, (sequence, temperature) in enumerate(zip(sequences, temperatures, strict=True)):
        start = prompt(5 + index % 3, index)
        own = 0.8 if temperature is None else temperature
        drawn = {"temperature": own, "seed": index + 5, "top_p": 0.95} if own else {}
        alone = freedave.generate(lm, start, 16, 1, cache=cache, **drawn).sequences[0, start.shape[1] :].tolist()
        assert sequence.generated(sequence.tokens) == alone, (index, temperature)
        answers.add(tuple(alone))
    assert len(answers) == len(temperatures)


def test_a_temperature_of_a_sequence_needs_a_decoder_that_draws() -> None:
    engine = decoder(golden_lm(), slots=2)
    engine.add(prompt(5)[0].tolist(), SequenceSettings(temperature=0.0))
    with pytest.raises(
        ValueError, match="the decoder draws no tokens; resolve its settings with a temperature above 0"
    ):
        engine.add(prompt(5)[0].tolist(), SequenceSettings(temperature=0.5))
    with pytest.raises(ValueError, match="temperature must be 0 or between 1e-30 and 1e30, got -1"):
        engine.add(prompt(5)[0].tolist(), SequenceSettings(temperature=-1.0))
    assert engine.free_slots == 1


def test_keys_of_sequences() -> None:
    """Of 64 bits, and different for every seed and sequence."""
    keys = {sequence_key(seed, index) for seed in (0, 1, 2, 2**32, 2**62, 2**63 - 1) for index in range(50)}
    assert len(keys) == 6 * 50 and all(-(2**63) <= key < 2**63 for key in keys)


def test_without_a_seed_torch_decides() -> None:
    lm = golden_lm()
    answers = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        answers.append(freedave.generate(lm, prompt(), 16, temperature=1.0).sequences.tolist())
    assert answers[0] == answers[1] != answers[2]


def test_slices_of_a_vocabulary_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits are never all there at once, each row still draws with its own noise."""
    lm = golden_lm()
    expected = freedave.generate(lm, prompt(), 32, temperature=0.8, seed=3)
    monkeypatch.setattr(prediction, "ROWS", 3)
    monkeypatch.setattr(prediction, "WHOLE_BYTES", 1)
    assert torch.equal(freedave.generate(lm, prompt(), 32, temperature=0.8, seed=3).sequences, expected.sequences)


class Bag(torch.nn.Module):
    """Three tokens and a mask; a position's logits are the sum of what its visible tokens say."""

    def __init__(self) -> None:
        super().__init__()
        says = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
        self.says = torch.nn.Parameter(says, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        return SimpleNamespace(logits=visible[:, 0].float() @ self.says[input_ids])


@pytest.mark.parametrize("top_k", [None, 2])
def test_left_to_right_is_ancestral_sampling(top_k: int | None) -> None:
    """Chi-square of the joint distribution of answers of three tokens, of the whole vocabulary or its likeliest two."""
    model, temperature, count = Bag(), 0.7, 3000
    lm = DiffusionLM(model, 3, attention="full", block_length=3)
    rows = torch.zeros(count, 1, dtype=torch.int64)
    out = freedave.generate(lm, rows, 3, 3, order="left_to_right", temperature=temperature, seed=4, top_k=top_k)
    answers = [tuple(answer) for answer in out.sequences[:, 1:].tolist()]
    statistic = 0.0
    for answer in itertools.product(range(3), repeat=3):
        chance = 1.0
        for known, token in enumerate(answer):
            state = torch.tensor([0, *answer[:known], *[3] * (3 - known)])
            logits = model.says[state].double().sum(0)[:3]
            if top_k is not None:
                logits[logits < logits.topk(top_k).values[-1]] = -math.inf
            chance *= float((logits / temperature).softmax(-1)[token])
        if chance == 0:
            assert answer not in answers
        else:
            statistic += (answers.count(answer) - count * chance) ** 2 / (count * chance)
    freedom = (top_k or 3) ** 3 - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or between 1e-30 and 1e30, got -1.0"),
        ({"temperature": True}, TypeError, "temperature must be a float, got bool"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, got 1.1"),
        ({"min_p": 0.0}, ValueError, "min_p must be above 0 and at most 1, got 0.0"),
        (
            {"temperature": 0.0, "top_k": 4, "min_p": 0.1},
            ValueError,
            "top_k, min_p: these say what is drawn from, but nothing is drawn; set a temperature above 0",
        ),
        ({"measure": "margin"}, ValueError, "a temperature needs measure='prob' or 'log_odds', got measure='margin'"),
    ],
    ids=str,
)
def test_argument_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        freedave.generate(golden_lm(), prompt(), 8, **{"temperature": 1.0, "seed": 1} | change)


def test_static_decoding_draws_the_same() -> None:
    settings = resolve_settings(golden_lm(), 4, 8, temperature=1.0, seed=1)
    assert (settings.temperature, settings.seed) == (1.0, 1)
    assert settings.static().seed == 1 and settings.static().temperature == 1.0
