"""The graph executor's layers through torch.compile: whole, once a shape for all layers, and the same tokens."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import transformers
from test_graph_executor import EXACT, REFRESHED, batch_of
from tiny_models import MASK, OPTIONS, golden_lm
from torch._dynamo.utils import counters

import freedave
from freedave.decode import idle_executors
from freedave.forward import compiled_layers
from freedave.forward.compiled_layers import layers_of

DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
EXPERTS: dict[str, Any] = DENSE | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2": DENSE,
    "Qwen3": DENSE,
    "Llama": DENSE,
    "Glm4Moe": EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "Qwen3Moe": EXPERTS | {"num_experts": 4},
}
# Kinds of layers, each of which is compiled once a shape: a dense one before those with experts; and the norm.
KINDS = {name: 3 if name == "Glm4Moe" else 2 for name in CONFIGS}


@functools.cache
def tiny_lm(name: str, attention: str = "block_causal") -> freedave.DiffusionLM:
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return freedave.DiffusionLM(model, MASK, **OPTIONS[attention])


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing, which is where a layer breaks, without generating code, which takes a compiler a second a shape."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def decode(lm: freedave.DiffusionLM, compile: bool, **options: Any) -> freedave.DecodeOutput:
    options = {"max_new_tokens": 16, "draft_steps": 4, "executor": "graph"} | batch_of([9, 4]) | options
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return freedave.generate(lm, compile=compile, **options)


def expect_same(out: freedave.DecodeOutput, expected: freedave.DecodeOutput) -> None:
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.step_map, expected.step_map)


@pytest.mark.parametrize("name", CONFIGS)
def test_example(name):
    """No layer breaks, and one graph a shape serves all layers of a kind; the model is left as it was."""
    lm = tiny_lm(name)
    expected = decode(lm, compile=False)
    assert not counters["stats"]
    calls = [layer._compiled_call_impl for layer in lm.model.modules()]
    out = decode(lm, compile=True)
    expect_same(out, expected)
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert len(layers_of(lm.model)) == 5
    steps = [shape for shape in out.stats.shapes if shape.startswith("step")]  # prompts run uncompiled
    assert counters["stats"]["unique_graphs"] == KINDS[name] * len(steps)
    assert [layer._compiled_call_impl for layer in lm.model.modules()] == calls
    idle_executors.forget(lm)
    expect_same(decode(lm, compile=True), expected)
    assert counters["stats"]["unique_graphs"] == KINDS[name] * len(steps)  # what was compiled serves again


@pytest.mark.parametrize(("family", "cache"), EXACT + REFRESHED)
def test_every_cache(family, cache):
    """Refreshes are compiled as steps are; block-causal prompts run uncompiled."""
    lm = golden_lm(family, block_length=8)
    expected = decode(lm, compile=False, cache=cache)
    out = decode(lm, compile=True, cache=cache, check_lossless=True)
    expect_same(out, expected)
    first = [shape for shape in out.stats.shapes if shape.startswith("a first forward")]
    compiled = len(out.stats.shapes) - (0 if cache in ("prefix", "dual") else len(first))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2 * compiled
    assert len(first) == (0 if cache == "none" else 1)


def test_the_compiler_of_a_processor(monkeypatch):
    """Code that is generated decodes the same."""
    lm = tiny_lm("Qwen3")
    expected = decode(lm, compile=False)
    monkeypatch.setattr(compiled_layers, "BACKEND", "inductor")
    expect_same(decode(lm, compile=True), expected)
    assert counters["inductor"] and not counters["graph_break"]


def test_a_model_that_does_not_compile_says_so_once(monkeypatch):
    """A layer that cannot be compiled whole runs as it is."""
    lm = tiny_lm("Llama")
    expected = decode(lm, compile=False)
    layer = type(lm.model.model.layers[0])
    forward = layer.forward

    def breaking(self, hidden_states, *arguments, **options):
        torch._dynamo.graph_break()
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(layer, "forward", breaking)
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not compile, so it runs uncompiled: ") as said:
        out = freedave.generate(
            lm, **batch_of([9, 4]), max_new_tokens=16, draft_steps=4, executor="graph", compile=True
        )
    assert sum("does not compile" in str(warning.message) for warning in said) == 1
    expect_same(out, expected)
    assert all(module._compiled_call_impl is None for module in lm.model.modules())


def test_a_model_that_raises_is_not_taken_for_one_that_does_not_compile(monkeypatch):
    lm = tiny_lm("Qwen2")

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of order")

    monkeypatch.setattr(lm.model.model.embed_tokens, "forward", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        decode(lm, compile=True)
    assert all(module._compiled_call_impl is None for module in lm.model.modules())
