"""Attention of a packed forward: stored keys once for all drafts, each draft's own window, merged by log-sum-exp.

For a run of tokens, softmax attention over the union of two sets of keys is the mean of its attention over each, weighted by
the softmax of their log-sum-exps. So the prefix is read where it is stored, by all drafts, and never joined to their
windows; and no mask of [tokens, prefix + tokens] is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from freedave.forward.packed_forward import PackedForward, Runs, Window

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
    """Attention of a layer of a packed forward: `query [1, H, T, D]`, `key` and `value [1, G, T, D]`; `[1, T, H, D]`.

    Bitwise, in float32 on a CPU, a run's result does not depend on what else is packed: every kernel call is batched
    over runs, and merging treats each row of features alike. Tokens beyond those of the forward, which fill it up, attend to
    nothing and are not stored.
    """
    length, filled = forward.input_ids.shape[1], query.shape[2]
    if filled > length:
        out = attend(forward, layer, query[:, :, :length], key[:, :, :length], value[:, :, :length], scaling)
        return F.pad(out, (0, 0, 0, 0, 0, filled - length))
    if forward.cache is not None:
        forward.cache.store(layer, key, value, forward.writes, forward.retain)
    parts = [_attend_window(forward, layer, window, query, key, value, scaling) for window in forward.windows]
    contexts = [context for context in forward.contexts if not context.joined]
    whole = len(parts) == 1 and all(context.covers(forward.windows[0]) for context in contexts)
    # Runs that share one window and one context are merged as they come from the kernel, others token by token.
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

    Outputs `[..., D]` and log-sum-exps `[...]`; with `last`, the first's log-sum-exp is left as it is. The weight is worked
    out in float64, because a float32 exponential may differ in the last bit with a number's place in its vector, and with
    it a draft's result with the number of drafts. (The weight of D numbers is one number, so that each row of D is
    interpolated by a loop of its own.)
    """
    out, sums = first
    weight = (second[1] - sums).double().sigmoid_().to(out.dtype).unsqueeze(-1)
    out.lerp_(second[0], weight)
    if not last:
        sums.copy_(torch.logaddexp(sums.double(), second[1].double()))


def _runs(tensor: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Runs of a forward's `[1, H, T, D]` as `[count, H, length, D]`: one view, as small forwards are bound by such calls."""
    if runs.count == 1 and runs.length == tensor.shape[2]:
        return tensor
    _, head, token, feature = tensor.stride()
    shape = (runs.count, tensor.shape[1], runs.length, tensor.shape[3])
    strides = (runs.length * token, head, token, feature)
    return tensor.as_strided(shape, strides, tensor.storage_offset() + runs.begin * token)


def _by_token(parts: list[Partial]) -> Partial:
    """Runs one after the other: `[N, H, L, D]` and `[N, H, L]` of each part as `[T, H, D]` and `[T, H]`."""
    outs = [out.transpose(1, 2).flatten(0, 1) for out, _ in parts]
    sums = [sums.transpose(1, 2).flatten(0, 1) for _, sums in parts]
    return (outs[0], sums[0]) if len(parts) == 1 else (torch.cat(outs), torch.cat(sums))


def _attend_window(
    forward: PackedForward,
    layer: int,
    window: Window,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> Partial:
    keys, values = _window_keys(window, key), _window_keys(window, value)
    context = window.context
    if context is not None and context.joined:
        assert forward.cache is not None
        stored = [forward.cache.read(layer, context.slot, begin, end) for begin, end in context.ranges]
        keys = _joined([part[0] for part in stored], keys)
        values = _joined([part[1] for part in stored], values)
    mask = None
    if window.block_length is not None and window.block_length < window.length:
        mask = _additive_mask(forward, window.length, window.block_length, query)
    return attention_with_log_sum_exp(_runs(query, window), keys, values, scaling, mask)


def _window_keys(window: Window, tensor: torch.Tensor) -> torch.Tensor:
    """What each run of a window attends to, of keys or values `[1, G, T, D]`: `[count, G, n, D]`."""
    if window.keys is None:
        return _runs(tensor, window)
    # Tokens lie one after the other in memory, whatever the order of dimensions says: copy whole ones.
    tokens = tensor[0].transpose(0, 1).index_select(0, window.keys)
    return tokens.unflatten(0, (window.count, -1)).transpose(1, 2)


def _joined(stored: list[torch.Tensor], own: torch.Tensor) -> torch.Tensor:
    """Stored keys or values `[1, G, n, D]` before each run's own `[count, G, m, D]`, copied token by token."""
    count = own.shape[0]
    parts = [part.transpose(1, 2) if count == 1 else part.transpose(1, 2).expand(count, -1, -1, -1) for part in stored]
    return torch.cat([*parts, own.transpose(1, 2)], dim=1).transpose(1, 2)


def _attend_stored(queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> Partial:
    """Runs `[N, H, L, D]` over the same stored keys `[1, G, n, D]`.

    On a CPU they are a batch (of views), so that each one's arithmetic is its own: a matrix product with the queries of all
    runs as rows rounds differently with their number (measured with 4 tokens a run and 128 features). Elsewhere all queries
    go over the keys at once.
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
    their type. This is the place for a fused kernel of another device: on a CPU it is torch's, elsewhere the two are computed
    from the scores.
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
