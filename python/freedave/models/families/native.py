"""Checkpoints in the layout of a transformers class, as `save_pretrained` and `freedave convert` write them.

Any of these architectures may have been trained as a masked-diffusion model, so config.json must say how it decodes.
"""

from __future__ import annotations

import copy
from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Family, same_name

# What is compared with the weights before the native configuration is made of the rest.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def _whole_config(reader: ConfigReader) -> dict[str, Any]:
    for key in SIZES:
        reader.integer(key, 1)  # absent: the native configuration's default
    return copy.deepcopy(reader.values)  # transformers changes what it is given


NATIVE_FAMILIES = tuple(
    Family(native_class, model_type, (native_class,), native_class, _whole_config, same_name)
    for model_type, native_class in {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
        "glm4_moe": "Glm4MoeForCausalLM",
    }.items()
)
