"""Attention of all drafts: softmax(scale * q k) v over the stored positions of a slot and the own window of each draft.

The queries of a slot that share their keys (all drafts, positions and heads of a group) are rows. A program owns a tile of
rows and goes over the keys in the order of their positions, stored ones and those of the windows; stored ones are read once
for all drafts and heads of a tile. Where the rows fill too few programs, several share what a tile sees, and leave sums to be
merged. Bound by reading keys and values for few rows, by tensor cores for many.

A row's result is the same however that is divided: keys are attended to in splits at fixed absolute positions, each from
nothing and in tiles at fixed positions; the splits of a span, so many of them at fixed positions too, are merged in
ascending order, and so are the spans. The parts that programs share out are splits for few rows, and spans for many, since
it takes long to store and to read sums. A key that a row does not see weighs 0 and changes no maximum, so that it leaves the
row's sums as they are, to the bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import BackendUnavailableError
from freedave_kernels.triton.attention_parts import (
    FAR,
    NEVER,
    at_most,
    attend_split,
    load_rows,
    merge,
    part_of,
    parts_of,
    rows_of_tile,
    seen_ranges,
    start_of,
    touches,
    write,
)
from freedave_kernels.triton.launch import architecture, ceil_div, kernel, power_of_two, short_range

LOG2_E = 1.4426950408889634
MAX_FEATURES = 256
# So many programs fill the machine: then nothing is shared out. Constants, as they decide nothing but speed.
FILLED = 128
FILLED_BY_SPANS = 160  # so many do where each has a span: then no less than spans is shared out
SHARED_OUT = 512  # programs that splits are shared out to, where rows fill too few
MERGED_ROWS = 8  # of a program


@triton.jit
def attend_part(
    part, q, stored_keys, stored_values, keys, values, key_draft, value_draft, begin, end, begin_2, end_2,
    window, exist, farthest, draft, seen, first_draft, drafts_in_tile, factor,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    STORED_KEY_STEP: tl.constexpr, STORED_VALUE_STEP: tl.constexpr, STORED: tl.constexpr, STAGES: tl.constexpr,
    ONE_DRAFT: tl.constexpr,
):  # fmt: skip
    """The `SPAN` splits of a part, merged. Splits that have positions of the window are compiled apart from all others."""
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    for nth in range(SPAN):
        split = part * SPAN + nth
        if touches(split, window, window + exist, SPLIT):
            largest_2, total_2, context_2 = attend_split(
                q, split, stored_keys, stored_values, keys, values, key_draft, value_draft, begin, end, begin_2, end_2,
                window, exist, farthest, draft, seen, first_draft, drafts_in_tile, factor, D, D_PADDED, BLOCK_M, BLOCK_N,
                SPLIT, UNIT, KEY_STEP, VALUE_STEP, STORED_KEY_STEP, STORED_VALUE_STEP, STORED, True, 2, ONE_DRAFT,
            )  # fmt: skip
            if SPAN > 1:
                largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)
            else:
                largest, total, context = largest_2, total_2, context_2
        elif touches(split, begin, end, SPLIT) | touches(split, begin_2, end_2, SPLIT):
            largest_2, total_2, context_2 = attend_split(
                q, split, stored_keys, stored_values, keys, values, key_draft, value_draft, begin, end, begin_2, end_2,
                window, exist, farthest, draft, seen, first_draft, drafts_in_tile, factor, D, D_PADDED, BLOCK_M, BLOCK_N,
                SPLIT, UNIT, KEY_STEP, VALUE_STEP, STORED_KEY_STEP, STORED_VALUE_STEP, True, False, STAGES, ONE_DRAFT,
            )  # fmt: skip
            if SPAN > 1:
                largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)
            else:
                largest, total, context = largest_2, total_2, context_2
    return largest, total, context


@triton.jit
def attend_parts(
    q, contexts, sums, first, after, stored_keys, stored_values, keys, values, key_draft, value_draft,
    begin, end, begin_2, end_2, window, exist, draft, position, live, count, block_length, factor, stored_parts, parts, rows,
    largest, total, context,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    SPAN: tl.constexpr, UNIT: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
    STORED_KEY_STEP: tl.constexpr, STORED_VALUE_STEP: tl.constexpr, STORED: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr, ONE_DRAFT: tl.constexpr,
):  # fmt: skip
    """A tile of rows over every `num_programs(1)`-th part from `first` to before `after`.

    `SHARED`: stores the sums of each part. Otherwise: merges them, into `largest`, `total` and `context`.
    """
    PART: tl.constexpr = SPLIT * SPAN
    IN_REGISTERS: tl.constexpr = ONE_DRAFT and SPAN == 1  # else there are none for another context
    seen = tl.minimum((position // block_length + 1) * block_length, exist)  # of the window, from its start on
    farthest = tl.max(tl.where(live, seen, 0), axis=0)
    first_draft = tl.min(draft, axis=0)
    drafts_in_tile = tl.minimum(tl.max(draft, axis=0) + 1, count) - first_draft
    done = 0
    for nth_part in range(first, after, tl.num_programs(1)):
        part = part_of(nth_part, window, stored_parts, PART)
        touched = touches(part, begin, end, PART) | touches(part, begin_2, end_2, PART)
        if touched | touches(part, window, window + exist, PART):
            # Whole tiles are stored, rows that are not live too: a mask would take longer.
            row = (tl.program_id(2).to(tl.int64) * parts + (nth_part if SHARED else 0)) * rows
            row += tl.program_id(0) * BLOCK_M
            nth = tl.arange(0, BLOCK_M)
            if (
                not SHARED
            ):  # a 0 that the compiler cannot see keeps it from holding the addresses in registers all the way
                nth += tl.minimum(nth_part, 0)
            places = contexts + row * D_PADDED + (nth * D_PADDED)[:, None] + tl.arange(0, D_PADDED)[None, :]
            if not SHARED and not IN_REGISTERS and done > 0:
                tl.store(places, context)
            largest_2, total_2, context_2 = attend_part(
                part, q, stored_keys, stored_values, keys, values, key_draft, value_draft, begin, end, begin_2, end_2,
                window, exist, farthest, draft, seen, first_draft, drafts_in_tile, factor, D, D_PADDED, BLOCK_M, BLOCK_N,
                SPLIT, SPAN, UNIT, KEY_STEP, VALUE_STEP, STORED_KEY_STEP, STORED_VALUE_STEP, STORED, STAGES, ONE_DRAFT,
            )  # fmt: skip
            if SHARED:
                tl.store(sums + row * 2 + nth * 2, largest_2)
                tl.store(sums + row * 2 + nth * 2 + 1, total_2)
                tl.store(places, context_2)
            elif IN_REGISTERS:
                largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)
            elif done > 0:
                tl.debug_barrier()
                before = tl.load(places)
                largest, total, context = merge(largest, total, before, largest_2, total_2, context_2, factor)
            else:
                largest, total, context = largest_2, total_2, context_2
            done += 1
    return largest, total, context


@kernel(aligned=("query", "key", "value", "stored_key", "stored_value", "contexts", "sums", "out"))
def attend(
    query, key, value, stored_key, stored_value, contexts, sums, out,
    ranges, window_start, slots, num_drafts, window_lengths, factor: tl.float32,
    drafts: tl.int32, length: tl.int32, groups: tl.int32, capacity: tl.int32, stored_parts: tl.int32, parts: tl.int32,
    rows: tl.int32, block_length: tl.int32, ranges_row: tl.int64, ranges_range: tl.int64, ranges_end: tl.int64,
    window_start_step: tl.int64, slots_step: tl.int64, num_drafts_step: tl.int64, window_lengths_step: tl.int64,
    query_row: tl.int64, query_draft: tl.int64, query_position: tl.int64, query_head: tl.int64,
    key_row: tl.int64, key_draft: tl.int64, key_group: tl.int64,
    value_row: tl.int64, value_draft: tl.int64, value_group: tl.int64,
    stored_key_slot: tl.int64, stored_key_group: tl.int64, stored_value_slot: tl.int64, stored_value_group: tl.int64,
    D: tl.constexpr, D_PADDED: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
    RANGES: tl.constexpr, HAS_WINDOW_START: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_NUM_DRAFTS: tl.constexpr,
    HAS_WINDOW_LENGTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr, STORED_KEY_STEP: tl.constexpr, STORED_VALUE_STEP: tl.constexpr,
    STAGES: tl.constexpr, SHARED: tl.constexpr, ONE_DRAFT: tl.constexpr,
):  # fmt: skip
    """A tile of rows over every `num_programs(1)`-th part of what it sees: `SHARED`, sums of each, for `merge_parts`; else,
    alone, all of it.
    """
    index, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    draft, position, head = rows_of_tile(tl.program_id(0), length, HEADS, BLOCK_M)
    count = at_most(num_drafts, index, num_drafts_step, drafts, HAS_NUM_DRAFTS)
    exist = at_most(window_lengths, index, window_lengths_step, length, HAS_WINDOW_LENGTHS)
    live = (draft < count) & (position < exist)
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)

    if tl.max(live.to(tl.int32), axis=0) > 0:
        window = start_of(window_start, index, window_start_step, HAS_WINDOW_START)
        begin, end, begin_2, end_2 = seen_ranges(ranges, index, ranges_row, ranges_range, ranges_end, capacity, RANGES)
        first, after = parts_of(begin, end, begin_2, end_2, window, exist, stored_parts, SPLIT * SPAN)
        first += tl.program_id(1)
        if first < after:
            slot = tl.load(slots + index.to(tl.int64) * slots_step).to(tl.int64) if HAS_SLOTS else index.to(tl.int64)
            stored_keys = stored_key + (slot * stored_key_slot + group * stored_key_group) * UNIT
            stored_values = stored_value + (slot * stored_value_slot + group * stored_value_group) * UNIT
            keys = key + (index * key_row + group * key_group) * UNIT
            values = value + (index * value_row + group * value_group) * UNIT
            start = index * query_row + group * HEADS * query_head
            starts = query + (start + draft * query_draft + position * query_position + head * query_head) * UNIT
            q = load_rows(starts, live, 0.0, D, D_PADDED)
            largest, total, context = attend_parts(
                q, contexts, sums, first, after, stored_keys, stored_values, keys, values, key_draft, value_draft,
                begin, end, begin_2, end_2, window, exist, draft, position, live, count, block_length, factor,
                stored_parts, parts, rows, largest, total, context, D, D_PADDED, BLOCK_M, BLOCK_N, SPLIT, SPAN,
                UNIT, KEY_STEP, VALUE_STEP, STORED_KEY_STEP, STORED_VALUE_STEP, RANGES > 0, STAGES, SHARED, ONE_DRAFT,
            )  # fmt: skip

    if not SHARED:
        # Worked out anew, with a 0 that the compiler cannot see: else what is known of the rows would take registers all
        # the way.
        again = tl.minimum(parts, 0)
        draft, position, head = rows_of_tile(tl.program_id(0) + again, length, HEADS, BLOCK_M)
        count = at_most(num_drafts, index + again, num_drafts_step, drafts, HAS_NUM_DRAFTS)
        exist = at_most(window_lengths, index + again, window_lengths_step, length, HAS_WINDOW_LENGTHS)
        live = (draft < count) & (position < exist)
        token = (index.to(tl.int64) * drafts + draft) * length + position
        place = token * (groups * HEADS) + group * HEADS + head
        write(out + place * D, draft < drafts, live, total, context, D, D_PADDED)


@kernel(aligned=("contexts", "sums", "out"))
def merge_parts(
    contexts,
    sums,
    out,
    ranges,
    window_start,
    num_drafts,
    window_lengths,
    factor: tl.float32,
    drafts: tl.int32,
    length: tl.int32,
    groups: tl.int32,
    capacity: tl.int32,
    stored_parts: tl.int32,
    parts: tl.int32,
    rows: tl.int32,
    ranges_row: tl.int64,
    ranges_range: tl.int64,
    ranges_end: tl.int64,
    window_start_step: tl.int64,
    num_drafts_step: tl.int64,
    window_lengths_step: tl.int64,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    RANGES: tl.constexpr,
    HAS_WINDOW_START: tl.constexpr,
    HAS_NUM_DRAFTS: tl.constexpr,
    HAS_WINDOW_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows' sums over the parts of what they see, as `attend` does it alone: in ascending order over the `PARTS` parts of a
    span, which have `PART` positions each, then over spans.
    """
    index, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    draft, position, head = rows_of_tile(tl.program_id(0), length, HEADS, BLOCK_M)
    count = at_most(num_drafts, index, num_drafts_step, drafts, HAS_NUM_DRAFTS)
    exist = at_most(window_lengths, index, window_lengths_step, length, HAS_WINDOW_LENGTHS)
    live = (draft < count) & (position < exist)
    window = start_of(window_start, index, window_start_step, HAS_WINDOW_START)
    begin, end, begin_2, end_2 = seen_ranges(ranges, index, ranges_row, ranges_range, ranges_end, capacity, RANGES)
    first, after = parts_of(begin, end, begin_2, end_2, window, exist, stored_parts, PART)
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    largest_0, total_0, context_0 = largest, total, context  # of the spans before
    span = index * 0
    for nth_part in tl.range(first, after, num_stages=4):
        part = part_of(nth_part, window, stored_parts, PART)
        touched = touches(part, window, window + exist, PART)
        touched = touched | touches(part, begin, end, PART) | touches(part, begin_2, end_2, PART)
        written = live & (draft < tl.where(touched, FAR, 0))
        row = (tl.program_id(1).to(tl.int64) * parts + nth_part) * rows + tl.program_id(0) * BLOCK_M
        nth = tl.arange(0, BLOCK_M)
        largest_2 = tl.load(sums + row * 2 + nth * 2, mask=written, other=NEVER)
        total_2 = tl.load(sums + row * 2 + nth * 2 + 1, mask=written, other=0.0)
        places = contexts + row * D_PADDED + (nth * D_PADDED)[:, None]
        context_2 = tl.load(places + tl.arange(0, D_PADDED)[None, :], mask=written[:, None], other=0.0)
        if PARTS > 1 and part // PARTS > span:
            largest_0, total_0, context_0 = merge(largest_0, total_0, context_0, largest, total, context, factor)
            largest, total, context = largest_2, total_2, context_2
            span = part // PARTS
        else:
            largest, total, context = merge(largest, total, context, largest_2, total_2, context_2, factor)
    if PARTS > 1:
        largest, total, context = merge(largest_0, total_0, context_0, largest, total, context, factor)
    token = (index.to(tl.int64) * drafts + draft) * length + position
    place = token * (groups * HEADS) + group * HEADS + head
    write(out + place * D, draft < drafts, live, total, context, D, D_PADDED)


class Tiles(NamedTuple):
    """How kernels divide their work. `keys`, `split` and `span` decide a row's bits, so they depend on the type and size of
    features and on the device alone. `rows` goes with `num_warps`, so that a warp has whole rows and adds up its own.
    """

    rows: int
    keys: int
    split: int
    """Positions that are attended to from nothing: few enough to share out, so many that merging is cheap."""
    span: int
    """Splits that are merged by themselves, so that a program may work on all of them and store one sum."""
    num_warps: int
    max_registers: int
    """A thread's: with these nothing is spilled; left alone, a compiler aims lower."""
    num_stages: int
    """Tiles of keys and values in shared memory. Few rows are bound by how many bytes are on their way."""


def tiles(dtype: torch.dtype, padded: int, device_architecture: int) -> Tiles:
    """`device_architecture`: as `launch.architecture` has it.

    Those of 128 features were the best on an H100 (`benchmarks gpu --only tune_attention`, steps of 8B models): with 4,096
    stored positions, spans of three splits take 15 % less than single ones with 8 drafts and 18 % less with 16, and 3 % more
    with one; taller tiles take a few per cent less there and up to 31 % more with 128 stored positions.
    """
    if dtype == torch.float32:  # multiplied without tensor cores, whose operands would be rounded
        return Tiles(16, 32 if padded <= 128 else 16, 512, 1, 8, 128, 2)
    if padded <= 64:
        return Tiles(64, 64, 512, 1, 4, 255, 3)
    if padded == 128:
        hopper = device_architecture == 90
        return Tiles(64, 32, 512, 3 if hopper else 1, 4, 255, 4 if hopper else 3)
    return Tiles(64, 32 if device_architecture else 16, 512, 1, 8, 255, 2)


def splits_of_a_span(chosen: Tiles, capacity: int, length: int) -> int:
    """Where a span holds all that is stored and a window that begins there, its splits are merged in the same order as
    splits that have no spans, whose kernels are faster.
    """
    return chosen.span if capacity + length > chosen.split * chosen.span else 1


def shared_out(programs: int, stored_splits: int, stored_spans: int) -> Literal["nothing", "spans", "splits"]:
    """What several programs share where `programs` tiles of rows may see so many splits of stored positions."""
    if stored_splits <= 1 or programs >= FILLED:
        return "nothing"
    return "spans" if programs * stored_spans >= FILLED_BY_SPANS else "splits"


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
    rows = drafts * length * (heads // groups)
    chosen = tiles(query.dtype, padded, architecture(query.get_device()))
    row_tiles = ceil_div(rows, chosen.rows)
    rows = row_tiles * chosen.rows
    programs = row_tiles * batch * groups
    seen = ranges.shape[1] if capacity else 0
    stored_splits = ceil_div(capacity, chosen.split) if seen else 0
    most_splits = splits_of_a_span(chosen, capacity, length)
    sharing = shared_out(programs, stored_splits, ceil_div(stored_splits, most_splits))
    shared = sharing != "nothing"
    span = 1 if sharing == "splits" else most_splits  # splits of a part
    positions = chosen.split * span
    stored_parts = ceil_div(stored_splits, span)
    parts = stored_parts + ceil_div(length, positions) + 1 if shared else 1  # of which sums are stored
    partial = parts * batch * groups * rows
    contexts = torch.empty(partial * padded, dtype=torch.float32, device=query.device)
    sums = torch.empty(partial * 2, dtype=torch.float32, device=query.device) if shared else contexts

    # Python's float is float64, whose product is rounded once.
    factor = (features**-0.5 if scale is None else scale) * LOG2_E
    features_of = (query, key, value, stored_key, stored_value)
    unit = common_unit(features_of)
    per_row = (window_start, slots, num_drafts, window_lengths)
    given = tuple(limit is not None for limit in per_row)
    limits = tuple(ranges if limit is None else limit for limit in per_row)
    steps = (*ranges.stride(), *(limit.stride(0) for limit in limits))
    sizes = (factor, drafts, length, groups, capacity, stored_parts, parts, rows)
    of_rows = (features, padded, heads // groups)
    # Addresses that are not aligned occur only where `unit` says so; but some may be, and binaries differ.
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in features_of)
    others = (query.dtype, *(limit.dtype for limit in limits))
    # Of keys and values: all but that of positions, which is a constant.
    around = [(*strides(tensor, unit)[:-2], strides(tensor, unit)[-1]) for tensor in features_of[1:]]
    # As many as there are parts, unless windows lie beyond what can be stored.
    shares = ceil_div(capacity + length, positions) if shared else 1
    if sharing == "splits":
        shares = min(shares, power_of_two(ceil_div(SHARED_OUT, programs)))
    attend.launch(
        (row_tiles, shares, batch * groups),
        (*features_of, contexts, sums, out, ranges, *limits, *sizes, block_length or length, *steps,
         *strides(query, unit), *(stride for tensor in around for stride in tensor)),
        (*of_rows, chosen.split, span, seen, *given, chosen.rows, chosen.keys, unit,
         *(tensor.stride(-3) for tensor in features_of[1:]), chosen.num_stages, shared, drafts == 1),
        (*others, *aligned, *map(short_range, features_of)),
        chosen.num_warps, chosen.max_registers, chosen.num_stages,
    )  # fmt: skip
    if shared:  # slots decide nothing any more
        merge_parts.launch(
            (ceil_div(rows, MERGED_ROWS), batch * groups, 1),
            (contexts, sums, out, ranges, limits[0], *limits[2:], *sizes, *steps[:4], *steps[5:]),
            (*of_rows, positions, most_splits // span, seen, given[0], *given[2:], MERGED_ROWS), others, 4, 128,
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
