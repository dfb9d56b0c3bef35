"""keep on a CPU: one copy a row, of all layers."""

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
    length, capacity = window_key.shape[3], stored_key.shape[2]
    slot = list(range(len(accepted))) if slots is None else slots.tolist()
    rows = zip(accepted.tolist(), start.tolist(), count.tolist(), slot, strict=True)
    for row, (draft, first, number, place) in enumerate(rows):
        begin, end = max(first, 0), min(first + min(number, length), capacity)
        if begin < end:
            stored_key[:, place, begin:end] = window_key[:, row, draft, begin - first : end - first]
            stored_value[:, place, begin:end] = window_value[:, row, draft, begin - first : end - first]
