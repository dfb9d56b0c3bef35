"""SDAR with a mixture of experts (SDAR-30B-A3B): Qwen3-MoE with block-causal attention.

A token's experts are the best of one softmax over all of them; no expert is shared, and some layers may be dense.
"""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, same_name
from freedave.models.families.sdar import HARMLESS, qwen3_arguments


def check_experts(reader: ConfigReader, experts: int, experts_per_token: int) -> None:
    """Notes a problem unless a token can be given that many experts."""
    if experts_per_token > experts:
        reader.problems.append(f"num_experts_per_tok is {experts_per_token}, and there are {experts} experts")


def dense_layers(reader: ConfigReader) -> list[int]:
    """`mlp_only_layers`: layers without experts, beside those that `decoder_sparse_step` leaves out."""
    value = reader.get("mlp_only_layers")
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        reader.problems.append(f"mlp_only_layers must be a list of layers, got {value!r}")
        return []
    return value


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of Qwen3MoeConfig; the published fields have its names."""
    width, heads = reader.values.get("hidden_size"), reader.values.get("num_attention_heads")
    usual = width // heads if isinstance(width, int) and isinstance(heads, int) and width >= heads > 0 else 1
    arguments = qwen3_arguments(reader, reader.integer("head_dim", usual))
    experts, experts_per_token = reader.integer("num_experts"), reader.integer("num_experts_per_tok")
    check_experts(reader, experts, experts_per_token)
    return arguments | {
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "norm_topk_prob": reader.boolean("norm_topk_prob"),
        "decoder_sparse_step": reader.integer("decoder_sparse_step", 1),
        "mlp_only_layers": dense_layers(reader),
    }


SDAR_MOE = Family(
    name="SDAR-MoE",
    model_type="sdar_moe",
    architectures=("SDARMoeForCausalLM",),
    native_class="Qwen3MoeForCausalLM",
    native_config=native_config,
    source=same_name,
    harmless=HARMLESS | {"output_router_logits", "router_aux_loss_coef"},
    defaults=Defaults("block_causal", mask_token_id=151669, eos_token_id=151643, block_length=4, draft_steps=8),
)
