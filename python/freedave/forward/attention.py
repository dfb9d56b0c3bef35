"""Attention of a packed forward. Every run attends to two sets of keys: stored ones, and those of this forward.

Attention over both sets is the mean of the attention over each, weighted by the softmax of their log-sum-exps. So the two are
computed apart and merged: all drafts read the stored prefix where it is, without a copy beside each draft's own keys, and
without a mask of [tokens, prefix + tokens].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from freedave.forward.packed_forward import PackedForward, RunGroup, Runs

Partial = tuple[torch.Tensor, torch.Tensor]

_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend(
    forward: PackedForward,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention of one layer in a packed forward.

    `query [1, H, T, D]`, `key` and `value [1, G, T, D]`; returns `[1, T, H, D]`. T may be larger than the number of tokens of
    the forward: the tokens behind those are padding. They are not stored, and their result is 0.

    In float32 on a CPU, the bits of a run's result do not depend on which other runs are packed. Each kernel call takes the
    runs as a batch, so that no run's arithmetic depends on another's, and the merge treats each row of D numbers alike.
    """
    length, padded = forward.input_ids.shape[1], query.shape[2]
    if padded > length:
        out = attend(forward, layer, query[:, :, :length], key[:, :, :length], value[:, :, :length], scaling)
        return F.pad(out, (0, 0, 0, 0, 0, padded - length))
    if forward.cache is not None:
        forward.cache.store(layer, key, value, forward.writes, forward.retain)
    parts = [_attend_group(forward, layer, group, query, key, value, scaling) for group in forward.groups]
    contexts = [context for context in forward.contexts if not context.joined]
    whole = len(parts) == 1 and all(context.covers(forward.groups[0]) for context in contexts)
    # A single group whose runs all have the same contexts is merged in the kernel's layout. Otherwise the runs of a context
    # are some of the tokens, so all parts are brought into one row of tokens first.
    out, sums = parts[0] if whole else _by_token(parts)
    for context in contexts:
        assert forward.cache is not None
        queries = _runs(query, context)
        tokens = slice(None) if whole else slice(context.begin, context.end)
        for begin, end in context.ranges:
            stored = _attend_stored(queries, *forward.cache.read(layer, context.slot, begin, end), scaling)
            stored = stored if whole else _by_token([stored])
            merge_into((out[tokens], sums[tokens]), stored, last=end == context.ranges[-1][1])
    return (out.transpose(1, 2) if whole else out).reshape(1, query.shape[2], query.shape[1], -1)


def merge_into(first: Partial, second: Partial, *, last: bool) -> None:
    """Merges attention over two disjoint sets of keys, in place of the first.

    Outputs `[..., D]` and log-sum-exps `[...]`. With `last` there is no further set, and the first's log-sum-exp is not
    updated.

    The weight is computed in float64. A float32 exponential can differ in its last bit with a number's place in its vector,
    so that a draft's result would depend on how many drafts there are.
    """
    out, sums = first
    weight = (second[1] - sums).double().sigmoid_().to(out.dtype).unsqueeze(-1)
    out.lerp_(second[0], weight)
    if not last:
        sums.copy_(torch.logaddexp(sums.double(), second[1].double()))


def _runs(tensor: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Runs of a forward's `[1, H, T, D]` as `[count, H, length, D]`: a view, made in one call, as small forwards spend most
    of their time on calls.
    """
    if runs.count == 1 and runs.length == tensor.shape[2]:
        return tensor
    _, head, token, feature = tensor.stride()
    shape = (runs.count, tensor.shape[1], runs.length, tensor.shape[3])
    strides = (runs.length * token, head, token, feature)
    return tensor.as_strided(shape, strides, tensor.storage_offset() + runs.begin * token)


def _by_token(parts: list[Partial]) -> Partial:
    """The tokens of all parts in one row: `[N, H, L, D]` and `[N, H, L]` of each part become `[T, H, D]` and `[T, H]`."""
    outs = [out.transpose(1, 2).flatten(0, 1) for out, _ in parts]
    sums = [sums.transpose(1, 2).flatten(0, 1) for _, sums in parts]
    return (outs[0], sums[0]) if len(parts) == 1 else (torch.cat(outs), torch.cat(sums))


def _attend_group(
    forward: PackedForward,
    layer: int,
    group: RunGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> Partial:
    keys, values = _group_keys(group, key), _group_keys(group, value)
    context = group.context
    if context is not None and context.joined:
        assert forward.cache is not None
        stored = [forward.cache.read(layer, context.slot, begin, end) for begin, end in context.ranges]
        keys = _joined([part[0] for part in stored], keys)
        values = _joined([part[1] for part in stored], values)
    mask = None
    if group.block_length is not None and group.block_length < group.length:
        mask = _additive_mask(forward, group.length, group.block_length, query)
    return attention_with_log_sum_exp(_runs(query, group), keys, values, scaling, mask)


def _group_keys(group: RunGroup, tensor: torch.Tensor) -> torch.Tensor:
    """What each run of a group attends to, of keys or values `[1, G, T, D]`: `[count, G, n, D]`."""
    if group.keys is None:
        return _runs(tensor, group)
    # In memory a token's features are next to each other, though the heads come first in the shape: so whole tokens are
    # copied.
    tokens = tensor[0].transpose(0, 1).index_select(0, group.keys)
    return tokens.unflatten(0, (group.count, -1)).transpose(1, 2)


def _joined(stored: list[torch.Tensor], own: torch.Tensor) -> torch.Tensor:
    """Stored keys or values `[1, G, n, D]` before each run's own `[count, G, m, D]`, copied token by token."""
    count = own.shape[0]
    parts = [part.transpose(1, 2) if count == 1 else part.transpose(1, 2).expand(count, -1, -1, -1) for part in stored]
    return torch.cat([*parts, own.transpose(1, 2)], dim=1).transpose(1, 2)


def _attend_stored(queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> Partial:
    """Runs `[N, H, L, D]` over the same stored keys `[1, G, n, D]`.

    On a CPU the runs are a batch over views of the keys. With the queries of all runs as rows of one matrix product, a row
    would be rounded differently with the number of runs (measured with 4 tokens a run and 128 features). Elsewhere they are
    such rows, and the keys are read once.
    """
    count, heads, length, features = queries.shape
    if key.device.type == "cpu":
        if count > 1:
            key, value = key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)
        return attention_with_log_sum_exp(queries, key, value, scaling)
    joined = queries.transpose(0, 1).reshape(1, heads, count * length, features)
    out, sums = attention_with_log_sum_exp(joined, key, value, scaling)
    return (
        out.view(heads, count, length, features).transpose(0, 1),
        sums.view(heads, count, length).transpose(0, 1),
    )


def attention_with_log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    additive_mask: torch.Tensor | None = None,
) -> Partial:
    """Attention and the log-sum-exp of its scores: `[N, H, L, D]` in the inputs' type and `[N, H, L]` float32.

    `query [N, H, L, D]`, `key` and `value [N, G, T, D]` with H a multiple of G; `additive_mask [1, 1, L, T]` of
    their type. On a CPU torch's fused kernel computes both; elsewhere they are computed from the scores.
    """
    if query.device.type == "cpu":
        out, sums = _cpu_kernel(query, key, value, 0.0, False, attn_mask=additive_mask, scale=scaling)
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
