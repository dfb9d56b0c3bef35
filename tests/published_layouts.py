"""Tiny random checkpoints in the layouts that the families are published in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published_configs import (
    DREAM,
    EOS,
    FAST_DLLM,
    LLADA,
    LLADA2,
    LLADA_MOE,
    MASK,
    SDAR,
    SDAR_MOE,
    STABLE_DIFFCODER,
)
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
