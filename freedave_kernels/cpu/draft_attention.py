"""draft_attention by torch's fused attention for CPUs: a row's drafts as a batch over the keys where they are stored.

Softmax attention over the union of two sets of keys is the mean of its attention over each, weighted by the softmax of their
log-sum-exps. So stored keys are read by all drafts and never joined to their windows, but for short ones.
"""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]

# Up to this many stored keys are copied next to each draft's own: a second call and the merge take longer. What decides is
# the row alone, not how many of its drafts are active, so that their results do not depend on that.
JOINED_KEYS = 128

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


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
    batch, drafts, length = query.shape[:3]
    capacity = stored_key.shape[1]
    active = _numbers(num_drafts, batch, drafts)
    lengths = _numbers(window_lengths, batch, length)
    starts = [0] * batch if window_start is None else window_start.tolist()
    slot = list(range(batch)) if slots is None else slots.tolist()
    partly = min(active, default=drafts) < drafts or min(lengths, default=length) < length
    out = torch.zeros(query.shape, dtype=query.dtype) if partly else torch.empty(query.shape, dtype=query.dtype)
    if query.numel() == 0:
        return out
    for row, seen in enumerate(ranges.tolist()):
        taken = slice(active[row]), slice(lengths[row])
        if active[row] == 0 or lengths[row] == 0:
            continue
        first, after = starts[row], starts[row] + lengths[row]
        around = [part for begin, end in seen for part in ((begin, min(end, first)), (max(begin, after), end))]
        clipped = [(max(begin, 0), min(end, capacity)) for begin, end in around]
        stored = [
            (_drafts(stored_key, slot[row], begin, end), _drafts(stored_value, slot[row], begin, end))
            for begin, end in clipped
            if begin < end
        ]
        own = query[row][taken].transpose(1, 2), key[row][taken].transpose(1, 2), value[row][taken].transpose(1, 2)
        out[row][taken] = _attend(*own, stored, block_length, scale).transpose(1, 2)
    return out


def _numbers(tensor: torch.Tensor | None, batch: int, most: int) -> list[int]:
    return [most] * batch if tensor is None else [min(max(number, 0), most) for number in tensor.tolist()]


def _drafts(stored: torch.Tensor, slot: int, begin: int, end: int) -> torch.Tensor:
    """Stored positions of a slot as a batch of one, `[1, G, n, D]`."""
    return stored[slot : slot + 1, begin:end].transpose(1, 2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored: list[Partial],
    block_length: int | None,
    scale: float | None,
) -> torch.Tensor:
    """One row's drafts `[K, H, L, D]` over their own keys `[K, G, L, D]` and the same stored ones.

    Every call is a batch over drafts, so that each one's arithmetic is its own: a matrix product with the queries of all
    drafts as rows rounds differently with their number.
    """
    count = query.shape[0]
    stored = [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in stored]
    num_stored = sum(keys.shape[2] for keys, _ in stored)
    joined = 0 < num_stored <= JOINED_KEYS
    if joined:
        # Positions lie one after the other in memory, whatever the order of dimensions says: copy whole ones.
        key = torch.cat([part[0].transpose(1, 2) for part in [*stored, (key, value)]], dim=1).transpose(1, 2)
        value = torch.cat([part[1].transpose(1, 2) for part in [*stored, (key, value)]], dim=1).transpose(1, 2)
    mask = _additive_mask(query, block_length, num_stored if joined else 0)
    out, sums = _kernel(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if joined or not stored:
        return out
    out = out.float()  # parts are merged in float32 and rounded once
    for keys, values in stored:
        _merge_into((out, sums), _kernel(query, keys, values, 0.0, False, scale=scale))
    return out


def _additive_mask(query: torch.Tensor, block_length: int | None, num_stored: int) -> torch.Tensor | None:
    length = query.shape[2]
    if block_length is None or block_length >= length:
        return None
    block = torch.arange(length) // block_length
    mask = torch.zeros(length, num_stored + length, dtype=query.dtype)
    mask[:, num_stored:].masked_fill_(block[:, None] < block, -torch.inf)
    return mask[None, None]


def _merge_into(first: Partial, second: Partial) -> None:
    """Merges attention over two disjoint sets of keys, in place of the first: outputs `[..., D]`, log-sum-exps `[...]`.

    The weight is worked out in float64, because a float32 exponential may differ in the last bit with a number's place in
    its vector, and with it a draft's result with the number of drafts. (The weight of D numbers is one number, so that each
    row of D is interpolated by a loop of its own.)
    """
    out, sums = first
    weight = (second[1] - sums).double().sigmoid_().float().unsqueeze(-1)
    out.lerp_(second[0].float(), weight)
    sums.copy_(torch.logaddexp(sums.double(), second[1].double()))
