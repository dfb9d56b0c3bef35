"""Dream 7B, Dream-Coder, DiffuCoder: Qwen2 (biases on q, k, v) with full attention and logits shifted by one."""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, same_name
from freedave.models.rotary import published_rotary_positions


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of Qwen2Config; the published fields have its names."""
    reader.expect("hidden_act", "silu", absent="silu")
    reader.expect("use_mrope", False, absent=False)
    reader.expect("use_sliding_window", False, absent=False)
    heads = reader.integer("num_attention_heads")
    return {
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
    }


DREAM = Family(
    name="Dream",
    model_type="Dream",
    # Later models keep the model_type and change the decoding (DreamForCausalLM: block-causal, not shifted).
    architectures=("DreamModel",),
    native_class="Qwen2ForCausalLM",
    native_config=native_config,
    source=same_name,
    defaults=Defaults("full", mask_token_id=151666, eos_token_id=151643, logits_shift=True),
    tokenizer_class="Qwen2Tokenizer",
)
