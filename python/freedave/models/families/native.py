"""Checkpoints in the layout of a transformers class, as `save_pretrained` and `freedave convert` write them.

Any of these architectures may have been trained as a masked-diffusion model, so config.json must say how it decodes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Family, same_name
from freedave.models.families.llada2 import check_routing
from freedave.models.families.sdar_moe import check_experts, dense_layers
from freedave.models.rotary import rotary_positions

# What is compared with the weights before the native configuration is made of the rest.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
PER_TOKEN = "num_experts_per_tok"
ROUTING = ("n_routed_experts", PER_TOKEN, "n_group", "topk_group")


# How its decoding is written down beside the native configuration.
DECODING = ("mask_token_id", "attention", "logits_shift")


def _whole_config(native_class: str, reader: ConfigReader) -> dict[str, Any]:
    for key in SIZES:
        reader.integer(key, 1)  # absent: the native configuration's default
    reader.number("rms_norm_eps", 1.0)
    rope = rotary_positions(reader)
    if native_class != "Glm4MoeForCausalLM" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        reader.problems.append(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}, which {native_class} cannot use"
        )
    config_class = getattr(transformers, native_class).config_class
    if native_class == "Glm4MoeForCausalLM":
        check_routing(reader, *(reader.integer(key, getattr(config_class, key)) for key in ROUTING))
    if native_class == "Qwen3MoeForCausalLM":
        experts = "num_experts" if reader.get("num_local_experts") is None else "num_local_experts"  # older, newer
        check_experts(reader, *(reader.integer(key, default) for key, default in ((experts, 128), (PER_TOKEN, 8))))
        reader.integer("decoder_sparse_step", 1)
        dense_layers(reader)
    reader.understood.update(config_class().to_dict(), config_class.attribute_map, DECODING)
    # A copy, since transformers changes what it is given.
    return {key: dict(value) if isinstance(value, dict) else value for key, value in reader.values.items()}


NATIVE_FAMILIES = tuple(
    Family(native_class, model_type, (native_class,), native_class, partial(_whole_config, native_class), same_name)
    for model_type, native_class in {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "llama": "LlamaForCausalLM",
        "glm4_moe": "Glm4MoeForCausalLM",
    }.items()
)
