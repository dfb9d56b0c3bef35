"""LLaDA2.0 and 2.1: a mixture of experts routed as in GLM-4 (sigmoid scores, a bias that only selects, groups), block-causal.

Half of each head is rotated, q and k are normalised, and q, k and v are rows of one matrix.
"""

from __future__ import annotations

from typing import Any

from freedave.models.config_reader import ConfigReader
from freedave.models.families.family import Defaults, Family, Source
from freedave.models.rotary import published_rotary_positions

UNI_VOCABULARY = 173568  # its configuration may not say more of the images

TOP = {"model.embed_tokens.weight": "model.word_embeddings.weight"}
ATTENTION = {"o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm"}


def source(name: str, shape: tuple[int, ...], config: Any) -> Source:
    """Renames attention and router; q, k and v are the rows [H D, G D, G D] of `attention.query_key_value`."""
    if name.endswith(".mlp.gate.e_score_correction_bias"):
        return Source(name.replace("e_score_correction_bias", "expert_bias"), shape)
    if ".self_attn." not in name:
        return Source(TOP.get(name, name), shape)
    layer, part = name.split(".self_attn.")
    module, parameter = part.split(".")
    if module in ATTENTION:
        return Source(f"{layer}.attention.{ATTENTION[module]}.{parameter}", shape)
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    first = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}[module]
    whole = (queries + 2 * keys, *shape[1:])
    return Source(f"{layer}.attention.query_key_value.{parameter}", whole, slice(first, first + shape[0]))


def check_routing(reader: ConfigReader, experts: int, experts_per_token: int, groups: int, chosen_groups: int) -> None:
    """Notes a problem unless a token can be given that many experts: groups of equal size are ranked by their best two."""
    if (
        experts % groups
        or experts < 2 * groups
        or chosen_groups > groups
        or experts_per_token > chosen_groups * (experts // groups)
    ):
        reader.problems.append(
            f"{experts_per_token} of {experts} experts cannot be chosen from the best {chosen_groups} of {groups} groups "
            "(num_experts_per_tok, number of experts, topk_group, n_group)"
        )


def native_config(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of Glm4MoeConfig."""
    reader.expect("hidden_act", "silu", absent="silu")
    reader.expect("use_bias", False, absent=True)
    reader.expect("use_qk_norm", True, absent=True)  # the published code normalises whatever the file says
    reader.expect("norm_head", False, absent=False)
    reader.expect("score_function", "sigmoid", absent="sigmoid")
    reader.expect("norm_topk_prob", True, absent=True)
    reader.expect("use_sliding_window", False, absent=False)
    reader.expect("use_linear_attention", False, absent=False)
    reader.expect("use_rmsnorm", True, absent=True)
    reader.expect("norm_softmax", False, absent=False)
    reader.expect("moe_router_enable_expert_bias", True, absent=True)
    reader.expect("using_split_qkv_in_self_attention", False, absent=False)
    if reader.get("vocab_size") == UNI_VOCABULARY:
        reader.refuse("vocab_size", "that of LLaDA2.0-Uni, which decodes images, too; it is not supported", wrap=False)
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    head_dim = reader.integer("head_dim", max(1, width // heads))
    rope = published_rotary_positions(reader, rotated=0.5)
    rotated = rope["partial_rotary_factor"]
    if reader.integer("rotary_dim", int(head_dim * rotated)) != int(head_dim * rotated):
        reader.problems.append(
            f"rotary_dim {reader.values['rotary_dim']} is not partial_rotary_factor {rotated} of head_dim {head_dim}"
        )
    experts, experts_per_token = reader.integer("num_experts"), reader.integer("num_experts_per_tok")
    groups, chosen_groups = reader.integer("n_group"), reader.integer("topk_group")
    check_routing(reader, experts, experts_per_token, groups, chosen_groups)
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        # 0 means "as many as query heads", as does a missing key.
        "num_key_value_heads": reader.integer("num_key_value_heads", heads, minimum=0) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": rope,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "attention_bias": reader.boolean("use_qkv_bias", False),
        "use_qk_norm": True,
        "first_k_dense_replace": reader.integer("first_k_dense_replace", 0, minimum=0),
        "moe_intermediate_size": reader.integer("moe_intermediate_size"),
        "n_routed_experts": experts,
        "n_shared_experts": reader.integer("num_shared_experts"),
        "num_experts_per_tok": experts_per_token,
        "n_group": groups,
        "topk_group": chosen_groups,
        "routed_scaling_factor": reader.number("routed_scaling_factor"),
        "norm_topk_prob": experts_per_token > 1,  # the published code leaves the weight of a single expert as it is
        "num_mtp_layers": 0,
    }


HARMLESS = frozenset(
    {
        "embedding_dropout",
        "moe_shared_expert_intermediate_size",  # the weights' shapes say it
        "mtp_loss_scaling_factor",
        "num_nextn_predict_layers",
        "output_dropout",
        "output_router_logits",
        "router_dtype",  # the router computes in float32, whatever the file says
    }
)

EDITING = (
    "LLaDA2.1 was published with a decoder that may change tokens which it has committed (token-to-token editing); this one "
    "does not: committed tokens stay, and answers can differ from those of its own code"
)

LLADA2 = Family(
    name="LLaDA2",
    model_type="llada2_moe",
    architectures=("LLaDA2MoeModelLM",),
    native_class="Glm4MoeForCausalLM",
    native_config=native_config,
    source=source,
    harmless=HARMLESS,
    defaults=Defaults("block_causal", mask_token_id=156895, eos_token_id=156892, block_length=32),
    warnings=(("LLaDA2.1", EDITING),),
)
