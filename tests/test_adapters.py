"""Adapters of peft on a loaded model: attention and head are still found, and decoding is lossless with them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import MASK
from published_layouts import write_published
from test_published_checkpoints import assert_agree, logits, reference, token_ids

import freedave

peft = pytest.importorskip("peft", reason="pip install -r requirements/dev.txt")

FAMILIES = ["sdar", "dream", "sdar_moe"]
EXECUTORS = ["planned", "graph"]
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(targets: list[str], **options: Any) -> Any:
    """With weights that show: LoRA's usual ones begin with no effect."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)


def load(folder: Path) -> freedave.DiffusionLM:
    lm = freedave.load_model(folder)
    lm.eos_token_id = None
    return lm


def adapted(folder: Path, targets: list[str]) -> tuple[freedave.DiffusionLM, Any]:
    """(the model with an adapter inside, the PeftModel around it)."""
    lm = load(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lm, peft.get_peft_model(lm.model, lora(targets))


def decode(lm: freedave.DiffusionLM, executor: str, **options: Any) -> torch.Tensor:
    blocks = lm.block_length or 8
    options = {"max_new_tokens": 16, "draft_steps": 4, "check_lossless": True, "block_length": blocks} | options
    return freedave.generate(lm, torch.arange(5)[None], executor=executor, **options).sequences


def wrap(model: Any, lm: freedave.DiffusionLM) -> freedave.DiffusionLM:
    settings = {"attention": lm.attention, "block_length": lm.block_length, "logits_shift": lm.logits_shift}
    return freedave.DiffusionLM(model, MASK, **settings)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_example(family, executor, tmp_path):
    """In place, or as what peft returns: the adapter counts, and decoding is lossless."""
    folder = write_published(tmp_path, family)[0]
    lm, model = adapted(folder, EVERYWHERE)
    wrapped = wrap(model, lm)
    assert wrapped.model is lm.model and wrapped.has_plain_head and wrapped.takes_draft_attention
    found = decode(lm, executor)
    assert torch.equal(decode(wrapped, executor), found)
    assert not torch.equal(decode(load(folder), executor), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_sum_of_weights_and_adapter(family, tmp_path):
    folder, config, tensors = write_published(tmp_path, family)
    lm, model = adapted(folder, [*EVERYWHERE, "lm_head"])
    state = model.state_dict()
    for name in state:
        if ".lora_A." not in name:
            continue
        low, high = state[name].double(), state[name.replace("lora_A", "lora_B")].double()
        tensor = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
        tensors[tensor] = tensors[tensor].double() + 2.0 * high @ low
    assert_agree(logits(lm, token_ids()), reference(family, config, tensors, token_ids()))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_on_the_head(executor, tmp_path):
    """The head is more than one product then, and is called as it is."""
    folder = write_published(tmp_path, "sdar")[0]
    lm, _ = adapted(folder, ["lm_head"])
    assert lm.projection is None and lm.has_plain_head
    assert not torch.equal(decode(lm, executor), decode(load(folder), executor))


@pytest.mark.parametrize("compile", [False, True])
def test_after_a_decode_without_it(compile, tmp_path, monkeypatch):
    """What the graph executor keeps between two decodes is of the model without an adapter, and is not used."""
    monkeypatch.setattr("freedave.forward.compiled_layers.BACKEND", "aot_eager")
    folder = write_published(tmp_path, "sdar")[0]
    expected = decode(adapted(folder, EVERYWHERE)[0], "planned")
    lm = load(folder)
    plain = decode(lm, "graph", compile=compile)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(lm.model, lora(EVERYWHERE))
    assert torch.equal(decode(lm, "graph", compile=compile), expected)
    assert "lora" in type(lm.model.model.layers[0].self_attn.q_proj).__module__  # and it is still there
    executor = lm.idle_executor
    with model.disable_adapter():
        assert torch.equal(decode(lm, "graph", compile=compile), plain)
        assert lm.idle_executor is not executor
    assert torch.equal(decode(lm, "graph", compile=compile), expected)
    merged = wrap(model.merge_and_unload(), lm)
    assert torch.equal(decode(merged, "graph", compile=compile), decode(merged, "planned"))


def test_an_adapter_that_was_saved(tmp_path):
    folder = write_published(tmp_path / "base", "sdar")[0]
    lm, model = adapted(folder, EVERYWHERE)
    model.save_pretrained(tmp_path / "adapter")
    other = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for the base model's configuration
        peft.PeftModel.from_pretrained(other.model, tmp_path / "adapter")
    assert torch.equal(decode(other, "planned"), decode(lm, "planned"))


def test_adapters_that_add_tokens_to_the_prompt_are_refused(tmp_path):
    lm = load(write_published(tmp_path, "sdar")[0])
    model = peft.get_peft_model(
        copy.deepcopy(lm.model), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(
        ValueError, match=r"the adapter 'default' \(PROMPT_TUNING\) adds tokens of its own to every prompt"
    ):
        wrap(model, lm)
