"""The exact key-value cache of block-causal models: a finished block is stored once, from the forward that verified it.

With block-causal attention the keys and values of a block depend on the blocks before it and on its own tokens. The
accepted draft *is* the finished block, so the draft forward has already computed them, and no further forward is spent on
storing (the public implementation spends one a block).
"""

from __future__ import annotations

import torch

from freedave.segments import Segments

Pair = tuple[torch.Tensor, torch.Tensor]


class PrefixCache:
    """Keys and values of the committed prefix, shared by all segments, and of the segments of the last forward.

    Passed to a model as `past_key_values`; the prefix buffers `[1, G, capacity, D]` are allocated once a layer. Call
    `prefill` or `attend` before each forward: it says what the keys and values that the model hands over are.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0  # positions of the prefix
        self._capacity = capacity
        self._prefix: list[Pair] = []
        self._segments: list[Pair] = []
        self._prefilling = 0
        self._chain: list[torch.Tensor] = []

    def prefill(self, count: int) -> None:
        """The next forward is one row from position 0; its first `count` positions become the prefix."""
        self._prefilling = count

    def attend(self, segments: Segments, block_length: int, device: torch.device) -> torch.Tensor | None:
        """The next forward's rows are `segments`; its attention mask `[S, 1, 1, prefix + C block_length]`, or None.

        C is the longest chain; shorter ones are padded, and the mask hides the padding.
        """
        self._prefilling = 0
        longest = max(len(chain) for chain in segments.chain)
        padded = torch.tensor([chain + chain[-1:] * (longest - len(chain)) for chain in segments.chain], device=device)
        self._chain = list(padded.unbind(1)) if longest > 1 else []
        if all(len(chain) == longest for chain in segments.chain):
            return None
        lengths = torch.tensor([len(chain) for chain in segments.chain], device=device) * block_length + self.length
        key = torch.arange(self.length + longest * block_length, device=device)
        return (key < lengths[:, None])[:, None, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions stored (asked by transformers)."""
        return self.length

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        """Takes a layer's new keys and values `[S, G, T, D]`; returns those that each row attends to (for transformers)."""
        if layer_idx == len(self._prefix):
            shape = (1, key.shape[1], self._capacity)
            self._prefix.append((key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])))
            self._segments.append((key, value))
        if self._prefilling:
            for stored, new in zip(self._prefix[layer_idx], (key, value), strict=True):
                stored[0, :, : self._prefilling] = new[0, :, : self._prefilling]
            return key, value
        self._segments[layer_idx] = (key, value)
        prefix_key, prefix_value = self._prefix[layer_idx]
        return self._with_context(prefix_key, key), self._with_context(prefix_value, value)

    def _with_context(self, prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        window = [new.index_select(0, segment) for segment in self._chain] or [new]
        if self.length:
            window.insert(0, prefix[:, :, : self.length].expand(new.shape[0], -1, -1, -1))
        return torch.cat(window, dim=2) if len(window) > 1 else new

    def keep(self, segments: list[int]) -> None:
        """Appends these segments of the last forward, in order, to the prefix."""
        for segment in segments:
            for prefix, computed in zip(self._prefix, self._segments, strict=True):
                for stored, new in zip(prefix, computed, strict=True):
                    stored[0, :, self.length : self.length + new.shape[2]] = new[segment]
            self.length += computed[0].shape[2]
