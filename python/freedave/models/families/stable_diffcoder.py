"""Stable-DiffCoder: Llama with block-causal attention. Its configuration is Llama's own; the architecture's name tells."""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, same_name
from freedave.models.rotary import published_rotary_positions


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of LlamaConfig."""
    reader.expect("hidden_act", "silu", absent="silu")
    heads = reader.integer("num_attention_heads")
    arguments = {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": published_rotary_positions(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "attention_bias": reader.boolean("attention_bias", False),
        "mlp_bias": reader.boolean("mlp_bias", False),
    }
    if reader.get("head_dim") is not None:
        arguments["head_dim"] = reader.integer("head_dim")
    return arguments


STABLE_DIFFCODER = Family(
    name="Stable-DiffCoder",
    model_type="llama",
    architectures=("StableDiffcoderForCausalLM",),
    native_class="LlamaForCausalLM",
    native_config=native_config,
    source=same_name,
    harmless=frozenset({"pretraining_tp"}),  # slices of the same products
    defaults=Defaults("block_causal", mask_token_id=5, eos_token_id=2, block_length=4, draft_steps=8),
)
