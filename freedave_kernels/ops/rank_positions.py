"""rank_positions: the order in which masked positions will be unmasked."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.dispatch import dispatched

OP = "rank_positions"


def rank_positions(
    confidence: torch.Tensor,
    mask_index: torch.Tensor,
    *,
    order: str = "confidence",
    block_length: int | None = None,
) -> torch.Tensor:
    """Ranks the masked positions of each row; rank 0 is the position to unmask next.

    Args:
        confidence: `[*, L]` float32.
        mask_index: `[*, L]` bool, True where a position is masked.
        order: "confidence", or "left_to_right" to ignore it.
        block_length: positions of a lower block (`position // block_length`) come first. None: one block.

    Returns:
        `rank [*, L]` int32: a permutation of 0, 1, ... over the ranked positions; L for a position that is not masked, and
        for one whose confidence is -inf or NaN, which is never ranked.

    Guarantees: lower block first, then higher confidence, then the lower position. One ranking gives every nested draft:
    draft k unmasks `rank < tokens_per_step * (k + 1)`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.
    """
    return _call(confidence, mask_index, order, block_length)


def check(confidence: Any, mask_index: Any, order: Any, block_length: Any) -> None:
    arguments.expect_tensor(OP, "confidence", confidence, [torch.float32], min_dims=1)
    arguments.expect_tensor(OP, "mask_index", mask_index, [torch.bool])
    arguments.expect_shape(OP, "mask_index", mask_index, confidence.shape, "like confidence")
    arguments.expect_order(OP, order, block_length)
    arguments.expect_same_device(OP, confidence, "confidence", mask_index=mask_index)


def fake(
    confidence: torch.Tensor, mask_index: torch.Tensor, order: str = "confidence", block_length: int | None = None
) -> torch.Tensor:
    return confidence.new_empty(confidence.shape, dtype=torch.int32)


_call = dispatched(OP, check, fake, window=lambda confidence, *_: (confidence.shape[-1], 0))
