"""Steps of the graph executor that are captured and replayed, by a recorder that stands in for CUDA's graphs on a CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from graph_recorder import use_recorded_graphs
from test_graph_executor import FAMILIES, LENGTHS, expect_static, ids, settings_for
from test_graph_steps import executor_of
from tiny_models import golden_lm

from freedave.decode.decoder import Decoder
from freedave.decode.settings import SequenceSettings


def captured(lm, slots: int, draft_steps: int | str = 4, **options) -> Decoder:
    engine = Decoder(lm, settings_for(lm, draft_steps, **options), slots=slots, capacity=40)
    executor_of(engine).steps.capture = True
    return engine


def finish(engine: Decoder) -> None:
    while engine.sequences:
        engine.launch()
        engine.poll()


@pytest.mark.parametrize(
    ("draft_steps", "drafting"), [(1, "recycled"), (4, "recycled"), (4, "pooled"), (3, "pipelined"), ("auto", "pooled")]
)
@FAMILIES
def test_example(family, cache, draft_steps, drafting, monkeypatch):
    """A shape's first step runs as it is, the second is captured, all further ones are replays; three slots, used again."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm(family, block_length=4)
    engine = captured(lm, 3, draft_steps, cache=cache, drafting=drafting)
    waiting, sequences = [ids(length, seed) for seed, length in enumerate(LENGTHS)], []
    starts = waiting.copy()
    calls = []
    hook = lm.model.model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        while waiting or engine.sequences:
            while waiting and engine.free_slots:
                sequences.append(engine.add(waiting.pop(0)))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                engine.launch()
            engine.poll()
    finally:
        hook.remove()
    for sequence, start in zip(sequences, starts, strict=True):
        expect_static(lm, sequence, start, cache=cache)
    runs = executor_of(engine).shapes.values()
    assert sorted(graph.replays for graph in graphs) == sorted(count - 1 for count in runs if count > 1)
    assert sum(graph.replays for graph in graphs) > 5
    assert len(calls) <= 2 * len(runs)  # the model itself is called for no replay


@FAMILIES
def test_a_replay_draws_with_its_own_sequences_key(family, cache, monkeypatch):
    """Graphs hold where keys lie, not which they are: a slot's next sequence draws as it does alone."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm(family, block_length=4)
    engine = captured(lm, 2, cache=cache, temperature=0.8, seed=0)
    start, answers = ids(6), []
    for seed in (1, 2, 1):
        sequences = [engine.add(start, seed=seed), engine.add(ids(9, 1), seed=3)]
        finish(engine)
        drawn = {"cache": cache, "temperature": 0.8}
        expect_static(lm, sequences[0], start, seed=seed, **drawn)
        expect_static(lm, sequences[1], ids(9, 1), seed=3, **drawn)
        answers.append(sequences[0].tokens)
    assert answers[0] == answers[2] != answers[1]
    assert sum(graph.replays for graph in graphs) > 5


@FAMILIES
def test_a_replay_draws_with_its_own_sequences_temperature(family, cache, monkeypatch):
    """Which changes between replays, where a slot is used again; with 0 nothing is drawn."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm(family, block_length=4)
    engine = captured(lm, 2, cache=cache, temperature=0.8, seed=0)
    start, answers = ids(6), []
    for temperature in (3.0, 0.0, 0.8):
        own = SequenceSettings(temperature=temperature)
        sequences = [engine.add(start, own, seed=5), engine.add(ids(9, 1), seed=3)]
        finish(engine)
        drawn = {"temperature": temperature, "seed": 5} if temperature else {}
        expect_static(lm, sequences[0], start, cache=cache, **drawn)
        expect_static(lm, sequences[1], ids(9, 1), cache=cache, temperature=0.8, seed=3)
        answers.append(tuple(sequences[0].tokens))
    assert len(set(answers)) == 3
    assert sum(graph.replays for graph in graphs) > 5


@pytest.mark.parametrize("drafting", ["recycled", "pooled"])
@FAMILIES
def test_a_replay_goes_by_its_own_sequences_threshold_and_end(family, cache, drafting, monkeypatch):
    """Which change between replays, where a slot is used again."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm(family, block_length=4)
    engine = captured(lm, 2, cache=cache, drafting=drafting)
    own = [{"threshold": 2.0}, {"threshold": 0.02}, {"threshold": 0.05, "eos_token_id": [5]}, {"eos_token_id": [7]}]
    waiting, sequences = list(enumerate(own)), []
    while waiting or engine.sequences:
        while waiting and engine.free_slots:
            seed, options = waiting.pop(0)
            sequences.append(engine.add(ids(6, seed), SequenceSettings(**options)))
        engine.launch()
        engine.poll()
    for seed, (sequence, options) in enumerate(zip(sequences, own, strict=True)):
        never = options.get("threshold", 2.0) > 1
        expect_static(
            lm, sequence, ids(6, seed), cache=cache, **options | {"threshold": None if never else options["threshold"]}
        )
    assert sum(graph.replays for graph in graphs) > 5


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_blocks_of_several_sequences_begin_in_one_step(cache, monkeypatch):
    """They replay one graph, one after the other, whose record is read after the last of them: each has its own."""
    use_recorded_graphs(monkeypatch)
    lm = golden_lm("full", block_length=4)
    engine = captured(lm, 3, cache=cache)
    starts = [ids(6, seed) for seed in range(3)]
    sequences = [engine.add(start) for start in starts]
    engine.launch()
    launched = executor_of(engine)._launched
    assert len({each.record.data_ptr() for each in launched}) == len(launched) == 3
    engine.poll()
    finish(engine)
    for sequence, start in zip(sequences, starts, strict=True):
        expect_static(lm, sequence, start, cache=cache)


def test_a_model_that_reads_back_runs_launch_by_launch(monkeypatch):
    """It cannot be captured; that is said once, and nothing is lost of the step that was to be."""
    graphs = use_recorded_graphs(monkeypatch)
    lm = golden_lm(block_length=4)
    engine = captured(lm, 2)
    starts = [ids(6), ids(9, 1)]
    sequences = [engine.add(start) for start in starts]

    def reads(*_) -> None:
        assert bool(torch.ones(1).sum() == 1)

    hook = lm.model.model.register_forward_pre_hook(reads)
    try:
        with pytest.warns(UserWarning, match="cannot be captured, so it runs launch by launch") as said:
            finish(engine)
    finally:
        hook.remove()
    assert len(said) == 1 and not any(graph.replays for graph in graphs)
    for sequence, start in zip(sequences, starts, strict=True):
        expect_static(lm, sequence, start)
