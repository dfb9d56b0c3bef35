"""transformers' `model.generate(..., custom_generate=freedave.custom_generate)`, against `freedave.generate`."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest
import torch
from tiny_models import MASK, experts_lm, golden_lm, golden_model, prompt
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import freedave
from freedave.models.location import DEMO_CHECKPOINT

BLOCK_CAUSAL = {"mask_token_id": MASK, "attention": "block_causal", "block_length": 4}
FAMILIES = {
    "block_causal": BLOCK_CAUSAL,
    "full": {"mask_token_id": MASK, "attention": "full"},
    "full_shifted": {"mask_token_id": MASK, "attention": "full", "logits_shift": True},
}


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO_CHECKPOINT)


def generate(model: PreTrainedModel, input_ids: torch.Tensor, **arguments: Any) -> Any:
    return model.generate(input_ids, custom_generate=freedave.custom_generate, **arguments)


def on_golden(input_ids: torch.Tensor, **arguments: Any) -> Any:
    return generate(golden_model("block_causal"), input_ids, **(BLOCK_CAUSAL | {"max_new_tokens": 16} | arguments))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_converted_checkpoint_says_how_it_decodes(demo: PreTrainedModel) -> None:
    tokenizer = freedave.load_model("demo").tokenizer
    input_ids = tokenizer("48392+7715=", return_tensors="pt").input_ids
    sequences = demo.generate(input_ids, custom_generate=freedave.custom_generate, max_new_tokens=96, draft_steps=8)
    text = tokenizer.decode(sequences[0, input_ids.shape[1] :], skip_special_tokens=True)
    assert text == "2+5+0:07 9+1+0:10 3+7+1:11 8+7+1:16 4+0+1:05 #056107"
    assert int(sequences[0, -1]) == 0 and int((sequences == 0).sum()) == 1  # cut at the end of sequence


@pytest.mark.parametrize("executor", ["planned", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_generate(family: str, executor: str) -> None:
    settings = {
        "draft_steps": 4,
        "tokens_per_step": 2,
        "drafting": "nested",
        "max_new_tokens": 22,
        "executor": executor,
    }
    input_ids = prompt(7)
    expected = freedave.generate(golden_lm(family), input_ids, **settings)  # type: ignore[arg-type]
    output = generate(golden_model(family), input_ids, return_dict_in_generate=True, **settings, **FAMILIES[family])
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.step_map, expected.step_map)
    assert torch.equal(output.forward_map, expected.forward_map)
    assert output.num_forwards == expected.num_forwards
    assert torch.equal(generate(golden_model(family), input_ids, **settings, **FAMILIES[family]), expected.sequences)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.05},
        {"order": "left_to_right"},
        {"lookahead_steps": 1},
        {"cache": "none"},
        {"block_length": 8},
        {"draft_steps": 1},
        {"check_lossless": True},
    ],
    ids=str,
)
def test_every_setting_arrives(settings: dict[str, Any]) -> None:
    settings = {"draft_steps": 8} | settings
    expected = freedave.generate(golden_lm("block_causal"), prompt(), **({"max_new_tokens": 16} | settings))
    output = on_golden(prompt(), return_dict_in_generate=True, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.step_map, expected.step_map)
    assert output.num_forwards == expected.num_forwards


DRAWN = {"do_sample": True, "top_k": 0}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_do_sample_draws_as_generate_does(temperature: float) -> None:
    """With the temperature of an argument or of a generation config; 1 without one. `top_k=0` is none, as in transformers."""
    expected = freedave.generate(golden_lm("block_causal"), prompt(), 16, temperature=temperature, seed=3)
    ways: list[dict[str, Any]] = [{"temperature": temperature}]
    ways += [{"generation_config": GenerationConfig(temperature=temperature)}]
    ways += [{}] if temperature == 1.0 else [{"do_sample": False, "top_k": None, "temperature": temperature}]
    for way in ways:
        found = on_golden(prompt(), **(DRAWN | way), seed=3, check_lossless=True)
        assert torch.equal(found, expected.sequences)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"top_k": 50}),
        ({"top_k": 2}, {"top_k": 2}),
        ({"generation_config": GenerationConfig(top_k=2)}, {"top_k": 2}),
        ({"generation_config": GenerationConfig(top_k=2), "top_k": 3}, {"top_k": 3}),
        ({"top_k": 0, "top_p": 0.3}, {"top_p": 0.3}),
        ({"generation_config": GenerationConfig(top_k=0, top_p=1.0, min_p=0.5)}, {"min_p": 0.5}),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.2}),
    ],
    ids=str,
)
def test_do_sample_draws_from_what_transformers_would_leave(arguments: dict, options: dict) -> None:
    drawing: dict[str, Any] = {"temperature": 3.0, "seed": 3}
    expected = freedave.generate(golden_lm("block_causal"), prompt(), 16, **drawing, **options)
    found = on_golden(prompt(), do_sample=True, **drawing, **arguments)
    assert torch.equal(found, expected.sequences)
    whole = freedave.generate(golden_lm("block_causal"), prompt(), 16, **drawing)
    assert not torch.equal(found, whole.sequences) or options == {"top_k": 50}


def test_without_a_seed_torch_decides() -> None:
    answers = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        answers.append(on_golden(prompt(), **DRAWN).tolist())
    assert answers[0] == answers[1] != answers[2]


def test_several_sequences_of_a_prompt() -> None:
    """They follow one another, as transformers has it; each is a draw of its own, the first that of the prompt alone."""
    batch = torch.cat([prompt(8, 1), prompt(8, 2)])
    found = on_golden(batch, **DRAWN, seed=3, num_return_sequences=3)
    assert found.shape == (6, 8 + 16)
    assert torch.equal(found[:, :8], batch.repeat_interleave(3, 0))
    assert len({tuple(row) for row in found.tolist()}) == 6
    assert torch.equal(found[:1], on_golden(batch[:1], **DRAWN, seed=3))


def test_use_cache_chooses_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    decode = freedave.generate

    def record(*arguments: Any, **settings: Any) -> freedave.DecodeOutput:
        asked.append(settings["cache"])
        return decode(*arguments, **settings)

    monkeypatch.setattr("freedave.integrations.prompts.generate", record)
    on_golden(prompt())
    on_golden(prompt(), use_cache=False)
    on_golden(prompt(), use_cache=False, cache="auto")
    assert asked == ["auto", "none", "auto"]


def test_a_padded_batch_is_each_prompt_alone() -> None:
    prompts = [prompt(length, seed=length) for length in (3, 9, 6)]
    width = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    sequences = on_golden(padded, attention_mask=mask)
    assert torch.equal(sequences[:, :width], padded)
    for row, one in zip(sequences, prompts, strict=True):
        alone = freedave.generate(golden_lm("block_causal"), one, max_new_tokens=16)
        assert torch.equal(row[width:], alone.sequences[0, one.shape[1] :])


def test_ends_of_sequence_and_padding() -> None:
    """Any of several ends ends a row; what follows is padding, and the result is as long as the longest row."""
    batch = torch.cat([prompt(8, seed) for seed in range(3)])
    free = on_golden(batch)[:, 8:]
    ends = [int(free[0, 5]), int(free[2, 10])]
    lengths = [next((i + 1 for i, t in enumerate(row.tolist()) if t in ends), 16) for row in free]
    output = on_golden(batch, eos_token_id=ends, pad_token_id=62, return_dict_in_generate=True)
    assert output.sequences.shape[1] == 8 + max(lengths)
    for row, steps, expected, length in zip(output.sequences[:, 8:], output.step_map, free, lengths, strict=True):
        assert row.tolist() == expected[:length].tolist() + [62] * (max(lengths) - length)
        assert (steps[:length] >= 0).all() and (steps[length:] == -1).all()
    assert min(lengths) < max(lengths)


def test_an_end_within_a_block_ends_the_decode() -> None:
    """As transformers does it: the end of sequence is kept, padding follows; no forward is spent on what would follow."""
    settings = {"block_length": 8, "draft_steps": 1, "max_new_tokens": 32, "return_dict_in_generate": True}
    free = on_golden(prompt(), **settings).sequences[0, 8:].tolist()
    end = free[3]
    streamer = Recorder()
    output = on_golden(prompt(), eos_token_id=end, pad_token_id=62, streamer=streamer, **settings)
    assert output.sequences[0, 8:].tolist() == free[: free.index(end) + 1]
    assert list(chain(*streamer.puts)) == output.sequences[0].tolist()
    assert output.num_forwards == 8


def test_generation_config() -> None:
    config = GenerationConfig(max_new_tokens=12, return_dict_in_generate=True, eos_token_id=None)
    output = generate(golden_model("block_causal"), prompt(), generation_config=config, **BLOCK_CAUSAL)
    assert output.sequences.shape == (1, 8 + 12)
    assert generate(golden_model("block_causal"), prompt(), max_length=15, **BLOCK_CAUSAL).shape == (1, 15)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamer_gets_tokens_in_order(family: str) -> None:
    streamer, commits = Recorder(), []
    settings = {"max_new_tokens": 20, "streamer": streamer, "on_step": commits.append}
    sequences = generate(golden_model(family), prompt(), **settings, **FAMILIES[family])
    assert streamer.ended == 1
    assert streamer.puts[0] == prompt()[0].tolist()  # by transformers
    assert list(chain(*streamer.puts)) == sequences[0].tolist()
    assert len(streamer.puts) <= 1 + len(commits)
    if family == "block_causal":
        assert len(streamer.puts) > 3


def test_a_streamer_gets_nothing_after_the_end() -> None:
    free = on_golden(prompt())[0, 8:].tolist()
    streamer = Recorder()
    sequences = on_golden(prompt(), eos_token_id=free[6], streamer=streamer)
    assert list(chain(*streamer.puts)) == sequences[0].tolist()
    assert sequences.shape[1] - 8 == free.index(free[6]) + 1


def test_the_text_streamer_of_transformers(demo: PreTrainedModel) -> None:
    tokenizer = freedave.load_model("demo").tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1, skip_special_tokens=True)
    generate(demo, tokenizer("7*8=", return_tensors="pt").input_ids, max_new_tokens=64, streamer=streamer)
    assert "".join(streamer) == "7*8+0:56 #56"


def test_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(golden_model("block_causal"))
    model.set_attn_implementation("eager")
    model.train()
    before = model(prompt()).logits
    generate(model, prompt(), max_new_tokens=4, **BLOCK_CAUSAL)
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert torch.equal(model(prompt()).logits, before)


def test_experts_are_left_as_they_were() -> None:
    model = copy.deepcopy(experts_lm(64).model)
    model.set_experts_implementation("eager")
    before = model(prompt()).logits
    generate(model, prompt(), max_new_tokens=4, **BLOCK_CAUSAL)
    assert model.config._experts_implementation == "eager"
    assert torch.equal(model(prompt()).logits, before)


def test_threads_take_turns_on_a_model() -> None:
    """Each gets its own answer, and the model is left as it was; without turns, the first to end switches attention back."""
    model = copy.deepcopy(golden_model("block_causal"))
    model.set_attn_implementation("sdpa")
    model.train()
    prompts = [prompt(length, seed) for seed, length in enumerate((4, 9, 6, 12))]
    expected = [on_golden(one) for one in prompts]
    started = threading.Barrier(len(prompts))

    def answer(one: torch.Tensor) -> list[torch.Tensor]:
        started.wait()
        return [generate(model, one, max_new_tokens=16, **BLOCK_CAUSAL) for _ in range(3)]

    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(answer, prompts))
    for same, sequences in zip(answers, expected, strict=True):
        assert all(torch.equal(one, sequences) for one in same)
    assert model.config._attn_implementation == "sdpa" and model.training


def test_a_second_call_waits_for_the_first() -> None:
    """It does not find the model switched, and take that for its own; on_step may generate with the same model."""
    model = copy.deepcopy(golden_model("block_causal"))
    model.set_attn_implementation("sdpa")
    events: list[str] = []
    inside = threading.Event()
    arguments = {"max_new_tokens": 8, **BLOCK_CAUSAL}

    def on_first_step(_: freedave.Commit) -> None:
        if not events:
            events.append("first")
            inside.set()
            generate(model, prompt(), **arguments)
            second.join(0.5)
            events.append("first goes on")

    def call_second() -> None:
        inside.wait()
        generate(model, prompt(9), on_step=lambda _: events.append("second"), **arguments)

    second = threading.Thread(target=call_second)
    second.start()
    generate(model, prompt(), on_step=on_first_step, **arguments)
    second.join()
    assert events[:2] == ["first", "first goes on"] and set(events[2:]) == {"second"}
    assert model.config._attn_implementation == "sdpa"


def test_a_difference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    output = freedave.generate(golden_lm("block_causal"), prompt(), max_new_tokens=16)

    def differs(*_: Any, **__: Any) -> freedave.DecodeOutput:
        other = dataclasses.replace(output, step_map=output.step_map + 1)
        raise freedave.LosslessnessError("a difference", output, other)

    monkeypatch.setattr("freedave.integrations.prompts.generate", differs)
    with pytest.raises(freedave.LosslessnessError, match="a difference"):
        on_golden(prompt(), check_lossless=True)


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"do_sample": True, "logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])},
            "logits .*TopKLogitsWarper",
        ),
        ({"do_sample": True, "top_k": 0, "temperature": 0.0}, "do_sample=True needs a temperature above 0, got 0"),
        ({"do_sample": True, "top_k": 0, "typical_p": 0.5}, "logits processors .*TypicalLogitsWarper"),
        ({"num_beams": 3}, "num_beams=3 cannot be honoured"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True cannot be honoured"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True cannot be honoured"),
        ({"repetition_penalty": 1.2}, "logits processors cannot be honoured .*RepetitionPenaltyLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}, "logits processors .*TopKLogitsWarper"),
        ({"eos_token_id": 5, "min_new_tokens": 9}, "logits processors cannot be honoured .*MinNewTokens"),
        ({"max_time": 9.0}, "stopping criteria .* cannot be honoured .*MaxTimeCriteria"),
        ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(9.0)])}, "stopping criteria .*MaxTimeCriteria"),
        ({"position_ids": torch.arange(8)[None] + 1}, "position_ids cannot be honoured"),
        ({"cache_implementation": "static"}, "cache_implementation='static' cannot be honoured"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 cannot be honoured"),
        ({"assistant_model": "itself"}, "assistant_model cannot be honoured"),
        ({"attention_mask": torch.tensor([[1] * 7 + [0]])}, "sequence 0 of the batch is not padded on the left only"),
        ({"attention_mask": torch.zeros(1, 8, dtype=torch.int64)}, "sequence 0 of the batch has no tokens"),
        ({"mask_token_id": None}, "mask_token_id missing: the model's config does not say"),
        ({"mask_token_id": None, "attention": None}, "mask_token_id and attention missing"),
        ({"attention": "causal"}, "attention must be one of block_causal, full, got 'causal'"),
        ({"draft_steps": 0}, "draft_steps must be at least 1, got 0"),
        ({"draft_step": 4}, "draft_step"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore")  # transformers has remarks of its own
def test_what_cannot_be_honoured(arguments: dict[str, Any], message: str) -> None:
    if "assistant_model" in arguments:
        arguments = {"assistant_model": golden_model("block_causal")}
    with pytest.raises(ValueError, match=message):
        on_golden(prompt(), **arguments)


def test_one_sequence_a_streamer() -> None:
    with pytest.raises(ValueError, match="a streamer takes one sequence, got a batch of 2"):
        on_golden(prompt().expand(2, -1), streamer=Recorder())


def test_right_padding_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[1, 6:] = 0
        with pytest.raises(ValueError, match="sequence 1 of the batch is not padded on the left only; set .*'left'"):
            on_golden(prompt().expand(2, -1), attention_mask=mask, pad_token_id=0)
