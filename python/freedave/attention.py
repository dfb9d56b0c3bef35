"""The attention of a draft forward: what each position may see, and the call that computes it.

The batch rows of a forward are drafts, or blocks of drafts. A row sees the committed prefix and its own draft, never
another one, so a draft's result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

NAME = "freedave"


def bidirectional_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention that is causal only where the mask says so (transformers' attention interface).

    The interface's own choice for "no mask" is causal. `query [K, H, L, D]`, `key` and `value [K, G, T, D]` with H a
    multiple of G, mask bool, broadcast to `[K, H, L, T]`, or None; returns `[K, L, H, D]`.
    """
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


def use_bidirectional_attention(model: torch.nn.Module) -> bool:
    """Switches a transformers model to `bidirectional_attention`; False for other modules, which need explicit masks."""
    if not isinstance(model, PreTrainedModel):
        return False
    model.set_attn_implementation(NAME)
    return True


def block_causal_mask(length: int, block_length: int, device: torch.device) -> torch.Tensor | None:
    """Which positions each of `length` positions sees: those of its own block and of earlier ones.

    Blocks are aligned at position 0. Returns `[1, 1, length, length]` bool, or None where everything is visible.
    """
    if length <= block_length:
        return None
    block = torch.arange(length, device=device) // block_length
    return (block[:, None] >= block)[None, None]
