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
    heads. A slot's content is never cleared: who reads says up to where.
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

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor, writes: list[Write], retain: slice) -> None:
        """Takes a layer's new keys and values `[1, G, T, D]`: stores what `writes` says and retains some for `keep`."""
        new = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if layer == len(self._stored):
            shape = (self.slots, self.capacity)
            self._stored.append(
                (new[0].new_empty(*shape, *new[0].shape[1:]), new[1].new_empty(*shape, *new[1].shape[1:]))
            )
            self._last.append((new[0][:0], new[1][:0]))
        for write in writes:
            for stored, tokens in zip(self._stored[layer], new, strict=True):
                stored[write.slot, write.at : write.at + write.count] = tokens[write.begin : write.begin + write.count]
        keys, values = (tokens[retain] for tokens in new)
        if keys.shape[0] < key.shape[2]:  # a view would keep the rest alive
            keys, values = keys.clone(), values.clone()
        self._last[layer] = (keys, values)

    def read(self, layer: int, slot: int, begin: int, end: int) -> Pair:
        """Keys and values `[1, G, end - begin, D]` of a slot: views of the buffers."""
        key, value = self._stored[layer]
        return key[slot : slot + 1, begin:end].transpose(1, 2), value[slot : slot + 1, begin:end].transpose(1, 2)

    def all(self, layer: int) -> Pair:
        """Keys and values `[1, G, slots * capacity, D]` of all slots."""
        key, value = self._stored[layer]
        return key.flatten(0, 1)[None].transpose(1, 2), value.flatten(0, 1)[None].transpose(1, 2)

    def keep(self, tokens: torch.Tensor, places: torch.Tensor) -> None:
        """Stores retained tokens of the last forward `[N]` at `places [N]`: slot * capacity + position."""
        for stored, last in zip(self._stored, self._last, strict=True):
            for buffer, new in zip(stored, last, strict=True):
                buffer.flatten(0, 1).index_copy_(0, places, new.index_select(0, tokens))
