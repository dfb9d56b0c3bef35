"""Attention of a forward over the windows of drafts, by `draft_attention`: what the layers of a transformers model call.

The tensors that all layers share are passed as a keyword argument of the forward (`WindowAttention`); those of one layer
are an attribute of its attention module (`LayerBuffers`) while the forward runs. So all layers run the same code on other
tensors, and torch.compile compiles it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from freedave_kernels import draft_attention

_ATTRIBUTE = "freedave_buffers"


class WindowAttention(NamedTuple):
    """What the rows of a forward attend to: R sequences, K drafts each, F positions a draft.

    `ranges [R, 2, 2]` int32 of stored positions, `window_start [R]`: where the F positions begin, `slots [R]` int64 (None:
    row r is slot r), `num_drafts [R]`, `window_lengths [R]`: how many of the F positions exist; `block_length`: None where a
    window sees all of itself.
    """

    drafts: int
    ranges: torch.Tensor
    window_start: torch.Tensor
    slots: torch.Tensor | None
    num_drafts: torch.Tensor
    window_lengths: torch.Tensor
    block_length: int | None


class LayerBuffers(NamedTuple):
    """A layer's keys and values: `stored_* [S, C, G, D]` of all slots, `window_* [R, K, F, G, D]` of this forward."""

    stored_key: torch.Tensor
    stored_value: torch.Tensor
    window_key: torch.Tensor
    window_value: torch.Tensor


def attend_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    attention: WindowAttention,
) -> torch.Tensor:
    """`query [R K, H, F, D]`, `key` and `value [R K, G, F, D]` of a layer; returns `[R K, F, H, D]`, leaves the keys and
    values in the layer's buffers.
    """
    buffers: LayerBuffers = getattr(module, _ATTRIBUTE)
    query, key, value = (part.transpose(1, 2).unflatten(0, (-1, attention.drafts)) for part in (query, key, value))
    buffers.window_key.copy_(key)
    buffers.window_value.copy_(value)
    out = draft_attention(
        query,
        buffers.window_key,
        buffers.window_value,
        buffers.stored_key,
        buffers.stored_value,
        attention.ranges,
        window_start=attention.window_start,
        slots=attention.slots,
        num_drafts=attention.num_drafts,
        window_lengths=attention.window_lengths,
        block_length=attention.block_length,
        scale=scaling,
    )
    return out.flatten(0, 1)


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The attention modules of a transformers model, in the order of its layers."""
    found = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
    return sorted(found, key=lambda module: int(getattr(module, "layer_idx", 0)))


@contextmanager
def layer_buffers(
    modules: list[torch.nn.Module], stored: list[torch.Tensor], window: list[torch.Tensor]
) -> Iterator[None]:
    """Lends each attention module its part of `stored` and `window`, keys and values `[N, ...]` of all layers each."""
    for layer, module in enumerate(modules):
        setattr(module, _ATTRIBUTE, LayerBuffers(*(part[layer] for part in (*stored, *window))))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, _ATTRIBUTE)
