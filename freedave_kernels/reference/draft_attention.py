"""draft_attention in plain PyTorch: all keys side by side, by their positions, a mask, a softmax, in float64."""

from __future__ import annotations

import torch


def draft_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    ranges: torch.Tensor,
    window_start: torch.Tensor | None,
    slots: torch.Tensor | None = None,
    num_drafts: torch.Tensor | None = None,
    window_lengths: torch.Tensor | None = None,
    block_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    batch, drafts, length, heads, features = query.shape
    place = torch.arange(stored_key.shape[1], device=query.device)
    position = torch.arange(length, device=query.device)
    draft = torch.arange(drafts, device=query.device)

    begin, end = ranges[..., 0, None], ranges[..., 1, None]
    in_window = place.new_zeros(batch, 1) if window_start is None else window_start.long()[:, None]
    in_window = place - in_window  # [B, C], the place in the window of what is stored
    exists = position.expand(batch, -1)
    exists = exists >= 0 if window_lengths is None else exists < window_lengths[:, None]  # [B, L]
    lengths = exists.sum(1, keepdim=True)
    covered = (in_window >= 0) & (in_window < lengths)
    stored = ((begin <= place) & (place < end)).any(1) & ~covered  # [B, C]
    active = draft.expand(batch, -1)
    active = active >= 0 if num_drafts is None else active < num_drafts[:, None]  # [B, K]
    block = position // block_length if block_length is not None else position * 0
    own = exists[:, None] & (block[:, None] >= block)  # [B, L, L]
    order = torch.cat([in_window, position.expand(batch, -1)], dim=1).argsort(dim=1, stable=True)  # [B, C + L]
    visible = torch.cat([stored[:, None].expand(-1, length, -1), own], dim=-1)  # [B, L, C + L]
    visible = visible.gather(2, order[:, None].expand(-1, length, -1))

    def side_by_side(kept: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """[B, K, C + L, G, D], with 0 for what nobody sees: a NaN there would survive a weight of 0."""
        kept = kept if slots is None else kept.index_select(0, slots)
        kept = torch.where(stored[..., None, None], kept, 0)
        window = torch.where(exists[:, None, :, None, None], window, 0)
        joined = torch.cat([kept[:, None].expand(-1, drafts, -1, -1, -1), window], dim=2)
        return joined.take_along_dim(order[:, None, :, None, None], dim=2).double()

    groups = key.shape[3]
    grouped = query.double().unflatten(3, (groups, heads // groups))
    scores = torch.einsum("bklghd,bktgd->bkghlt", grouped, side_by_side(stored_key, key))
    scores = scores * (features**-0.5 if scale is None else scale)
    weights = torch.where(visible[:, None, None, None], scores, -torch.inf).softmax(-1)
    out = torch.einsum("bkghlt,bktgd->bklghd", weights, side_by_side(stored_value, value)).flatten(3, 4)
    live = active[:, :, None] & exists[:, None]  # [B, K, L]
    return torch.where(live[..., None, None], out, 0).to(query.dtype).contiguous()
