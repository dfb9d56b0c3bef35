"""A forward of each published architecture in plain PyTorch, written from what its configuration means.

In float64, one sequence, one token at a time where that reads better; nothing is shared with transformers. The weights
are the tensors under their published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- parts of a forward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turns(
    theta: float, rotated: int, scaling: dict[str, Any] | None = None, positions: int = 0
) -> tuple[Tensor, float]:
    """(by how much each pair of `rotated` features turns from one position to the next, what it is multiplied with).

    Scaling, where there is some: "linear" turns everything slower by `factor`; "yarn" only the pairs that turn less than
    once (`beta_slow`) within the original number of positions, none that turn 32 times (`beta_fast`), and in between, by the
    pairs' numbers, in part; its scores grow by (0.1 ln factor + 1)^2. "llama3" is the same by how often a pair turns.
    """
    pair = torch.arange(rotated // 2, dtype=torch.float64)
    angle = theta ** (-2 * pair / rotated)
    if scaling is None:
        return angle, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return angle / factor, 1.0
    length = scaling.get("original_max_position_embeddings", positions)

    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((length * angle / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return angle * kept + angle / factor * (1 - kept), 1.0

    def pair_that_turns(times: float) -> float:
        return rotated * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), rotated - 1)
    slowed = ((pair - first) / (last - first)).clamp(0, 1)
    return angle * (1 - slowed) + angle / factor * slowed, 0.1 * math.log(factor) + 1


def rotate(
    x: Tensor, theta: float, rotated: int | None = None, scaling: dict[str, Any] | None = None, positions: int = 0
) -> Tensor:
    """Rotary embedding of `x [T, H, D]`: dimensions i and i + rotated/2 turn by t theta^(-2i/rotated); the rest stay."""
    rotated = x.shape[-1] if rotated is None else rotated
    half = rotated // 2
    each, size = turns(theta, rotated, scaling, positions)
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None] * each
    cos, sin = angle.cos() * size, angle.sin() * size
    first, second, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    turned = (first * cos - second * sin, second * cos + first * sin)
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


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def dense(config: dict[str, Any], w: dict[str, Tensor], layer: int, h: Tensor) -> Tensor:
    prefix = f"model.layers.{layer}.mlp."
    gate = linear(w, prefix + "gate_proj", h)
    return linear(w, prefix + "down_proj", gate * gate.sigmoid() * linear(w, prefix + "up_proj", h))


def forward_qwen(
    config: dict[str, Any],
    w: dict[str, Tensor],
    ids: Tensor,
    visible: Tensor,
    normalise: bool,
    feed_forward: Callable[[dict[str, Any], dict[str, Tensor], int, Tensor], Tensor] = dense,
) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    scaling, positions = config["rope_scaling"], config["max_position_embeddings"]
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        projected = []
        for name, count in (("q", heads), ("k", groups), ("v", groups)):
            part = linear(w, f"{prefix}self_attn.{name}_proj", h).unflatten(1, (count, -1))
            if normalise and name != "v":
                part = rms_norm(part, w[f"{prefix}self_attn.{name}_norm.weight"], eps)
            projected.append(part if name == "v" else rotate(part, theta, None, scaling, positions))
        x = x + linear(w, prefix + "self_attn.o_proj", attend(*projected, visible))
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        x = x + feed_forward(config, w, layer, h)
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def forward_dream(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, everything(len(ids)), normalise=False)


def forward_fast_dllm(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, own_block_and_earlier(len(ids), config["bd_size"]), normalise=False)


def forward_sdar(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, own_block_and_earlier(len(ids), config["block_size"]), normalise=True)


def forward_stable_diffcoder(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, own_block_and_earlier(len(ids), config["block_size"]), normalise=False)


def softmax_mixture(config: dict[str, Any], w: dict[str, Tensor], layer: int, h: Tensor) -> Tensor:
    """Token by token: the experts that one softmax over all prefers, weighed by it, or by their share of the chosen ones."""
    if layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
        return dense(config, w, layer, h)
    prefix, answers = f"model.layers.{layer}.mlp.", []
    for token in h:
        scores = (w[prefix + "gate.weight"] @ token).exp()
        scores = scores / scores.sum()
        chosen = scores.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
        whole = scores[chosen].sum() if config["norm_topk_prob"] else 1
        parts = [[w[f"{prefix}experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")] for e in chosen]
        answers.append(sum(scores[e] / whole * gated(token, *part) for e, part in zip(chosen, parts, strict=True)))
    return torch.stack(answers)


def forward_sdar_moe(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    visible = own_block_and_earlier(len(ids), config["block_size"])
    return forward_qwen(config, w, ids, visible, normalise=True, feed_forward=softmax_mixture)


def forward_llada_moe(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    return forward_qwen(config, w, ids, everything(len(ids)), normalise=True, feed_forward=softmax_mixture)


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
    rotary = theta, rotated, config["rope_scaling"], config["max_position_embeddings"]
    x = w["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        joint = h @ w[prefix + "attention.query_key_value.weight"].T
        joint = joint + w.get(prefix + "attention.query_key_value.bias", 0)
        query, key, value = joint.unflatten(1, (-1, dim)).split([heads, groups, groups], dim=1)
        query = rotate(rms_norm(query, w[prefix + "attention.query_layernorm.weight"], eps), *rotary)
        key = rotate(rms_norm(key, w[prefix + "attention.key_layernorm.weight"], eps), *rotary)
        visible = own_block_and_earlier(len(ids), config["block_size"])
        x = x + attend(query, key, value, visible) @ w[prefix + "attention.dense.weight"].T
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + gated(h, *(w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        else:
            x = x + torch.stack([mixture(config, w, prefix + "mlp.", token) for token in h])
    head = w["model.word_embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T
