"""The tiny random models of the golden decodes, and how to make others."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file

from freedave import DiffusionLM

MASK = 63
CLASSES = {"qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}


@functools.cache
def golden_model(family: str) -> transformers.PreTrainedModel:
    """One of "block_causal" (Qwen3), "full" (Qwen3), "full_shifted" (Qwen2); 64 tokens, 2 layers, random weights."""
    config = json.loads((GOLDEN / f"{family}.config.json").read_text())
    model_class = CLASSES[config["model_type"]]
    model = model_class(model_class.config_class(**config))
    model.load_state_dict(load_file(GOLDEN / f"{family}.safetensors"))
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "block_causal": {"attention": "block_causal", "block_length": 4},
    "full": {"attention": "full"},
    "full_shifted": {"attention": "full", "logits_shift": True},
}


def golden_lm(family: str = "block_causal", **options: Any) -> DiffusionLM:
    return DiffusionLM(golden_model(family), MASK, **(OPTIONS[family] | options))


@functools.cache
def wide_lm(family: str, width: int) -> DiffusionLM:
    """Two layers of `width` features, random weights, 64 tokens."""
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        intermediate_size=3 * width,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    return DiffusionLM(model, MASK, **OPTIONS[family])


@functools.cache
def experts_lm(width: int) -> DiffusionLM:
    """Two layers of `width` features, block-causal, one with eight experts of which each token goes to two; 64 tokens."""
    config = transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=2 * width,
        moe_intermediate_size=width // 2,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Glm4MoeForCausalLM(config)
    return DiffusionLM(model, MASK, **OPTIONS["block_causal"])


def prompt(length: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(MASK, (1, length), generator=torch.Generator().manual_seed(seed))
