"""The attention of a draft forward: what each position may see, and the call that computes it.

Drafts are the batch rows of one forward. A row sees the committed prefix and its own draft, never another draft, so a
draft's result does not depend on its neighbours; on CPU it is bit-identical to a forward of that draft alone.
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
    multiple of G, mask `[1, 1, L, T]` bool or None; returns `[K, L, H, D]`.
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


def block_causal_mask(start: int, end: int, block_length: int, device: torch.device) -> torch.Tensor | None:
    """Which positions below `end` each of the positions `start ... end - 1` sees: its own block and earlier ones.

    Blocks are aligned at position 0. Returns `[1, 1, end - start, end]` bool, or None where everything is visible.
    """
    if start // block_length == (end - 1) // block_length:
        return None
    block = torch.arange(end, device=device) // block_length
    return (block[start:, None] >= block)[None, None]
