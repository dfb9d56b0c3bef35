"""keep in plain PyTorch: every stored position takes the window's features or its own."""

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
    batch, drafts, length = window_key.shape[1:4]
    row = torch.arange(batch, device=window_key.device)
    slots = row if slots is None else slots.long()
    if 0 in (drafts, length):
        return
    # Of each stored position, the position in the window that goes there.
    source = torch.arange(stored_key.shape[2], device=window_key.device) - start[:, None]
    written = ((source >= 0) & (source < count[:, None]) & (source < length))[None, ..., None, None]
    source = source.clamp(0, length - 1)
    draft = accepted.long().clamp(0, drafts - 1)[:, None]
    for window, stored in ((window_key, stored_key), (window_value, stored_value)):
        stored[:, slots] = torch.where(written, window[:, row[:, None], draft, source], stored[:, slots])
