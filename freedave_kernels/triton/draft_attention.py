"""Attention of all drafts: softmax(scale * q k) v over the stored positions of a slot and the own window of each draft.

The queries of a slot that share their keys (all drafts, positions and heads of a group) are rows. A program owns a tile of
rows; it goes over its drafts' windows, then over the stored positions, so these are read once for all drafts and heads of a
tile. Where the rows fill too few programs, other programs attend to parts of the stored positions before, and leave sums to
be merged. Bound by reading keys and values for few rows, by tensor cores for many.

A row's result is the same however that is divided: stored positions are attended to in splits at fixed absolute positions,
each from nothing, and merged in ascending order, whoever did it and whatever else is in the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from freedave_kernels.backends import BackendUnavailableError
from freedave_kernels.triton.attention_parts import (
    NEVER,
    at_most,
    attend_split,
    load_rows,
    merge,
    multiply,
    row_mask,
    rows_of_tile,
    seen_ranges,
    tile_of,
    touches,
    weigh,
)
from freedave_kernels.triton.launch import ceil_div, kernel, power_of_two, short_range

LOG2_E = 1.4426950408889634
MAX_FEATURES = 256
SPLIT = (
    512  # stored positions that are attended to from nothing: few enough to share out, so many that merging is cheap
)
# So many programs fill the machine: then nothing is shared out. A constant, as it decides nothing but speed.
FILLED = 128
SHARED_OUT = 512  # programs that stored positions are shared out to, where rows fill too few


@kernel(aligned=("query", "stored_key", "stored_value", "contexts", "sums"))
def attend_stored(
    query,
    stored_key,
    stored_value,
    ranges,
    slots,
    num_drafts,
    window_lengths,
    contexts,
    sums,
    factor: tl.float32,
    drafts: tl.int32,
    length: tl.int32,
    groups: tl.int32,
    capacity: tl.int32,
    splits: tl.int32,
    query_row: tl.int64,
    query_draft: tl.int64,
    query_position: tl.int64,
    query_head: tl.int64,
    key_slot: tl.int64,
    key_group: tl.int64,
    value_slot: tl.int64,
    value_group: tl.int64,
    ranges_row: tl.int64,
    ranges_range: tl.int64,
    ranges_end: tl.int64,
    slots_step: tl.int64,
    num_drafts_step: tl.int64,
    window_lengths_step: tl.int64,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
    STORED_KEY_STEP: tl.constexpr,
    STORED_VALUE_STEP: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_NUM_DRAFTS: tl.constexpr,
    HAS_WINDOW_LENGTHS: tl.constexpr,
):
    """Sums of a tile of rows over every `num_programs(1)`-th split of the stored positions."""
    index, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    draft, position, head = rows_of_tile(tl.program_id(0), length, HEADS, BLOCK_M)
    count = at_most(num_drafts, index, num_drafts_step, drafts, HAS_NUM_DRAFTS)
    exist = at_most(window_lengths, index, window_lengths_step, length, HAS_WINDOW_LENGTHS)
    live = (draft < count) & (position < exist)
    begin, end, begin_2, end_2 = seen_ranges(ranges, index, ranges_row, ranges_range, ranges_end, capacity, RANGES)
    first = tl.minimum(begin, begin_2) // SPLIT + tl.program_id(1)
    after = (tl.maximum(end, end_2) + SPLIT - 1) // SPLIT
    if (first < after) & (tl.max(live.to(tl.int32), axis=0) > 0):
        slot = tl.load(slots + index.to(tl.int64) * slots_step).to(tl.int64) if HAS_SLOTS else index.to(tl.int64)
        keys = stored_key + (slot * key_slot + group * key_group) * UNIT
        values = stored_value + (slot * value_slot + group * value_group) * UNIT
        start = index * query_row + group * HEADS * query_head
        starts = query + (start + draft * query_draft + position * query_position + head * query_head) * UNIT
        q = load_rows(starts, live, 0.0, D, D_PADDED)
        for split in range(first, after, tl.num_programs(1)):
            if touches(split, begin, end, SPLIT) | touches(split, begin_2, end_2, SPLIT):
                largest, total, context = attend_split(
                    q,
                    split,
                    keys,
                    values,
                    begin,
                    end,
                    begin_2,
                    end_2,
                    factor,
                    D,
                    D_PADDED,
                    BLOCK_M,
                    BLOCK_N,
                    SPLIT,
                    STORED_KEY_STEP,
                    STORED_VALUE_STEP,
                )
                # Whole tiles, of rows that are not live too: a mask would take longer.
                part = (tl.program_id(2).to(tl.int64) * splits + split) * tl.num_programs(0) + tl.program_id(0)
                nth = tl.arange(0, BLOCK_M)
                tl.store(sums + part * 2 * BLOCK_M + nth, largest)
                tl.store(sums + part * 2 * BLOCK_M + BLOCK_M + nth, total)
                places = contexts + part * BLOCK_M * D_PADDED + (nth * D_PADDED)[:, None]
                tl.store(places + tl.arange(0, D_PADDED)[None, :], context)


@kernel(aligned=("query", "key", "value", "stored_key", "stored_value", "contexts", "sums", "out"))
def attend(
    query,
    key,
    value,
    stored_key,
    stored_value,
    ranges,
    slots,
    num_drafts,
    window_lengths,
    contexts,
    sums,
    out,
    factor: tl.float32,
    drafts: tl.int32,
    length: tl.int32,
    groups: tl.int32,
    capacity: tl.int32,
    splits: tl.int32,
    block_length: tl.int32,
    query_row: tl.int64,
    query_draft: tl.int64,
    query_position: tl.int64,
    query_head: tl.int64,
    key_row: tl.int64,
    key_draft: tl.int64,
    key_group: tl.int64,
    value_row: tl.int64,
    value_draft: tl.int64,
    value_group: tl.int64,
    stored_key_slot: tl.int64,
    stored_key_group: tl.int64,
    stored_value_slot: tl.int64,
    stored_value_group: tl.int64,
    ranges_row: tl.int64,
    ranges_range: tl.int64,
    ranges_end: tl.int64,
    slots_step: tl.int64,
    num_drafts_step: tl.int64,
    window_lengths_step: tl.int64,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
    STORED_KEY_STEP: tl.constexpr,
    STORED_VALUE_STEP: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_NUM_DRAFTS: tl.constexpr,
    HAS_WINDOW_LENGTHS: tl.constexpr,
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    SHARED: tl.constexpr,
    ONE_DRAFT: tl.constexpr,
):
    """Rows over their drafts' windows, then the stored positions: `SHARED`, sums that others left; else by itself."""
    index, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    draft, position, head = rows_of_tile(tl.program_id(0), length, HEADS, BLOCK_M)
    count = at_most(num_drafts, index, num_drafts_step, drafts, HAS_NUM_DRAFTS)
    exist = at_most(window_lengths, index, window_lengths_step, length, HAS_WINDOW_LENGTHS)
    live = (draft < count) & (position < exist)
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)

    if tl.max(live.to(tl.int32), axis=0) > 0:
        start = index * query_row + group * HEADS * query_head
        starts = query + (start + draft * query_draft + position * query_position + head * query_head) * UNIT
        q = load_rows(starts, live, 0.0, D, D_PADDED)

        # One loop over the tiles of keys of all drafts in the tile of rows, so that the next draft's are on their way.
        seen = tl.minimum((position // block_length + 1) * block_length, exist)  # of the own window, from position 0 on
        first_draft = tl.min(draft, axis=0)
        drafts_in_tile = tl.minimum(tl.max(draft, axis=0) + 1, count) - first_draft
        farthest = tl.max(tl.where(live, seen, 0), axis=0)
        tiles = (farthest + BLOCK_N - 1) // BLOCK_N
        keys = key + (index * key_row + group * key_group) * UNIT
        values = value + (index * value_row + group * value_group) * UNIT
        for number in range(drafts_in_tile * tiles):
            of_draft = first_draft + number // tiles
            first = number % tiles * BLOCK_N
            place = first + tl.arange(0, BLOCK_N)
            exists = place < farthest
            k_start = tile_of(keys + of_draft * key_draft * UNIT, first, KEY_STEP)
            v_start = tile_of(values + of_draft * value_draft * UNIT, first, VALUE_STEP)
            k = load_rows(k_start + tl.arange(0, BLOCK_N) * KEY_STEP, exists, 0.0, D, D_PADDED)
            v = load_rows(v_start + tl.arange(0, BLOCK_N) * VALUE_STEP, exists, 0.0, D, D_PADDED)
            mine = draft == of_draft
            visible = place[None, :] < tl.where(mine, seen, 0)[:, None]
            scores = tl.where(visible, multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)), NEVER)
            largest, shrink, weights = weigh(scores, largest, factor)
            total = total * shrink + tl.sum(weights, axis=1)
            weighted = multiply(weights.to(v.dtype), v, context * shrink[:, None])
            if ONE_DRAFT:
                context = weighted
            else:  # what is NaN in other drafts' values stays there: it weighs 0, which does not stop a NaN
                context = tl.where(mine[:, None], weighted, context)

        if RANGES > 0:
            begin, end, begin_2, end_2 = seen_ranges(
                ranges, index, ranges_row, ranges_range, ranges_end, capacity, RANGES
            )
            first_split = tl.minimum(begin, begin_2) // SPLIT
            after_split = (tl.maximum(end, end_2) + SPLIT - 1) // SPLIT
            if SHARED:
                for split in tl.range(first_split, after_split, num_stages=2):
                    touched = touches(split, begin, end, SPLIT) | touches(split, begin_2, end_2, SPLIT)
                    part = (tl.program_id(1).to(tl.int64) * splits + split) * tl.num_programs(0) + tl.program_id(0)
                    nth = tl.arange(0, BLOCK_M)
                    written = nth < tl.where(touched, BLOCK_M, 0)
                    largest_2 = tl.load(sums + part * 2 * BLOCK_M + nth, mask=written, other=NEVER)
                    total_2 = tl.load(sums + part * 2 * BLOCK_M + BLOCK_M + nth, mask=written, other=0.0)
                    places = contexts + part * BLOCK_M * D_PADDED + (nth * D_PADDED)[:, None]
                    context_2 = tl.load(places + tl.arange(0, D_PADDED)[None, :], mask=written[:, None], other=0.0)
                    largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)
            else:
                slot = (
                    tl.load(slots + index.to(tl.int64) * slots_step).to(tl.int64) if HAS_SLOTS else index.to(tl.int64)
                )
                keys = stored_key + (slot * stored_key_slot + group * stored_key_group) * UNIT
                values = stored_value + (slot * stored_value_slot + group * stored_value_group) * UNIT
                for split in range(first_split, after_split):
                    if touches(split, begin, end, SPLIT) | touches(split, begin_2, end_2, SPLIT):
                        largest_2, total_2, context_2 = attend_split(
                            q,
                            split,
                            keys,
                            values,
                            begin,
                            end,
                            begin_2,
                            end_2,
                            factor,
                            D,
                            D_PADDED,
                            BLOCK_M,
                            BLOCK_N,
                            SPLIT,
                            STORED_KEY_STEP,
                            STORED_VALUE_STEP,
                        )
                        largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)

    # Worked out anew, by a 0 that the compiler cannot see: what was known of the rows would take registers all the way.
    draft, position, head = rows_of_tile(tl.program_id(0) + tl.minimum(splits, 0), length, HEADS, BLOCK_M)
    live = (draft < count) & (position < exist)
    result = tl.where(live[:, None], context * (1.0 / tl.where(live, total, 1.0))[:, None], 0.0)
    token = (index.to(tl.int64) * drafts + draft) * length + position
    place = token * (groups * HEADS) + group * HEADS + head
    places = (out + place * D)[:, None] + tl.arange(0, D_PADDED)[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=row_mask(draft < drafts, D, D_PADDED))


class Tiles(NamedTuple):
    """How kernels divide their work. It decides a row's bits, so it depends on the type and size of features alone."""

    rows: int
    keys: int
    num_warps: int
    max_registers: tuple[int, int]
    """A thread's, of `attend_stored` and of `attend`: with these nothing is spilled; left alone, a compiler aims lower."""
    num_stages: tuple[int, int]
    """Of the same: tiles of keys and values in shared memory. Few rows are bound by how many bytes are on their way."""


def tiles(dtype: torch.dtype, padded: int) -> Tiles:
    if dtype == torch.float32:  # multiplied without tensor cores, whose operands would be rounded
        return Tiles(16, 32 if padded <= 128 else 16, 8, (128, 128), (2, 2))
    if padded <= 64:
        return Tiles(64, 64, 4, (224, 224), (4, 3))
    return Tiles(64, 32, 4, (224, 255), (4, 3)) if padded == 128 else Tiles(64, 32, 8, (224, 255), (2, 2))


def draft_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    ranges: torch.Tensor,
    slots: torch.Tensor | None = None,
    num_drafts: torch.Tensor | None = None,
    window_lengths: torch.Tensor | None = None,
    block_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    batch, drafts, length, heads, features = query.shape
    if features > MAX_FEATURES:
        raise BackendUnavailableError(
            f"draft_attention: backend 'triton' serves heads of at most {MAX_FEATURES} features, got {features}; use the "
            "backend 'reference' for this call"
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    padded = max(16, power_of_two(features))
    groups, capacity = key.shape[3], stored_key.shape[1]
    chosen = tiles(query.dtype, padded)
    row_tiles = ceil_div(drafts * length * (heads // groups), chosen.rows)
    programs = row_tiles * batch * groups
    splits = ceil_div(capacity, SPLIT)
    seen = ranges.shape[1] if capacity else 0
    shared = seen > 0 and splits > 1 and programs < FILLED
    contexts, sums = out, out
    if shared:
        rows = splits * programs * chosen.rows
        contexts = torch.empty(rows * padded, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows * 2, dtype=torch.float32, device=query.device)

    features_of = (query, key, value, stored_key, stored_value)
    unit = common_unit(features_of)
    # Python's float is float64, whose product is rounded once.
    factor = (features**-0.5 if scale is None else scale) * LOG2_E
    sizes = (factor, drafts, length, groups, capacity, splits)
    limits = (
        ranges if slots is None else slots,
        *(ranges if given is None else given for given in (num_drafts, window_lengths)),
    )
    given = tuple(argument is not None for argument in (slots, num_drafts, window_lengths))
    steps = (*ranges.stride(), *(limit.stride(0) for limit in limits))
    step_of = [tensor.stride(-3) for tensor in features_of[1:]]
    constants = (features, padded, heads // groups, *chosen[:2], SPLIT, unit, *step_of[2:], seen, *given)
    # Addresses that are not aligned occur only where `unit` says so; but some may be, and binaries differ.
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in features_of)
    others = (query.dtype, *(limit.dtype for limit in limits), *aligned, *map(short_range, features_of))
    # Of keys and values: all but that of positions, which is a constant.
    around = [(*strides(tensor, unit)[:-2], strides(tensor, unit)[-1]) for tensor in features_of[1:]]
    if shared:
        parts = min(splits, power_of_two(ceil_div(SHARED_OUT, programs)))
        attend_stored.launch(
            (row_tiles, parts, batch * groups),
            (query, stored_key, stored_value, ranges, *limits, contexts, sums, *sizes,
             *strides(query, unit), *around[2], *around[3], *steps),
            constants, others, chosen.num_warps, chosen.max_registers[0], chosen.num_stages[0],
        )  # fmt: skip
    attend.launch(
        (row_tiles, batch * groups, 1),
        (*features_of, ranges, *limits, contexts, sums, out, *sizes, block_length or length,
         *strides(query, unit), *(stride for tensor in around for stride in tensor), *steps),
        (*constants, *step_of[:2], shared, drafts == 1),
        others, chosen.num_warps, chosen.max_registers[1], chosen.num_stages[1],
    )  # fmt: skip
    return out


def common_unit(tensors: tuple[torch.Tensor, ...]) -> int:
    """The most elements, of 16 bytes at most, of which all addresses of last dimensions are multiples."""
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size > 1:
                bits |= stride * tensor.element_size()
    return (bits & -bits) // tensors[0].element_size()


def strides(tensor: torch.Tensor, unit: int) -> tuple[int, ...]:
    """Of all dimensions but the last, in units. Where nothing is stepped over, they may be anything."""
    return tuple(
        0 if size == 1 else stride // unit for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )
