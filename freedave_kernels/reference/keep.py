"""keep in plain PyTorch: every stored position of every slot takes a window's features or its own."""

from __future__ import annotations

import torch


def keep(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    device, (batch, drafts, length) = window_key.device, window_key.shape[1:4]
    num_slots, capacity = stored_key.shape[1:3]
    if 0 in (batch, drafts, length, num_slots):
        return
    there = (count > 0) & (accepted >= 0) & (accepted < drafts)
    # Of each slot, the row that writes to it.
    slots = torch.arange(batch, device=device) if slots is None else slots
    writes = there & (slots == torch.arange(num_slots, device=device)[:, None])
    row = writes.int().argmax(1)
    # Of each of its positions, the position in the window that goes there.
    source = torch.arange(capacity, device=device) - start[row, None].long()
    written = writes.any(1)[:, None] & (source >= 0) & (source < count[row, None].clamp(max=length))
    source, draft = source.clamp(0, length - 1), accepted[row, None].long().clamp(0, drafts - 1)
    for window, stored in ((window_key, stored_key), (window_value, stored_value)):
        kept = window[:, row[:, None], draft, source]
        stored.copy_(torch.where(written[None, ..., None, None], kept, stored))
