"""LLaDA-MoE (7B-A1B): Qwen3-MoE with full attention; a token's experts weigh what one softmax over all gives them.

Its config.json says the model_type of LLaDA, which other libraries ask to be changed; the architecture's name tells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, same_name
from freedave.models.families.sdar_moe import check_experts
from freedave.models.rotary import published_rotary_positions


def dense_layers(reader: ConfigReader, layers: int) -> list[int]:
    """`moe_layer_freq` has a number for each layer, which is 0 for those without experts."""
    value = reader.get("moe_layer_freq")
    if value is None:
        return []
    if not isinstance(value, list) or len(value) != layers or not all(type(each) is int for each in value):
        reader.problems.append(f"moe_layer_freq must have a number for each of {layers} layers, got {value!r}")
        return []
    return [layer for layer, each in enumerate(value) if each == 0]


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of Qwen3MoeConfig."""
    reader.expect("hidden_act", "silu", absent="silu")
    reader.expect("qk_layernorm", True, absent=False)
    reader.expect("moe_router_score_function", "softmax", absent="softmax")
    reader.expect("moe_router_enable_expert_bias", False, absent=False)
    reader.expect("shared_expert_intermediate_size", None, absent=None)
    reader.expect("routed_scaling_factor", 1, absent=1)
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if width % heads:
        reader.problems.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    layers = reader.integer("num_hidden_layers")
    dense = dense_layers(reader, layers)
    experts, experts_per_token = reader.integer("num_experts"), reader.integer("num_experts_per_tok")
    check_experts(reader, experts, experts_per_token)
    expert_width = reader.integer("expert_intermediate_size")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        # Only layers without experts have it.
        "intermediate_size": reader.integer("dense_intermediate_size", *([] if dense else [expert_width])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": max(1, width // heads),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": published_rotary_positions(reader),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "attention_bias": reader.boolean("attention_bias", False),
        "moe_intermediate_size": expert_width,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "norm_topk_prob": False,  # whatever the file says
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


HARMLESS = frozenset(
    {"norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "router_num_group", "router_topk_group"}
)

LLADA_MOE = Family(
    name="LLaDA-MoE",
    model_type="llada",
    architectures=("LLaDAMoEModelLM",),
    native_class="Qwen3MoeForCausalLM",
    native_config=native_config,
    source=same_name,
    harmless=HARMLESS,
    defaults=Defaults("full", mask_token_id=156895, eos_token_id=156892),
)
RENAMED = replace(LLADA_MOE, model_type="lladamoe")
