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
    rule: str,
    fallback: str,
    order: str,
    block_length: int | None,
) -> torch.Tensor:
    masked = mask_index & in_current_block(mask_index, block_length)
    eligible = rankable(confidence, masked)
    count = torch.tensor(num_transfer) if num_transfer_per_row is None else num_transfer_per_row[..., None]
    top = eligible & (rank_positions(confidence, masked, order, None) < count.to(confidence.device))
    if threshold_per_row is not None:
        limit = threshold_per_row[..., None].double()
    elif threshold is not None:
        limit = torch.tensor(threshold, dtype=torch.float64, device=confidence.device)
    else:
        return top

    passing = passing_positions(confidence, masked, limit, rule, order)
    if fallback == "top_always":
        return passing | top
    needed = torch.ones_like(count) if fallback == "top" else count
    enough = passing.sum(-1, keepdim=True) >= needed.to(confidence.device)
    return torch.where(enough, passing, top)


def passing_positions(
    confidence: torch.Tensor, masked: torch.Tensor, limit: torch.Tensor, rule: str, order: str
) -> torch.Tensor:
    """`[*, L]`: which masked positions, all of one block, pass the threshold `limit [*, 1]`, a float64."""
    eligible = rankable(confidence, masked)
    length = confidence.shape[-1]
    if length == 0:
        return eligible
    rank = rank_positions(confidence, masked, order, None).long()
    if rule == "threshold":
        passes = confidence.double() >= limit
    elif rule == "strict":
        passes = confidence.double() > limit
    elif rule == "factor":
        passes = torch.where(rank == 0, limit == limit, confidence.double() >= 1 - limit / (rank + 2))
    else:
        entropy = torch.where(eligible, -confidence.double().clamp(max=0), 0.0)
        place = rank.clamp(max=length - 1)
        in_order = torch.zeros_like(entropy).scatter_add(-1, place, entropy)
        passes = in_order.cumsum(-1).gather(-1, place) < limit

    first_failing = torch.where(eligible & ~passes, rank, length).amin(-1, keepdim=True)
    passing = eligible & (rank < first_failing)
    if order == "left_to_right":  # a position that cannot be ranked ends the run
        passing = passing & ((masked & ~passing).cumsum(-1) == 0)
    if rule == "factor":
        left = (masked & ~passing).sum(-1, keepdim=True)
        passing = torch.where((left == 1) & passing.any(-1, keepdim=True), eligible, passing)
    return passing


def in_current_block(mask_index: torch.Tensor, block_length: int | None) -> torch.Tensor:
    """`[*, L]`: positions of each row's current block, the lowest one with a masked position."""
    length = mask_index.shape[-1]
    if length == 0:
        return mask_index
    block = block_of(length, block_length, mask_index.device)
    return block == torch.where(mask_index, block, length).amin(-1, keepdim=True)
