"""build_drafts in plain PyTorch: number each position with the draft that fills it."""

from __future__ import annotations

import torch

from freedave_kernels.reference.rank_positions import block_of, predicted_confidence, rank_positions, rankable
from freedave_kernels.reference.select_transfer import select_transfer


def build_drafts(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int,
    tokens_per_step_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    order: str,
    block_length: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    masked = input_ids == mask_token_id
    confidence = predicted_confidence(token_ids, confidence, mask_token_id)
    length = input_ids.shape[-1]
    block = block_of(length, block_length, input_ids.device)

    # A masked position that cannot be ranked stalls its block, and so everything after the ranked positions of that block.
    stalled = torch.where(masked & ~rankable(confidence, masked), block, length).amin(-1, keepdim=True)
    fillable = rankable(confidence, masked) & (block <= stalled)

    tokens = tokens_of_each(input_ids, tokens_per_step, tokens_per_step_per_row)
    draft = _draft_of(confidence, fillable, tokens[:, None], order, block, block_length)
    if threshold is not None or threshold_per_row is not None:
        limit = threshold_of_each(confidence, threshold, threshold_per_row)
        first = select_transfer(confidence, masked, 1, tokens, None, limit, rule, "top", order, block_length)
        later = rank_positions(confidence, fillable & ~first, order, block_length)
        draft = torch.where(limit.isnan()[:, None], draft, torch.where(first, 0, 1 + later.long()))
        fillable = fillable & first.any(-1, keepdim=True)

    k = torch.arange(draft_steps, device=input_ids.device)[:, None]
    filled = fillable[:, None] & (draft[:, None] <= k)
    drafts = torch.where(filled, token_ids[:, None], input_ids[:, None])
    num_drafts = torch.where(fillable, draft + 1, 0).amax(-1).clamp(max=draft_steps)
    return drafts, num_drafts.int()


def tokens_of_each(states: torch.Tensor, tokens_per_step: int, each: torch.Tensor | None) -> torch.Tensor:
    """`[B]` int64: how many positions a step unmasks, from 1 to the length of `states [B, *, L]`."""
    tokens = torch.tensor(tokens_per_step, device=states.device) if each is None else each.long()
    return tokens.clamp(1, states.shape[-1]).expand(states.shape[0])


def threshold_of_each(confidence: torch.Tensor, threshold: float | None, each: torch.Tensor | None) -> torch.Tensor:
    """`[B]` float64: each sequence's threshold; NaN: none."""
    number = float("nan") if threshold is None else threshold
    limit = torch.tensor(number, dtype=torch.float64, device=confidence.device) if each is None else each.double()
    return limit.expand(confidence.shape[0])


def _draft_of(
    confidence: torch.Tensor,
    fillable: torch.Tensor,
    tokens_per_step: torch.Tensor,
    order: str,
    block: torch.Tensor,
    block_length: int | None,
) -> torch.Tensor:
    """`[B, L]`: the draft that fills each position, when every draft fills `tokens_per_step [B, 1]` and never crosses a
    block.
    """
    rank = rank_positions(confidence, fillable, order, block_length).long()
    in_block = (block[:, None] == block[None, :]) & fillable[:, None, :]  # [B, L, L]
    before = (block[:, None] > block[None, :]) & fillable[:, None, :]
    rank_in_block = rank - before.sum(-1)

    # Each block's first position carries the block's number of drafts, so that a sum over lower blocks counts it once.
    first_of_block = block != torch.cat([block.new_full((1,), -1), block[:-1]])
    drafts_of_block = (in_block.sum(-1) + tokens_per_step - 1) // tokens_per_step * first_of_block
    drafts_before = ((block[:, None] > block[None, :]) * drafts_of_block[:, None, :]).sum(-1)
    return drafts_before + rank_in_block // tokens_per_step
