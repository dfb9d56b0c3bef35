"""What one decode compiled and captured serves the next one of the same shapes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import MASK, golden_lm, golden_model, prompt

import freedave
import freedave.decode.output
from freedave.decode import idle_executors
from freedave.decode.decoder import Decoder
from freedave.decode.settings import resolve_settings


def own_lm() -> freedave.DiffusionLM:
    """Not shared with other tests."""
    return freedave.DiffusionLM(copy.deepcopy(golden_model("block_causal")), MASK, block_length=4)


def decode(lm, length: int = 6, new: int = 16, seed: int = 0, **options) -> freedave.DecodeOutput:
    options = {"draft_steps": 4, "executor": "graph"} | options
    return freedave.generate(lm, prompt(length, seed), new, **options)


def test_example():
    lm = own_lm()
    first = decode(lm)
    executor = lm.idle_executor
    second = decode(lm)
    assert lm.idle_executor is executor is not None
    assert torch.equal(first.sequences, second.sequences) and torch.equal(first.step_map, second.step_map)
    assert (
        first.stats.shapes == second.stats.shapes and first.stats.positions_computed == second.stats.positions_computed
    )


@pytest.mark.parametrize(
    "options",
    [
        {"length": 9},
        {"new": 12},
        {"seed": 1},
        {"eos_token_id": [5]},
        {"stop_sequences": [[3]]},
        {"prefill_chunk": 4},
        {"threshold": 0.5},
        {"threshold": 0.5, "rule": "strict"},
    ],
)
def test_other_prompts_and_ends_find_it(options):
    """A longer decode before must leave no trace in a shorter one."""
    lm = own_lm()
    decode(lm, length=12, new=20, seed=3)
    executor = lm.idle_executor
    found = decode(lm, **options)
    assert lm.idle_executor is executor
    static = decode(golden_lm(), **(options | {"draft_steps": 1, "executor": "planned"}))
    assert torch.equal(found.sequences, static.sequences) and torch.equal(found.step_map, static.step_map)


@pytest.mark.parametrize(
    "options",
    [
        {"draft_steps": 3},
        {"cache": "none"},
        {"order": "left_to_right"},
        {"measure": "margin"},
        {"threshold": 0.5, "rule": "factor"},
        {"temperature": 1.0},
        {"new": 512 - 6},
    ],
)
def test_other_steps_do_not(options):
    lm = own_lm()
    decode(lm)
    executor = lm.idle_executor
    if options.get("new"):
        assert not executor.serves(resolve_settings(lm, 6, 16, draft_steps=4, executor="graph"), 1, 512)
        return
    torch.manual_seed(0)  # where tokens are drawn
    found = decode(lm, **options)
    assert lm.idle_executor is not executor
    torch.manual_seed(0)
    expected = decode(lm, **options, executor="planned")
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.step_map, expected.step_map)


@pytest.mark.parametrize("drafting", ["pooled", "pipelined"])
def test_a_pool_is_empty_for_the_next_decode(drafting):
    """What one prompt has told of its states is wrong for another."""
    lm = own_lm()
    alone = decode(own_lm(), seed=1, drafting=drafting)
    decode(lm, seed=0, drafting=drafting)
    executor = lm.idle_executor
    again = decode(lm, seed=1, drafting=drafting)
    assert lm.idle_executor is executor and executor.state.pool is not None
    assert torch.equal(again.sequences, alone.sequences) and torch.equal(again.forward_map, alone.forward_map)


def test_a_step_truncates_as_it_was_asked_to():
    lm = own_lm()
    decode(lm, temperature=1.0, top_k=2)
    executor = lm.idle_executor
    torch.manual_seed(0)
    found = decode(lm, temperature=1.0, top_k=9)
    assert lm.idle_executor is not executor
    torch.manual_seed(0)
    expected = decode(lm, temperature=1.0, top_k=9, executor="planned")
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.step_map, expected.step_map)


def test_static_decoding_in_the_same_shapes_uses_the_same_steps():
    lm = own_lm()
    out = decode(lm, check_lossless=True)
    assert out.static is not None and out.static.stats.shapes.keys() == out.stats.shapes.keys()
    assert out.static.num_forwards > out.num_forwards + 3
    assert decode(lm).num_forwards == out.num_forwards  # all drafts count again


def test_two_decoders_at_a_time_have_one_each():
    lm = own_lm()
    settings = resolve_settings(lm, 6, 8, draft_steps=4, executor="graph")
    one, two = (Decoder(lm, settings, slots=1, capacity=24) for _ in range(2))
    sequences = [decoder.add(prompt(6, seed)[0].tolist()) for seed, decoder in enumerate((one, two))]
    for decoder in (one, two):
        while decoder.sequences:
            decoder.launch()
            decoder.poll()
    for seed, sequence in enumerate(sequences):
        static = freedave.generate(lm, prompt(6, seed), 8, draft_steps=1)
        assert sequence.generated(sequence.tokens) == static.sequences[0, 6:].tolist()


def test_closing():
    lm = own_lm()
    decoder = Decoder(lm, resolve_settings(lm, 6, 8, draft_steps=4, executor="graph"), slots=1, capacity=24)
    sequence = decoder.add([1, 2, 3])
    with pytest.raises(RuntimeError, match="drop them"):
        decoder.close()
    decoder.drop(sequence)
    decoder.close()
    with pytest.raises(RuntimeError, match="every slot is taken"):
        decoder.add([1, 2, 3])


def test_a_model_that_was_converted_finds_nothing():
    lm = own_lm()
    decode(lm)
    executor = lm.idle_executor
    lm.model.bfloat16()
    decode(lm)
    assert lm.idle_executor is not executor


def test_it_goes_with_its_model_or_when_told():
    lm = own_lm()
    decode(lm)
    executor = weakref.ref(lm.idle_executor)
    idle_executors.forget(lm)
    gc.collect()
    assert executor() is None
    decode(lm)
    executor = weakref.ref(lm.idle_executor)
    del lm
    gc.collect()
    assert executor() is None


def test_a_new_shape_is_remarked_once(caplog):
    lm = own_lm()
    with caplog.at_level("INFO", logger="freedave"):
        decode(lm, compile=True, new=8)
        remarks = [record.getMessage() for record in caplog.records]
        decode(lm, compile=True, new=8)
    assert remarks == ["a new shape, which takes a moment: step: 1 x 4 drafts x 12 tokens, window 12"]
    assert len(caplog.records) == len(remarks)


def test_differences_from_static_decoding_in_its_own_shapes():
    out = decode(own_lm(), measure_own_static=True)
    assert out.stats.own_static == freedave.decode.output.Differences(tokens=0, steps=0, positions=16)
