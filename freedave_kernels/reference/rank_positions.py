"""rank_positions in plain PyTorch: stable sorts, the least significant key first."""

from __future__ import annotations

import torch


def rank_positions(
    confidence: torch.Tensor, mask_index: torch.Tensor, order: str, block_length: int | None
) -> torch.Tensor:
    length = confidence.shape[-1]
    ranked = rankable(confidence, mask_index)
    position = torch.arange(length, device=confidence.device)

    key = torch.where(ranked, confidence, float("-inf"))
    if order == "left_to_right":
        key = torch.zeros_like(confidence)
    by_confidence = key.sort(dim=-1, descending=True, stable=True).indices

    block = block_of(length, block_length, confidence.device)
    block = torch.where(ranked, block, length)  # positions that are not ranked come after every block
    by_block = block.gather(-1, by_confidence).sort(dim=-1, stable=True).indices
    ordered = by_confidence.gather(-1, by_block)  # ordered[r] is the position of rank r

    rank = torch.empty_like(ordered).scatter(-1, ordered, position.expand_as(ordered))
    return torch.where(ranked, rank, length).int()


def predicted_confidence(token_ids: torch.Tensor, confidence: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Where the mask itself is predicted, nothing is: a step never fills a position with the mask."""
    return torch.where(token_ids == mask_token_id, float("-inf"), confidence)


def rankable(confidence: torch.Tensor, mask_index: torch.Tensor) -> torch.Tensor:
    """Masked positions that can be ranked: a NaN compares false, as does -inf."""
    return mask_index & (confidence > float("-inf"))


def block_of(length: int, block_length: int | None, device: torch.device) -> torch.Tensor:
    """`[L]`: the block of each position."""
    return torch.arange(length, device=device) // (block_length or max(length, 1))
