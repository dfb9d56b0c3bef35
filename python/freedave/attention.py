"""Attention of a packed forward: stored keys once for all drafts, each draft's own window, merged by log-sum-exp.

For a run of tokens, softmax attention over the union of two sets of keys is the mean of its attention over each, weighted by
the softmax of their log-sum-exps. So the prefix is read where it is stored, by all drafts, and never joined to their
windows; and no mask of [tokens, prefix + tokens] is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from freedave.packed_forward import Context, PackedForward, Window

NAME = "freedave"
Partial = tuple[torch.Tensor, torch.Tensor]


def bidirectional_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_forward: PackedForward | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention that is causal only where it is told to be (transformers' attention interface).

    With `packed_forward`, that of a packed forward; else `attention_mask` decides (bool, broadcast to `[K, H, L, T]`; None:
    everything is visible, where the interface's own choice would be causal). `query [K, H, L, D]`, `key` and `value
    [K, G, T, D]` with H a multiple of G; returns `[K, L, H, D]`.
    """
    if packed_forward is not None:
        layer: Any = module.layer_idx
        return attend(packed_forward, layer, query, key, value, scaling), None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, bidirectional_attention)


def use_bidirectional_attention(model: torch.nn.Module) -> bool:
    """Switches a transformers model to `bidirectional_attention`; False for other modules, which need explicit masks."""
    if not isinstance(model, PreTrainedModel):
        return False
    model.set_attn_implementation(NAME)
    return True


def attend(
    forward: PackedForward,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention of a layer of a packed forward: `query [1, H, T, D]`, `key` and `value [1, G, T, D]`; `[1, T, H, D]`.

    Bitwise, in float32 on a CPU, a run's result does not depend on what else is packed: every call below is batched over
    runs, and merging uses exactly rounded operations only.
    """
    forward.attended = True
    if forward.cache is not None:
        forward.cache.store(layer, key, value, forward.writes, forward.retain)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    parts = [_attend_window(forward, window, queries, keys, values, scaling) for window in forward.windows]
    if len(parts) == 1:
        out, sums = parts[0]
    else:
        out, sums = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    for context in forward.contexts:
        assert forward.cache is not None
        tokens = slice(context.begin, context.end)
        for begin, end in context.ranges:
            stored = forward.cache.read(layer, context.slot, begin, end)
            merge_into(
                (out[tokens], sums[tokens]),
                _attend_context(context, queries[tokens], *stored, scaling),
                last=(begin, end) == context.ranges[-1],
            )
    return out[None]


def merge_into(first: Partial, second: Partial, *, last: bool) -> None:
    """Merges attention over two disjoint sets of keys, in place of the first.

    `[N, H, D]` outputs and `[N, H]` log-sum-exps; with `last`, the first log-sum-exp is left as it is. The weight is worked
    out in float64, because a float32 exponential may differ in the last bit with a number's place in its vector, and with
    it a draft's result with the number of drafts.
    """
    out, sums = first
    weight = (second[1] - sums).double().sigmoid_().float()[..., None].to(out.dtype)
    out.mul_(1 - weight).add_(second[0].mul_(weight))
    if not last:
        sums.copy_(torch.logaddexp(sums.double(), second[1].double()))


def _attend_window(
    forward: PackedForward,
    window: Window,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
) -> Partial:
    tokens = slice(window.begin, window.end)
    if window.keys is None:
        keys, values = keys[tokens], values[tokens]
    else:
        keys, values = keys.index_select(0, window.keys), values.index_select(0, window.keys)
    mask = None
    if window.block_length is not None and window.block_length < window.length:
        mask = _additive_mask(forward, window.length, window.block_length, queries)
    return _by_token(
        attention_with_log_sum_exp(
            *(tensor.unflatten(0, (window.count, -1)).transpose(1, 2) for tensor in (queries[tokens], keys, values)),
            scaling,
            mask,
        )
    )


def _attend_context(
    context: Context, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> Partial:
    """All runs over the same stored keys `[1, G, n, D]`.

    On a CPU they are a batch (of views), so that each one's arithmetic is its own: a matrix product with the queries of all
    runs as rows may round differently with their number. Elsewhere all queries go over the keys at once.
    """
    if key.device.type == "cpu":
        runs = queries.unflatten(0, (context.count, -1)).transpose(1, 2)
        key, value = (stored.expand(context.count, -1, -1, -1) for stored in (key, value))
    else:
        runs = queries[None].transpose(1, 2)
    return _by_token(attention_with_log_sum_exp(runs, key, value, scaling))


def _by_token(partial: Partial) -> Partial:
    """`[N, H, L, D]` and `[N, H, L]` as `[N L, H, D]` and `[N L, H]`; views, as the CPU kernel lays them out."""
    return partial[0].transpose(1, 2).flatten(0, 1), partial[1].transpose(1, 2).flatten(0, 1)


def attention_with_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    additive_mask: torch.Tensor | None = None,
) -> Partial:
    """Attention and the log-sum-exp of its scores: `[N, H, L, D]` in the inputs' type and `[N, H, L]` float32.

    `query [N, H, L, D]`, `key` and `value [N, G, T, D]` with H a multiple of G. This is the place for a fused kernel of
    another device: on a CPU it is torch's, elsewhere the two are computed from the scores.
    """
    if query.device.type == "cpu":
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=additive_mask, scale=scaling
        )
        return out, sums
    return attention_from_scores(query, key, value, scaling, additive_mask)


def attention_from_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    additive_mask: torch.Tensor | None = None,
) -> Partial:
    """`attention_with_log_sum_exp` for any device, with the scores in memory."""
    heads, groups = query.shape[1], key.shape[1]
    grouped = query.unflatten(1, (groups, heads // groups))
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).float() * (scaling or query.shape[-1] ** -0.5)
    if additive_mask is not None:
        scores = scores + additive_mask
    sums = scores.logsumexp(-1)
    out = (scores - sums[..., None]).exp().to(value.dtype) @ value.unsqueeze(2)
    return out.flatten(1, 2), sums.flatten(1, 2)


def block_causal_mask(length: int, block_length: int, device: torch.device) -> torch.Tensor | None:
    """Which positions each of `length` positions sees: those of its own block and of earlier ones.

    Blocks are aligned at position 0. Returns `[1, 1, length, length]` bool, or None where everything is visible.
    """
    if length <= block_length:
        return None
    block = torch.arange(length, device=device) // block_length
    return (block[:, None] >= block)[None, None]


def _additive_mask(forward: PackedForward, length: int, block_length: int, like: torch.Tensor) -> torch.Tensor:
    """The block-causal mask as numbers to add; made once a forward, not once a layer."""
    mask = forward.masks.get((length, block_length))
    if mask is None:
        visible = block_causal_mask(length, block_length, like.device)
        assert visible is not None
        mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))
        forward.masks[length, block_length] = mask
    return mask
