"""LLaDA 8B and 1.5: Llama with full attention, under the names of OLMo, from whose code it grew."""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, Source
from freedave.models.rotary import published_rotary_positions

TOP = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def source(name: str, shape: tuple[int, ...], config: Any) -> Source:
    """`model.layers.3.mlp.up_proj.weight` is `model.transformer.blocks.3.up_proj.weight`, and so on."""
    if name in TOP:
        return Source(TOP[name], shape)
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    module, _, parameter = part.rpartition(".")
    return Source(f"model.transformer.blocks.{layer}.{LAYER[module]}.{parameter}", shape)


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of LlamaConfig. The published code is configurable; what Llama cannot express is refused."""
    reader.expect("block_type", "llama", absent="sequential")
    reader.expect("block_group_size", 1, absent=1)
    reader.expect("activation_type", "silu", absent="swiglu")
    reader.expect("layer_norm_type", "rms", absent="default")
    reader.expect("layer_norm_with_affine", True, absent=True)
    reader.expect("rope", True, absent=False)
    reader.expect("rope_full_precision", True, absent=True)
    for switched_off in (
        "alibi",
        "attention_layer_norm",
        "include_bias",
        "include_qkv_bias",
        "bias_for_layer_norm",
        "input_emb_norm",
        "scale_logits",
        "multi_query_attention",
    ):
        reader.expect(switched_off, False, absent=False)
    width, heads, vocabulary = reader.integer("d_model"), reader.integer("n_heads"), reader.integer("vocab_size")
    return {
        # Both the embedding and the head have `embedding_size` rows; `vocab_size` of them are used.
        "vocab_size": reader.integer("embedding_size", vocabulary),
        "hidden_size": width,
        "intermediate_size": reader.integer("mlp_hidden_size", reader.integer("mlp_ratio", 4) * width),
        "num_hidden_layers": reader.integer("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("n_kv_heads", heads),
        "max_position_embeddings": reader.integer("max_sequence_length"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": published_rotary_positions(reader, supported=("default",)),
        "tie_word_embeddings": reader.boolean("weight_tying", True),
    }


HARMLESS = frozenset(
    {
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "embedding_dropout",
        "flash_attention",
        "flash_attn_varlen",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "init_std",
        "precision",
        "residual_dropout",
    }
)

LLADA = Family(
    name="LLaDA",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    native_class="LlamaForCausalLM",
    native_config=native_config,
    source=source,
    harmless=HARMLESS,
    defaults=Defaults("full", mask_token_id=126336, eos_token_id=126081),
)
