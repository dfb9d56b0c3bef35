"""The exact key-value cache of block-causal models: a finished block is stored once, from the forward that verified it.

With block-causal attention the keys and values of a block depend on the blocks before it and on its own tokens. The
accepted draft *is* the finished block, so the draft forward has already computed them, and no further forward is spent on
storing (the public implementation spends one a block).
"""

from __future__ import annotations

import torch


class PrefixCache:
    """Keys and values of the committed prefix, shared by all drafts, and of the window of the last forward.

    Passed to a model as `past_key_values`. Prefix buffers `[1, G, capacity, D]` are allocated once a layer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # positions of the prefix
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._window: list[tuple[torch.Tensor, torch.Tensor]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions stored (called by transformers)."""
        return self.length

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the window's keys and values `[K, G, L, D]` of a layer; returns prefix and window, `[K, G, P + L, D]`."""
        if layer_idx == len(self._prefix):
            shape = (1, key.shape[1], self.capacity)
            self._prefix.append((key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])))
            self._window.append((key, value))
        self._window[layer_idx] = (key, value)
        if self.length == 0:
            return key, value
        rows = key.shape[0]
        prefix_key, prefix_value = (x[:, :, : self.length].expand(rows, -1, -1, -1) for x in self._prefix[layer_idx])
        return torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)

    def extend(self, draft: int, count: int) -> None:
        """Moves the first `count` positions of the last forward's window, as row `draft` saw them, to the prefix."""
        if count == 0:
            return
        end = self.length + count
        for layer, (prefix, window) in enumerate(zip(self._prefix, self._window, strict=True)):
            for stored, new in zip(prefix, window, strict=True):
                stored[0, :, self.length : end] = new[draft, :, :count]
            self._window[layer] = (window[0][:, :, count:], window[1][:, :, count:])
        self.length = end
