"""The keys of config.json: which say nothing about the computation, which change it, and what becomes of all others.

A family's own keys are those that its `native_config` reads, and its `harmless` ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedConfig

from freedave.models.config_reader import ConfigReader

# Bookkeeping of every family; transformers' own (dtype, output_attentions, ...) and the generation settings that its older
# versions wrote into config.json (temperature, top_k, ...) join it.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "add_cross_attention",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "cross_attention_hidden_size",
        "debug",
        "finetuning_task",
        "initializer_range",
        "is_causal",
        "is_decoder",
        "max_window_layers",
        "prefix",
        "pruned_heads",
        "sep_token_id",
        "sliding_window",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
    }
)


class Change(NamedTuple):
    """Why a key is refused, the values with which it does nothing, and whether wrapping the published module would help."""

    reason: str
    harmless: tuple[Any, ...] = (None, False)
    wrap: bool = True


_CAPPED = Change("capped logits are not computed", (None, False, 0))
_SCALED = Change("scaled activations are not computed", (None, 1))
_CAPACITY = Change(
    "LLaDA2.2's routing, in which a block's tokens share the experts that are best for any of them, is not computed: the "
    "native class routes each token alone",
    (None,),
    wrap=False,
)
_EDITING = Change("LLaDA2.2's tokens that delete and insert committed ones are not obeyed here", (None,), wrap=False)
_IMAGES = Change("models of more than text are not supported", (None, False, {}), wrap=False)

CHANGES = {
    "compression_config": Change("weights that an older compressed-tensors wrote are not read", (None, False, {})),
    "clip_qkv": Change("clipped queries, keys and values are not computed"),
    "final_logit_softcapping": _CAPPED,
    "attn_logit_softcapping": _CAPPED,
    "logit_scale": _SCALED,
    "logits_scaling": _SCALED,
    "embedding_multiplier": _SCALED,
    "residual_multiplier": _SCALED,
    "attention_multiplier": Change("another scale of attention is not computed", (None,)),
    "query_pre_attn_scalar": Change("another scale of attention is not computed", (None,)),
    "norm_after": Change("only norms before attention and feed-forward are computed"),
    "use_mrope": Change("only rotary embeddings of one dimension are computed"),
    "use_linear_attention": Change("only softmax attention is computed"),
    "use_sliding_window": Change("attention in a sliding window is not computed"),
    "use_regular_causal": Change("token-causal attention is not block diffusion", wrap=False),
    "expert_capacity": _CAPACITY,
    "delete_token_id": _EDITING,
    "split_token_id": _EDITING,
    "image_token_offset": _IMAGES,
    "image_token_id": _IMAGES,
    "vision_config": _IMAGES,
    "audio_config": _IMAGES,
}


def check_keys(reader: ConfigReader, harmless: frozenset[str]) -> tuple[str, ...]:
    """Notes a problem for every key that changes the computation and that the family did not read.

    Returns the keys that nobody knows, in order. Keys that are null count as absent.
    """
    unknown = []
    known = reader.understood | harmless | HARMLESS | PreTrainedConfig().to_dict().keys()
    known |= GenerationConfig().to_dict().keys()
    for key, value in reader.values.items():
        change = CHANGES.get(key)
        if value is None or key in reader.understood:
            continue
        if change is not None and value not in change.harmless:
            reader.refuse(key, change.reason, wrap=change.wrap)
        elif change is None and key not in known:
            unknown.append(key)
    return tuple(sorted(unknown))
