"""Tiny random checkpoints in the layouts that the families are published in, and a forward of each in plain PyTorch.

The forwards are written from the published configurations' meaning, in float64, one sequence, one token where that reads
better; they share nothing with transformers. Their weights are the tensors under the published names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, MASK, EOS = 96, 90, 89

# ---------------------------------------------------------------------------------------------------- parts of a forward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float, rotated: int | None = None) -> Tensor:
    """Rotary embedding of `x [T, H, D]`: dimensions i and i + rotated/2 turn by t theta^(-2i/rotated); the rest stay."""
    rotated = x.shape[-1] if rotated is None else rotated
    half = rotated // 2
    position = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None]
    angle = position * theta ** (-2 * torch.arange(half, dtype=x.dtype) / rotated)
    first, second, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat((*turned, rest), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """`query [T, H, D]`, `key` and `value [T, G, D]`; head h uses group h // (H / G). Returns `[T, H D]`."""
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    activated = x @ gate.T
    return (activated * activated.sigmoid() * (x @ up.T)) @ down.T


def everything(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def own_block_and_earlier(length: int, block: int) -> Tensor:
    index = torch.arange(length) // block
    return index[:, None] >= index[None, :]


# ------------------------------------------------------------------------------------------------------------- forwards


def forward_llada(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    heads, groups = config["n_heads"], config["n_kv_heads"] or config["n_heads"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    x = w["model.transformer.wte.weight"][ids]
    for layer in range(config["n_layers"]):
        block = {name.split(".")[-2]: w[name] for name in w if f".blocks.{layer}." in name}
        h = rms_norm(x, block["attn_norm"], eps)
        query = rotate((h @ block["q_proj"].T).unflatten(1, (heads, -1)), theta)
        key = rotate((h @ block["k_proj"].T).unflatten(1, (groups, -1)), theta)
        value = (h @ block["v_proj"].T).unflatten(1, (groups, -1))
        x = x + attend(query, key, value, everything(len(ids))) @ block["attn_out"].T
        x = x + gated(rms_norm(x, block["ff_norm"], eps), block["ff_proj"], block["up_proj"], block["ff_out"])
    head = "wte" if config["weight_tying"] else "ff_out"
    return rms_norm(x, w["model.transformer.ln_f.weight"], eps) @ w[f"model.transformer.{head}.weight"].T


def forward_qwen(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor, visible: Tensor, normalise: bool) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        projected = []
        for name, count in (("q", heads), ("k", groups), ("v", groups)):
            bias = w.get(f"{prefix}self_attn.{name}_proj.bias", 0)
            part = (h @ w[f"{prefix}self_attn.{name}_proj.weight"].T + bias).unflatten(1, (count, -1))
            if normalise and name != "v":
                part = rms_norm(part, w[f"{prefix}self_attn.{name}_norm.weight"], eps)
            projected.append(part if name == "v" else rotate(part, theta))
        x = x + attend(*projected, visible) @ w[prefix + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        x = x + gated(h, *(w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def forward_dream(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, everything(len(ids)), normalise=False)


def forward_sdar(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, own_block_and_earlier(len(ids), config["block_size"]), normalise=True)


def mixture(config: dict[str, Any], w: dict[str, Tensor], prefix: str, token: Tensor) -> Tensor:
    """The experts' answer for one token `[hidden]`.

    The bias takes part in the choice and not in the weights; groups compete with the sum of their two best.
    """
    groups = config["n_group"]
    scores = (w[prefix + "gate.weight"] @ token).sigmoid()
    wish = (scores + w[prefix + "gate.expert_bias"]).unflatten(0, (groups, -1))
    best_groups = wish.sort(dim=1, descending=True).values[:, :2].sum(1).argsort(descending=True)
    closed = [group for group in range(groups) if group not in best_groups[: config["topk_group"]].tolist()]
    wish[closed] = -torch.inf
    chosen = wish.flatten().argsort(descending=True)[: config["num_experts_per_tok"]]
    weights = scores[chosen]
    if len(chosen) > 1:
        weights = weights / weights.sum()
    answer = gated(token, *(w[f"{prefix}shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
    for expert, weight in zip(chosen.tolist(), weights * config["routed_scaling_factor"], strict=True):
        answer = answer + weight * gated(
            token, *(w[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        )
    return answer


def forward_llada2(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, theta, rotated = config["rms_norm_eps"], config["rope_theta"], int(dim * config["partial_rotary_factor"])
    x = w["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        joint = h @ w[prefix + "attention.query_key_value.weight"].T
        joint = joint + w.get(prefix + "attention.query_key_value.bias", 0)
        query, key, value = joint.unflatten(1, (-1, dim)).split([heads, groups, groups], dim=1)
        query = rotate(rms_norm(query, w[prefix + "attention.query_layernorm.weight"], eps), theta, rotated)
        key = rotate(rms_norm(key, w[prefix + "attention.key_layernorm.weight"], eps), theta, rotated)
        visible = own_block_and_earlier(len(ids), 32 if "block_size" not in config else config["block_size"])
        x = x + attend(query, key, value, visible) @ w[prefix + "attention.dense.weight"].T
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + gated(h, *(w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        else:
            x = x + torch.stack([mixture(config, w, prefix + "mlp.", token) for token in h])
    head = w["model.word_embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


# ---------------------------------------------------------------------------------------- configurations and tensors

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
    dim = c.get("head_dim", width // heads)
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
