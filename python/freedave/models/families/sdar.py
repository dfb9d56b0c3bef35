"""SDAR and TraDo: Qwen3 (normalised q and k) with block-causal attention; TraDo is SDAR with further training."""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, same_name
from freedave.models.rotary import published_rotary_positions


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of Qwen3Config."""
    return qwen3_arguments(reader, reader.integer("head_dim", 128))


def qwen3_arguments(reader: ConfigReader, head_dim: int) -> dict[str, Any]:
    """What the configurations of Qwen3 with and without experts share; the published fields have their names."""
    reader.expect("hidden_act", "silu", absent="silu")
    reader.expect("use_sliding_window", False, absent=False)
    heads = reader.integer("num_attention_heads")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": published_rotary_positions(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "attention_bias": reader.boolean("attention_bias", False),
    }


HARMLESS = frozenset({"ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "use_deepep"})

SDAR = Family(
    name="SDAR or TraDo",
    model_type="sdar",
    architectures=("SDARForCausalLM",),
    native_class="Qwen3ForCausalLM",
    native_config=native_config,
    source=same_name,
    harmless=HARMLESS,
    defaults=Defaults("block_causal", mask_token_id=151669, eos_token_id=151643, block_length=4, draft_steps=8),
)
