"""The parts that the kernels of draft_attention share: who owns which rows, what they see, and sums that can be merged.

Attention of a row to a set of keys is three things: the largest score, the total of exp(score - largest) and the context, the
values' sum with these weights. Two disjoint sets merge by shrinking the sums of the one with the smaller maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freedave_kernels.triton import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
NEVER = tl.constexpr(float("-inf"))
FAR = tl.constexpr(2**30)  # no stored position


@triton.jit
def rows_of_tile(tile, length, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Draft, window position and head within the group of each row of a tile."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS
    draft = token // length
    return draft, token - draft * length, row - token * HEADS


@triton.jit
def at_most(limits, index, step, most, GIVEN: tl.constexpr):
    """A row's own limit where there is one."""
    if GIVEN:
        most = tl.minimum(most, tl.load(limits + index.to(tl.int64) * step).to(tl.int32))
    return most


@triton.jit
def start_of(starts, index, step, GIVEN: tl.constexpr):
    """Where a row's window begins."""
    start = index * 0
    if GIVEN:
        start = tl.maximum(tl.load(starts + index.to(tl.int64) * step), 0).to(tl.int32)
    return start


@triton.jit
def seen_range(ranges, end_step, capacity):
    """One range within the capacity. An empty one is from FAR to 0: it takes part in no minimum and no maximum."""
    begin = tl.maximum(tl.load(ranges), 0)
    end = tl.minimum(tl.load(ranges + end_step), capacity)
    empty = begin >= end
    return tl.where(empty, FAR, begin), tl.where(empty, 0, end)


@triton.jit
def seen_ranges(ranges, index, row_step, range_step, end_step, capacity, RANGES: tl.constexpr):
    ranges += index.to(tl.int64) * row_step
    begin, end = capacity * 0 + FAR, capacity * 0
    begin_2, end_2 = begin, end
    if RANGES > 0:
        begin, end = seen_range(ranges, end_step, capacity)
    if RANGES == 2:
        begin_2, end_2 = seen_range(ranges + range_step, end_step, capacity)
    return begin, end, begin_2, end_2


@triton.jit
def parts_of(begin, end, begin_2, end_2, window, exist, stored_parts, PART: tl.constexpr):
    """The parts that a row may see, of `PART` positions each: the first, and the one after the last.

    A window that reaches beyond the parts of the stored positions adds parts, one for each that it touches there. They follow
    the stored ones directly wherever the window lies, so the host knows how many there can be.
    """
    window_part = tl.minimum(window // PART, stored_parts)
    first = tl.minimum(tl.minimum(begin, begin_2) // PART, window_part)
    stored_after = (tl.maximum(end, end_2) + PART - 1) // PART
    last_part = (window + exist - 1) // PART
    beyond = last_part - tl.maximum(stored_parts, window // PART)
    window_after = tl.where(beyond < 0, last_part, stored_parts + beyond) + 1
    return first, tl.maximum(stored_after, window_after)


@triton.jit
def part_of(nth, window, stored_parts, PART: tl.constexpr):
    """Which part that is, counted from position 0."""
    return tl.where(nth < stored_parts, nth, nth - stored_parts + tl.maximum(stored_parts, window // PART))


@triton.jit
def touches(part, begin, end, PART: tl.constexpr):
    """Whether a range has positions of a part."""
    return tl.maximum(begin, part * PART) < tl.minimum(end, part * PART + PART)


@triton.jit
def multiply(a, b, added):
    if INTERPRETED:  # NumPy has no bfloat16, and its float32 products round differently with a row's place among others
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32) + added
    else:
        return tl.dot(a, b, acc=added, input_precision="ieee")


@triton.jit
def tile_of(features, position, STEP: tl.constexpr):
    """Where a position's features begin. (The distance may need 64 bits.)"""
    return features + tl.full((), STEP, tl.int64) * position


@triton.jit
def in_ranges(place, begin, end, begin_2, end_2):
    return ((place >= begin) & (place < end)) | ((place >= begin_2) & (place < end_2))


@triton.jit
def row_mask(rows, D: tl.constexpr, D_PADDED: tl.constexpr):
    """`[M, D_PADDED]` of `rows [M]`."""
    mask = rows[:, None]
    if D < D_PADDED:
        mask = mask & (tl.arange(0, D_PADDED) < D)[None, :]
    return mask


@triton.jit
def load_rows(starts, rows, other, D: tl.constexpr, D_PADDED: tl.constexpr):
    """`[M, D_PADDED]`: the features that begin at `starts [M]`, and `other` where `rows` says that there are none."""
    return tl.load(starts[:, None] + tl.arange(0, D_PADDED)[None, :], mask=row_mask(rows, D, D_PADDED), other=other)


@triton.jit
def weigh(scores, largest, factor):
    """The largest score so far `[M]`, the factor by which earlier sums shrink `[M]`, and the scores' weights `[M, N]`."""
    top = tl.maximum(largest, tl.max(scores, axis=1))
    anchor = tl.where(top == NEVER, 0.0, top)  # rows that have seen nothing yet
    shrink = tl.exp2((largest - anchor) * factor)
    weights = tl.exp2(tl.fma(scores, factor, -(anchor * factor)[:, None]))
    return top, shrink, weights


@triton.jit
def merge(largest, total, context, largest_2, total_2, context_2, factor):
    """Attention over two disjoint sets of keys as one."""
    top = tl.maximum(largest, largest_2)
    anchor = tl.where(top == NEVER, 0.0, top)
    first = tl.exp2((largest - anchor) * factor)
    second = tl.exp2((largest_2 - anchor) * factor)
    return top, total * first + total_2 * second, context * first[:, None] + context_2 * second[:, None]


@triton.jit
def write(starts, rows, live, total, context, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Writes the weighted mean, context / total, to the places from `starts [M]` on; 0 in rows that are not live."""
    result = tl.where(live[:, None], context * (1.0 / tl.where(live, total, 1.0))[:, None], 0.0)
    places = starts[:, None] + tl.arange(0, D_PADDED)[None, :]
    tl.store(places, result.to(starts.dtype.element_ty), mask=row_mask(rows, D, D_PADDED))


@triton.jit
def tiles_of_split(
    split, begin, end, begin_2, end_2, window, farthest, drafts_in_tile,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The tiles of keys in a split that rows attend to, in ascending order: which is the first, and how many there are.

    With `OWN`, a tile that has positions of the windows is counted once for each draft. Of these: which is the first, how
    many tiles come before it, how many they are, and how many when counted so.
    """
    low, high = split * SPLIT, split * SPLIT + SPLIT
    first = tl.maximum(tl.minimum(begin, begin_2), low)
    last = tl.minimum(tl.maximum(end, end_2), high)
    if OWN:
        first = tl.minimum(first, tl.maximum(window, low))
        last = tl.maximum(last, tl.minimum(window + farthest, high))
    first_tile = first // BLOCK_N
    count = (last + BLOCK_N - 1) // BLOCK_N - first_tile
    own_tile, own_number, own_tiles, own_count = first_tile, count, count, count
    if OWN:
        own_tile = tl.maximum(window, low) // BLOCK_N
        own_after = (tl.minimum(window + farthest, high) + BLOCK_N - 1) // BLOCK_N
        own_tiles = tl.maximum(own_after - own_tile, 0)
        own_number = own_tile - first_tile
        own_count = own_tiles * drafts_in_tile
        count += own_count - own_tiles
    return first_tile, count, own_tile, own_number, own_tiles, own_count


@triton.jit
def nth_own_tile(number, own_tile, own_number, own_tiles, own_count, first_draft, drafts_in_tile):
    """Which tile comes in that place, the draft whose window it is taken from, and whether it has any of a window."""
    into = number - own_number
    of_own = (into >= 0) & (into < own_count)
    of_draft = first_draft + tl.where(of_own, into % drafts_in_tile, 0)
    within = tl.where(of_own, into // drafts_in_tile, into + own_tiles - own_count)
    return own_tile + tl.where(into < 0, into, within), of_draft, of_own


@triton.jit
def choose_addresses(first, a, b):
    """Addresses from `a` where `first`, else from `b`: as numbers, since Triton before 3.8 fails at pointers on AMD."""
    return tl.where(first, a.to(tl.int64), b.to(tl.int64)).to(a.dtype)


@triton.jit
def starts_of_tile(
    stored_keys, stored_values, keys, values, place, window, start, farthest, exist, there,
    KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr, STORED_KEY_STEP: tl.constexpr, STORED_VALUE_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STORED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Where the keys and values of a tile begin: of positions in the window in `keys` and `values`, of others among the
    stored ones. Also which positions lie in the window, which are taken from the stored ones, and which are loaded at all.
    """
    nth = tl.arange(0, BLOCK_N)
    k_start = tile_of(stored_keys, start, STORED_KEY_STEP) + nth * STORED_KEY_STEP
    v_start = tile_of(stored_values, start, STORED_VALUE_STEP) + nth * STORED_VALUE_STEP
    inside, loaded = there, there
    if OWN:
        inside = (place >= window) & (place < window + exist)
        own_keys, own_values = tile_of(keys, start - window, KEY_STEP), tile_of(values, start - window, VALUE_STEP)
        if STORED:
            there = there & (place < tl.where(inside, 0, FAR))
            k_start = choose_addresses(inside, own_keys + nth * KEY_STEP, k_start)
            v_start = choose_addresses(inside, own_values + nth * VALUE_STEP, v_start)
            loaded = there | (inside & (place < window + farthest))
        else:
            k_start, v_start = own_keys + nth * KEY_STEP, own_values + nth * VALUE_STEP
            loaded = inside & (place < window + farthest)
    # A compiler does not see what the addresses that were chosen among have in common.
    k_start = tl.multiple_of(k_start, UNIT * (stored_keys.dtype.element_ty.primitive_bitwidth // 8))
    v_start = tl.multiple_of(v_start, UNIT * (stored_keys.dtype.element_ty.primitive_bitwidth // 8))
    return k_start, v_start, inside, there, loaded


@triton.jit
def hide_unseen(scores, start, begin, end, begin_2, end_2, BLOCK_N: tl.constexpr):
    """Scores of a tile of stored keys, -inf outside the ranges."""
    all_seen = ((start >= begin) & (start + BLOCK_N <= end)) | ((start >= begin_2) & (start + BLOCK_N <= end_2))
    if not all_seen:  # rarely: comparing takes longer than multiplying
        place = start + tl.arange(0, BLOCK_N)
        scores = tl.where(in_ranges(place, begin, end, begin_2, end_2)[None, :], scores, NEVER)
    return scores


@triton.jit
def attend_split(
    q, split, stored_keys, stored_values, keys, values, key_draft, value_draft, begin, end, begin_2, end_2,
    window, exist, farthest, draft, seen, first_draft, drafts_in_tile, factor,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr, STORED_KEY_STEP: tl.constexpr,
    STORED_VALUE_STEP: tl.constexpr, STORED: tl.constexpr, OWN: tl.constexpr, STAGES: tl.constexpr,
    ONE_DRAFT: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows to the keys of one split, tile by tile of keys: those in a range where they are stored and,
    with `OWN`, those of the windows, which lie at `window` to before `window + exist`; rows see them up to `farthest`.

    A tile of keys with positions of the windows comes once for each draft; rows of other drafts do not see it.
    """
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    first_tile, count, own_tile, own_number, own_tiles, own_count = tiles_of_split(
        split, begin, end, begin_2, end_2, window, farthest, drafts_in_tile, BLOCK_N, SPLIT, OWN
    )
    for number in tl.range(count, num_stages=STAGES):
        tile = first_tile + number
        if OWN:
            tile, of_draft, of_own = nth_own_tile(
                number, own_tile, own_number, own_tiles, own_count, first_draft, drafts_in_tile
            )
        start = tile * BLOCK_N
        place = start + tl.arange(0, BLOCK_N)
        there = in_ranges(place, begin, end, begin_2, end_2)
        own_keys, own_values = keys, values
        if OWN:
            own_keys += of_draft * key_draft * UNIT
            own_values += of_draft * value_draft * UNIT
        k_start, v_start, inside, there, loaded = starts_of_tile(
            stored_keys, stored_values, own_keys, own_values, place, window, start, farthest, exist, there,
            KEY_STEP, VALUE_STEP, STORED_KEY_STEP, STORED_VALUE_STEP, BLOCK_N, UNIT, STORED, OWN,
        )  # fmt: skip
        k = load_rows(k_start, loaded, 0.0, D, D_PADDED)
        v = load_rows(v_start, loaded, 0.0, D, D_PADDED)
        scores = multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if OWN:
            mine = (draft == of_draft) | (draft < tl.where(of_own, 0, FAR))
            reach = tl.where(mine, window + seen, -1)
            place = tl.where(inside, place, FAR)
            if STORED:
                place = tl.where(there, -1, place)
            scores = tl.where(place[None, :] < reach[:, None], scores, NEVER)
        else:
            scores = hide_unseen(scores, start, begin, end, begin_2, end_2, BLOCK_N)
        largest, shrink, weights = weigh(scores, largest, factor)
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = multiply(weights.to(v.dtype), v, context * shrink[:, None])
        # Values of other drafts weigh 0. One that is NaN would still make the sum NaN, hence the choice.
        context = tl.where(mine[:, None], weighted, context) if OWN and not ONE_DRAFT else weighted
    return largest, total, context
