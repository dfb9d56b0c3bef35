"""What the noise of a sequence follows from, where tokens are drawn: 64 bits of its own."""

from __future__ import annotations

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
