"""verify_drafts in plain PyTorch: one vectorised hop along the chain at a time."""

from __future__ import annotations

import torch


def verify_drafts(
    drafts: torch.Tensor, targets: torch.Tensor, num_drafts: torch.Tensor | None, match: str, mask_token_id: int | None
) -> torch.Tensor:
    accepted, _ = accept_chain(drafts, targets, num_drafts, match, mask_token_id)
    return accepted


def accept_chain(
    drafts: torch.Tensor, targets: torch.Tensor, num_drafts: torch.Tensor | None, match: str, mask_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`accepted [B]`, and `hop [B, K]`: after how many hops the chain stands at each draft (K where it never does)."""
    batch, count, _ = drafts.shape
    index = torch.arange(count, device=drafts.device)
    active = torch.full((batch, 1), count, device=drafts.device) if num_drafts is None else num_drafts[:, None]

    accepted = torch.zeros(batch, dtype=torch.int64, device=drafts.device)
    hop = torch.where(index == 0, 0, count).repeat(batch, 1)
    for hops in range(1, count):
        target = targets[torch.arange(batch, device=drafts.device), accepted]
        same = drafts == target[:, None]
        if match == "subset":
            same = same | (drafts == mask_token_id)
        reachable = same.all(-1) & (index > accepted[:, None]) & (index < active)
        furthest = torch.where(reachable, index, -1).amax(-1)
        moved = furthest > accepted
        accepted = torch.where(moved, furthest, accepted)
        hop = torch.where((index == accepted[:, None]) & moved[:, None], hops, hop)
    return accepted, hop
