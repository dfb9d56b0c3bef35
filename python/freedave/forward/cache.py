"""The key-value cache: one buffer a layer, allocated once, in which every sequence has a slot.

Keys and values of the committed prefix (and, with `cache="dual"`, of the suffix) stand there once, whatever the number of
drafts that attend to them. They come from a forward that had to run anyway: with block-causal attention the accepted draft
*is* the finished block, so its keys and values are copied from the forward that verified it; with full attention they come
from the forward that refreshes a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Write:
    """`count` tokens of a forward, from `begin` on, are stored from position `at` of a slot on."""

    begin: int
    count: int
    slot: int
    at: int


class KeyValueCache:
    """Keys and values `[slots, capacity, G, D]` a layer, and those of the last forward for as long as they may be kept.

    `retain` says what a forward leaves behind for `keep`; the buffers are allocated by the first forward, which knows the
    heads. A slot is not cleared for its next sequence: whoever reads says which positions.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self._stored: list[Pair] = []
        self._last: list[Pair] = []

    @property
    def bytes(self) -> int:
        """Size of the buffers of all layers."""
        return sum(tensor.nbytes for pair in self._stored for tensor in pair)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, writes: list[Write], retain: int) -> None:
        """Takes a layer's new keys and values `[1, G, T, D]`: stores what `writes` says, retains tokens from `retain` on."""
        if layer == len(self._stored):
            # Zeros, as memory may hold NaN, which no mask hides: 0 * NaN is NaN.
            stored = (tensor.new_zeros(self.slots, self.capacity, *tensor.shape[1::2]) for tensor in (key, value))
            self._stored.append((next(stored), next(stored)))
            self._last.append((key[:, :, :0], value[:, :, :0]))
        for write in writes:
            for buffer, new in zip(self._stored[layer], (key, value), strict=True):
                tokens = new[0, :, write.begin : write.begin + write.count].transpose(0, 1)
                buffer[write.slot, write.at : write.at + write.count] = tokens
        if retain:  # copied, as a view would keep the memory of all tokens
            key, value = key[:, :, retain:].clone(), value[:, :, retain:].clone()
        self._last[layer] = key, value

    def read(self, layer: int, slot: int, begin: int, end: int) -> Pair:
        """Keys and values `[1, G, end - begin, D]` of a slot: views of the buffers."""
        return self._read(self._stored[layer][0], slot, begin, end), self._read(
            self._stored[layer][1], slot, begin, end
        )

    def _read(self, buffer: torch.Tensor, slot: int, begin: int, end: int) -> torch.Tensor:
        _, _, groups, features = buffer.shape
        token = groups * features
        shape, strides = (1, groups, end - begin, features), (token, features, token, 1)
        return buffer.as_strided(shape, strides, (slot * self.capacity + begin) * token)

    def all(self, layer: int) -> Pair:
        """Keys and values `[1, G, slots * capacity, D]` of all slots."""
        key, value = self._stored[layer]
        return key.flatten(0, 1)[None].transpose(1, 2), value.flatten(0, 1)[None].transpose(1, 2)

    def keep(self, tokens: torch.Tensor, places: torch.Tensor) -> None:
        """Stores retained tokens of the last forward `[N]` at `places [N]`: slot * capacity + position."""
        for stored, last in zip(self._stored, self._last, strict=True):
            for buffer, new in zip(stored, last, strict=True):
                buffer.flatten(0, 1).index_copy_(0, places, new[0].index_select(1, tokens).transpose(0, 1))
