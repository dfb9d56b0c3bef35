"""draft_attention: attention of all drafts of all sequences, for one layer of a model."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import MAX_RANGES
from freedave_kernels.dispatch import dispatched

OP = "draft_attention"


def draft_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    ranges: torch.Tensor,
    *,
    window_start: torch.Tensor | None,
    slots: torch.Tensor | None = None,
    num_drafts: torch.Tensor | None = None,
    window_lengths: torch.Tensor | None = None,
    block_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Each draft's window attends to its sequence's stored positions and to itself.

    Args:
        query: `[B, K, L, H, D]` float16, bfloat16 or float32.
        key, value: `[B, K, L, G, D]`, the own window of each draft; H is a multiple of G.
        stored_key, stored_value: `[S, C, G, D]`. Of these five the last dimension is contiguous, all other strides are free.
        ranges: `[B, R, 2]` int32, R at most 2: the stored positions that a row sees, from begin to before end. They are
            disjoint and ascend; empty ones are allowed.
        window_start: `[B]` int32 or int64, not negative, below 2**30 - L: the position of the window's first token, counted
            as stored ones are. None: 0, where ranges is `[B, 0, 2]`. Stored positions that the window covers are not seen,
            the window's own keys stand there.
        slots: `[B]` int64 or int32, the slot that each row reads; None: row b reads slot b, and S is B.
        num_drafts: `[B]` int32 or int64, how many drafts of a row are active; None: all. Others cost next to nothing.
        window_lengths: `[B]` int32 or int64, how many of the L positions exist; None: all. Others are not seen.
        block_length: the window is causal by blocks of this length from its position 0 on: every block sees itself and
            earlier ones. None: every position sees the whole window.
        scale: of the scores, positive; None: 1 / sqrt(D).

    Returns:
        `[B, K, L, H, D]` contiguous, in the type of `query`; 0 for inactive drafts and for positions that do not exist.

    Guarantees: sums in float32. A row's bits depend on its query and on the keys and values that it sees, by their absolute
    position; not on which of them are stored and which are in the window, where the window starts, K, L, B, S, C,
    `num_drafts`, the other rows or the index of its draft. (The backend "cpu" does not promise this of the window's place
    and of L: torch's kernel multiplies stored and own keys in calls of their own, whose sizes decide how it rounds, and
    joining them for every draft would copy what it shares.) What lies in stored positions outside the ranges, in other
    drafts and beyond the window is not seen, a NaN neither. No host synchronisation on a GPU.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.
    """
    per_row = (window_start, slots, num_drafts, window_lengths)
    return _call(query, key, value, stored_key, stored_value, ranges, *per_row, block_length, scale)


def check(
    query: Any,
    key: Any,
    value: Any,
    stored_key: Any,
    stored_value: Any,
    ranges: Any,
    window_start: Any,
    slots: Any,
    num_drafts: Any,
    window_lengths: Any,
    block_length: Any,
    scale: Any,
) -> None:
    arguments.expect_tensor(OP, "query", query, arguments.FLOAT_DTYPES)
    arguments.expect_dims(OP, "query", query, "B, K, L, H, D")
    features = {"key": key, "value": value, "stored_key": stored_key, "stored_value": stored_value}
    for name, tensor in features.items():
        arguments.expect_tensor(OP, name, tensor, [query.dtype])
    batch, drafts, length, heads, size = query.shape
    arguments.expect_dims(OP, "key", key, "B, K, L, G, D")
    groups = key.shape[3]
    arguments.expect_shape(OP, "key", key, (batch, drafts, length, groups, size), "query's, with G heads")
    if groups == 0 or heads % groups:
        raise ValueError(f"{OP}: the heads of query must be a multiple of those of key, got {heads} and {groups}")
    arguments.expect_shape(OP, "value", value, key.shape, "like key")
    arguments.expect_dims(OP, "stored_key", stored_key, "S, C, G, D")
    arguments.expect_shape(OP, "stored_key", stored_key, (*stored_key.shape[:2], groups, size), "S, C, and G, D of key")
    arguments.expect_shape(OP, "stored_value", stored_value, stored_key.shape, "like stored_key")
    for name, tensor in {"query": query, **features}.items():
        if tensor.stride(-1) != 1 and size > 1:
            raise ValueError(
                f"{OP}: the last dimension of {name} must be contiguous, got strides {tuple(tensor.stride())}"
            )
    arguments.expect_tensor(OP, "ranges", ranges, [torch.int32])
    arguments.expect_dims(OP, "ranges", ranges, "B, R, 2")
    arguments.expect_shape(OP, "ranges", ranges, (batch, ranges.shape[1], 2), "B of query, R, 2")
    if ranges.shape[1] > MAX_RANGES:
        raise ValueError(f"{OP}: ranges must be at most {MAX_RANGES} a row, got {ranges.shape[1]}")
    if window_start is None and ranges.shape[1] > 0:
        raise ValueError(f"{OP}: window_start must be given where there are ranges, got None")
    if slots is None and stored_key.shape[0] != batch:
        raise ValueError(
            f"{OP}: stored_key must have one slot for each of {batch} rows where slots is None, got {stored_key.shape[0]}"
        )
    per_row = {"window_start": window_start, "slots": slots}
    per_row |= {"num_drafts": num_drafts, "window_lengths": window_lengths}
    for name, tensor in per_row.items():
        if tensor is not None:
            arguments.expect_tensor(OP, name, tensor, arguments.INTEGER_DTYPES)
            arguments.expect_shape(OP, name, tensor, (batch,), "B of query")
    arguments.expect_same_device(OP, query, "query", **features, ranges=ranges, **per_row)
    if block_length is not None:
        arguments.expect_int(OP, "block_length", block_length, minimum=1)
    if scale is not None:
        arguments.expect_positive(OP, "scale", scale)


def fake(
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
    return query.new_empty(query.shape)


_call = dispatched(OP, check, fake)
