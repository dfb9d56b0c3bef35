"""select_transfer in plain PyTorch."""

from __future__ import annotations

import torch

from freedave_kernels.reference.rank_positions import block_of, rank_positions, rankable


def select_transfer(
    confidence: torch.Tensor,
    mask_index: torch.Tensor,
    num_transfer: int,
    num_transfer_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    strict: bool,
    fallback: str,
    order: str,
    block_length: int | None,
) -> torch.Tensor:
    masked = mask_index & in_current_block(mask_index, block_length)
    eligible = rankable(confidence, masked)
    count = torch.tensor(num_transfer) if num_transfer_per_row is None else num_transfer_per_row[..., None]
    top = eligible & (rank_positions(confidence, masked, order, None) < count.to(confidence.device))
    if threshold_per_row is not None:
        limit = threshold_per_row[..., None]
    elif threshold is not None:
        limit = torch.tensor(threshold, dtype=torch.float32, device=confidence.device)
    else:
        return top

    passing = eligible & (confidence > limit if strict else confidence >= limit)
    if order == "left_to_right":
        passing = passing & ((masked & ~passing).cumsum(-1) == 0)  # the leading run

    if fallback == "top_always":
        return passing | top
    needed = torch.ones_like(count) if fallback == "top" else count
    enough = passing.sum(-1, keepdim=True) >= needed.to(confidence.device)
    return torch.where(enough, passing, top)


def in_current_block(mask_index: torch.Tensor, block_length: int | None) -> torch.Tensor:
    """`[*, L]`: positions of each row's current block, the lowest one with a masked position."""
    length = mask_index.shape[-1]
    if length == 0:
        return mask_index
    block = block_of(length, block_length, mask_index.device)
    return block == torch.where(mask_index, block, length).amin(-1, keepdim=True)
