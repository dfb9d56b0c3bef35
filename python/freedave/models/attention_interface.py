"""The attention of transformers models: bidirectional, and over drafts where a forward has them.

transformers calls the attention that a model is switched to by name, with the keyword arguments of the forward. So a model's
own code stays as it is, and what its layers attend to is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from freedave.forward.window_attention import WindowAttention, attend_windows

NAME = "freedave"
# Called as `freedave.forward.attention.attend` is, without its first argument.
DraftAttention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


def bidirectional_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    draft_attention: DraftAttention | None = None,
    window_attention: WindowAttention | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention that is causal only where it is told to be (transformers' attention interface).

    `window_attention` or `draft_attention`, where a forward brings one along, else `attention_mask` decides (bool, broadcast
    to `[K, H, L, T]`; None: everything is visible, where the interface's own choice would be causal). `query [K, H, L, D]`,
    `key` and `value [K, G, T, D]` with H a multiple of G; returns `[K, L, H, D]`.
    """
    # Under autocast, rotary embeddings turn queries and keys into float32. torch's attention casts them back; here we do.
    if window_attention is not None:
        query, key = query.to(value.dtype), key.to(value.dtype)
        return attend_windows(module, query, key, value, scaling, window_attention), None
    if draft_attention is not None:
        layer: Any = module.layer_idx
        query, key = query.to(value.dtype), key.to(value.dtype)
        return draft_attention(layer, query, key, value, scaling), None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, bidirectional_attention)


def check_attention(model: torch.nn.Module) -> None:
    """Raises ValueError if a transformers model's configuration asks for attention that is not computed here: in a window
    shorter than its positions, of another kind than softmax over all keys, or with capped scores. Other modules do their own.
    """
    if not isinstance(model, PreTrainedModel):
        return
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window >= getattr(config, "max_position_embeddings", math.inf):
        window = None  # no position is outside it
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention"] if window is None else ["sliding_attention"]
    seen_whole = {"full_attention"} if window is not None else {"full_attention", "sliding_attention"}
    asked = sorted(set(kinds) - seen_whole)
    if asked:
        size = f" (sliding_window {window})" if "sliding_attention" in asked else ""
        raise ValueError(
            f"{type(model).__name__} asks for {', '.join(asked)}{size}, and only full attention is computed"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{type(model).__name__} caps its attention scores (attn_logit_softcapping), which is not computed"
        )


def use_bidirectional_attention(model: torch.nn.Module) -> bool:
    """Switches a transformers model to `bidirectional_attention`; False for other modules, which need explicit masks."""
    if not isinstance(model, PreTrainedModel):
        return False
    model.set_attn_implementation(NAME)
    return True
