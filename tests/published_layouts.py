"""Tiny random checkpoints in the layouts that the families are published in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference_forwards import (
    forward_dream,
    forward_fast_dllm,
    forward_llada,
    forward_llada2,
    forward_llada_moe,
    forward_sdar,
    forward_sdar_moe,
    forward_stable_diffcoder,
)
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, MASK, EOS = 96, 90, 89

LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": VOCABULARY,
    "eos_token_id": EOS,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 256,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": EOS,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "weight_tying": False,
    # Nothing of what follows shows in the logits, but published files say it.
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "embedding_dropout": 0.0,
    "flash_attention": True,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "transformers_version": "4.51.2",
    "use_cache": False,
}

QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
    "transformers_version": "4.52.4",
    "use_cache": False,
}

DREAM: dict[str, Any] = QWEN | {
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "model_type": "Dream",
    "pad_token_id": EOS,
    "use_mrope": False,
}

SDAR: dict[str, Any] = QWEN | {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "model_type": "sdar",
    "attention_bias": False,
    "block_size": 4,
    "head_dim": 16,
    # Nothing of what follows shows in the logits, but published files say it.
    "attn_implementation": "flex_attention",
    "debug": False,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "micro_forward": False,
    "skip_checkpoint": False,
    "use_deepep": False,
}

SDAR_MOE: dict[str, Any] = SDAR | {
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
    "model_type": "sdar_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    # Nothing of what follows shows in the logits, but published files say it.
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

FAST_DLLM: dict[str, Any] = QWEN | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "model_type": "Fast_dLLM_Qwen",
    "bd_size": 8,
    "layer_types": ["full_attention", "full_attention"],
}

LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "model_type": "llada2_moe",
    "block_size": 8,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 2,
    "pad_token_id": EOS,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
    # Nothing of what follows shows in the logits, but published files say it.
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "initializer_range": 0.02,
    "max_window_layers": 20,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "sliding_window": 4096,
    "transformers_version": "4.57.1",
    "use_cache": False,
    "use_qk_norm": True,
}

LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "model_type": "llada",
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 48,
    "eos_token_id": EOS,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "hidden_size": 32,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": EOS,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    # Nothing of what follows shows in the logits, but published files say it.
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "norm_topk_prob": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "transformers_version": "4.53.2",
    "use_cache": False,
}

STABLE_DIFFCODER: dict[str, Any] = {
    "architectures": ["StableDiffcoderForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "model_type": "llama",
    "attention_bias": False,
    "block_size": 4,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    # Nothing of what follows shows in the logits, but published files say it.
    "attention_dropout": 0.0,
    "initializer_range": 0.009882118,
    "transformers_version": "4.46.2",
    "use_cache": True,
}

Shapes = dict[str, tuple[int, ...]]


def shapes_llada(c: dict[str, Any]) -> Shapes:
    width, inner = c["d_model"], c["mlp_hidden_size"]
    keys = width // c["n_heads"] * (c["n_kv_heads"] or c["n_heads"])
    block = {"attn_norm": (width,), "q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width)}
    block |= {"attn_out": (width, width), "ff_norm": (width,)}
    block |= {"ff_proj": (inner, width), "up_proj": (inner, width), "ff_out": (width, inner)}
    top = {"wte": (c["embedding_size"], width), "ln_f": (width,)}
    top |= {} if c["weight_tying"] else {"ff_out": (c["embedding_size"], width)}
    shapes = {f"model.transformer.{name}.weight": shape for name, shape in top.items()}
    for layer in range(c["n_layers"]):
        shapes |= {f"model.transformer.blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def feed_forward(prefix: str, width: int, inner: int) -> Shapes:
    gate_up = {f"{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return gate_up | {f"{prefix}down_proj.weight": (width, inner)}


def shapes_qwen(c: dict[str, Any], *, bias: bool, normalise: bool) -> Shapes:
    width, heads, groups = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim = c.get("head_dim") or width // heads
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
    shapes |= {} if c["tie_word_embeddings"] else {"lm_head.weight": (c["vocab_size"], width)}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (width,), prefix + "post_attention_layernorm.weight": (width,)}
        for name, rows in (("q", heads * dim), ("k", groups * dim), ("v", groups * dim)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, width)
            if bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
            if normalise and name != "v":
                shapes[f"{prefix}self_attn.{name}_norm.weight"] = (dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (width, heads * dim)
        shapes |= feed_forward(prefix + "mlp.", width, c["intermediate_size"])
    return shapes


def shapes_stable_diffcoder(c: dict[str, Any]) -> Shapes:
    shapes = shapes_qwen(c, bias=c["attention_bias"], normalise=False)
    biased = {
        "o_proj": c["attention_bias"],
        "gate_proj": c["mlp_bias"],
        "up_proj": c["mlp_bias"],
        "down_proj": c["mlp_bias"],
    }
    for name, shape in list(shapes.items()):
        if biased.get(name.split(".")[-2]):
            shapes[name.replace("weight", "bias")] = shape[:1]
    return shapes


def shapes_sdar_moe(c: dict[str, Any]) -> Shapes:
    width, shapes = c["hidden_size"], shapes_qwen(c, bias=c["attention_bias"], normalise=True)
    for layer in range(c["num_hidden_layers"]):
        if layer in c["mlp_only_layers"] or (layer + 1) % c["decoder_sparse_step"]:
            continue
        prefix = f"model.layers.{layer}.mlp."
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
        shapes[prefix + "gate.weight"] = (c["num_experts"], width)
        for expert in range(c["num_experts"]):
            shapes |= feed_forward(f"{prefix}experts.{expert}.", width, c["moe_intermediate_size"])
    return shapes


def as_sdar_moe(c: dict[str, Any]) -> dict[str, Any]:
    """The configuration of LLaDA-MoE under the names of SDAR-MoE's."""
    dense = [layer for layer, each in enumerate(c["moe_layer_freq"]) if not each]
    names = {"mlp_only_layers": dense, "decoder_sparse_step": 1, "moe_intermediate_size": c["expert_intermediate_size"]}
    return c | names | {"intermediate_size": c["dense_intermediate_size"], "norm_topk_prob": False}


def shapes_llada2(c: dict[str, Any]) -> Shapes:
    width, heads, groups, dim = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    inner = c["moe_intermediate_size"]
    shapes: Shapes = {"model.word_embeddings.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
    shapes |= {} if c["tie_word_embeddings"] else {"lm_head.weight": (c["vocab_size"], width)}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (width,), prefix + "post_attention_layernorm.weight": (width,)}
        shapes[prefix + "attention.query_key_value.weight"] = ((heads + 2 * groups) * dim, width)
        if c["use_qkv_bias"]:
            shapes[prefix + "attention.query_key_value.bias"] = ((heads + 2 * groups) * dim,)
        shapes |= {prefix + f"attention.{name}_layernorm.weight": (dim,) for name in ("query", "key")}
        shapes[prefix + "attention.dense.weight"] = (width, heads * dim)
        if layer < c["first_k_dense_replace"]:
            shapes |= feed_forward(prefix + "mlp.", width, c["intermediate_size"])
            continue
        shapes |= {prefix + "mlp.gate.weight": (c["num_experts"], width)}
        shapes |= {prefix + "mlp.gate.expert_bias": (c["num_experts"],)}
        shapes |= feed_forward(prefix + "mlp.shared_experts.", width, inner * c["num_shared_experts"])
        for expert in range(c["num_experts"]):
            shapes |= feed_forward(f"{prefix}mlp.experts.{expert}.", width, inner)
    return shapes


@dataclass(frozen=True)
class Published:
    """A family as published: a tiny configuration, the shapes of its tensors, and what a forward computes."""

    config: dict[str, Any]
    shapes: Callable[[dict[str, Any]], Shapes]
    forward: Callable[[dict[str, Any], dict[str, Tensor], Tensor], Tensor]
    tying: str = "tie_word_embeddings"


PUBLISHED = {
    "llada": Published(LLADA, shapes_llada, forward_llada, tying="weight_tying"),
    "dream": Published(DREAM, lambda c: shapes_qwen(c, bias=True, normalise=False), forward_dream),
    "sdar": Published(SDAR, lambda c: shapes_qwen(c, bias=False, normalise=True), forward_sdar),
    "sdar_moe": Published(SDAR_MOE, shapes_sdar_moe, forward_sdar_moe),
    "stable_diffcoder": Published(STABLE_DIFFCODER, shapes_stable_diffcoder, forward_stable_diffcoder),
    "fast_dllm": Published(FAST_DLLM, lambda c: shapes_qwen(c, bias=True, normalise=False), forward_fast_dllm),
    "llada_moe": Published(
        LLADA_MOE,
        lambda c: shapes_sdar_moe(as_sdar_moe(c)),
        lambda c, w, ids: forward_llada_moe(as_sdar_moe(c), w, ids),
    ),
    "llada2": Published(LLADA2, shapes_llada2, forward_llada2),
}


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a size that lets every part of the model show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            tensors[name] = 1 + 0.3 * noise
        elif len(shape) == 1:  # biases
            tensors[name] = 0.3 * noise
        else:
            tensors[name] = noise * (0.3 if "embed" in name or "wte" in name else 1.5 / shape[1] ** 0.5)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A folder as a publisher uploads it: config.json and one safetensors file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    for shard, file in enumerate(files):
        save_file({name: tensors[name].clone() for name in names[shard::shards]}, folder / file, {"format": "pt"})
    if shards > 1:
        index = {name: files[position % shards] for position, name in enumerate(names)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        metadata = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(metadata))
    return folder


def write_published(
    folder: Path, family: str, shards: int = 1, **changes: Any
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """(the folder, its configuration, its tensors) of a tiny checkpoint; `changes` to the configuration, `...` removes."""
    published = PUBLISHED[family]
    config = {key: value for key, value in (published.config | changes).items() if value is not ...}
    tensors = random_tensors(published.shapes(published.config | {k: v for k, v in changes.items() if v is not ...}))
    return write_checkpoint(folder, config, tensors, shards), config, tensors


def write_code_tokenizer(folder: Path) -> None:
    """Dream's tokenizer as it is published: vocab.json and merges.txt, for a class that is code in the checkpoint."""
    # Byte-level BPE writes a space as U+0120.
    pieces = ["a", "b", "c", "Ġ", "ab", "Ġc", "u", "s", "e", "r", ":", "<", "|", "m", "k", ">"]
    pieces += [f"filler{index}" for index in range(EOS - len(pieces))]  # added tokens come right after the vocabulary
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ c\n")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(EOS): "<|endoftext|>", str(MASK): "<|mask|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {index: {"content": content} | special for index, content in added.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('executed')")
