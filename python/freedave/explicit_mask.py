"""A packed forward for modules that do their own attention: everything stored and everything new, under one dense mask.

transformers models attend as `attention.py` says. Any other module is called with a 4-D mask and a cache object, as
transformers causal language models are; this costs the full [tokens, stored + tokens] attention. It is also the plain form
that the tests compare the other one with.
"""

from __future__ import annotations

import torch

from freedave.attention import block_causal_mask
from freedave.cache import Pair
from freedave.packed_forward import PackedForward


class ExplicitKeyValues:
    """Passed to a module as `past_key_values`: stores a layer's new keys and values, returns all that the mask covers."""

    def __init__(self, forward: PackedForward) -> None:
        self._forward = forward

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys before the new ones (asked by transformers)."""
        return _stored(self._forward)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        forward = self._forward
        assert forward.cache is not None
        forward.cache.store(layer_idx, key, value, forward.writes, forward.retain)
        if not forward.contexts:
            return key, value
        keys, values = forward.cache.all(layer_idx)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


def dense_mask(forward: PackedForward) -> torch.Tensor:
    """Which keys each token sees: `[1, 1, T, stored + T]` bool; stored keys are those of all slots, in order.

    A rectangle of drafts that see themselves alone is `[1, 1, L, L]`, for the batch rows that they are.
    """
    if forward.is_rectangle:
        return _within_run(forward, forward.windows[0].length, forward.windows[0].block_length)
    device = forward.input_ids.device
    tokens, stored = forward.input_ids.shape[1], _stored(forward)
    mask = torch.zeros(tokens, stored + tokens, dtype=torch.bool, device=device)
    for window in forward.windows:
        own = torch.arange(window.begin, window.end, device=device)
        keys = (own if window.keys is None else window.keys).view(window.count, -1)
        within = _within_run(forward, window.length, window.block_length)[0, 0]
        for run, run_keys in zip(own.view(window.count, -1), keys, strict=True):
            mask[run[:, None], stored + run_keys] = within if window.keys is None else torch.ones_like(within[:1, :1])
    for context in forward.contexts:
        assert forward.cache is not None
        first = context.slot * forward.cache.capacity
        for begin, end in context.ranges:
            mask[context.begin : context.end, first + begin : first + end] = True
    return mask[None, None]


def _within_run(forward: PackedForward, length: int, block_length: int | None) -> torch.Tensor:
    device = forward.input_ids.device
    mask = block_causal_mask(length, block_length or length, device)
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if mask is None else mask


def _stored(forward: PackedForward) -> int:
    return forward.cache.slots * forward.cache.capacity if forward.cache is not None and forward.contexts else 0
