"""What a sequence's draws follow from: 64 bits of its own for their noise, and a temperature."""

from __future__ import annotations

import struct

import torch

from freedave_kernels.reference.sampling import philox


def sequence_key(seed: int, index: int) -> int:
    """Of the `index`-th sequence with a seed, as kernels take it: an int64.

    Numbers that differ in one bit give keys that have nothing to do with each other, so that seeds may be counted up.
    """
    counter = [torch.tensor(word) for word in (index, 0, 0, 1)]
    low, high, _, _ = philox(counter, [torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)])
    key = int(low) | int(high) << 32
    return key - 2**64 if key >= 2**63 else key


def bits_of(temperature: float) -> int:
    """Those of the float32, with which it goes to the device among integers."""
    return int(struct.unpack("i", struct.pack("f", temperature))[0])


def temperatures_of(bits: torch.Tensor) -> torch.Tensor:
    """Float32 `[N]`, of `bits_of` each in int64 `[N]`: a view, so no work for a device."""
    return bits.view(torch.float32)[::2]  # the lower half comes first in memory
