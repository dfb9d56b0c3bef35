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
def seen_range(ranges, end_step, capacity):
    """One range within the capacity; one that is empty begins at the capacity and ends at 0, as nothing else does."""
    begin = tl.maximum(tl.load(ranges), 0)
    end = tl.minimum(tl.load(ranges + end_step), capacity)
    empty = begin >= end
    return tl.where(empty, capacity, begin), tl.where(empty, 0, end)


@triton.jit
def seen_ranges(ranges, index, row_step, range_step, end_step, capacity, RANGES: tl.constexpr):
    ranges += index.to(tl.int64) * row_step
    begin, end = seen_range(ranges, end_step, capacity)
    begin_2, end_2 = capacity, capacity * 0
    if RANGES == 2:
        begin_2, end_2 = seen_range(ranges + range_step, end_step, capacity)
    return begin, end, begin_2, end_2


@triton.jit
def touches(split, begin, end, SPLIT: tl.constexpr):
    """Whether a range has positions of a split."""
    return tl.maximum(begin, split * SPLIT) < tl.minimum(end, split * SPLIT + SPLIT)


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
    """What scores weigh beside the largest so far, and by what earlier sums shrink; `[M, N]` and `[M]`."""
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
def attend_split(
    q,
    split,
    keys,
    values,
    begin,
    end,
    begin_2,
    end_2,
    factor,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    KEY_STEP: tl.constexpr,
    VALUE_STEP: tl.constexpr,
):
    """Attention of a tile of rows to the positions of one split that are in a range."""
    largest = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    first = tl.maximum(tl.minimum(begin, begin_2), split * SPLIT) // BLOCK_N * BLOCK_N
    last = tl.minimum(tl.maximum(end, end_2), split * SPLIT + SPLIT)
    for start in range(first, last, BLOCK_N):
        nth = tl.arange(0, BLOCK_N)
        seen = in_ranges(start + nth, begin, end, begin_2, end_2)
        k = load_rows(tile_of(keys, start, KEY_STEP) + nth * KEY_STEP, seen, 0.0, D, D_PADDED)
        v = load_rows(tile_of(values, start, VALUE_STEP) + nth * VALUE_STEP, seen, 0.0, D, D_PADDED)
        scores = multiply(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        all_seen = ((start >= begin) & (start + BLOCK_N <= end)) | ((start >= begin_2) & (start + BLOCK_N <= end_2))
        if not all_seen:  # rarely: comparing takes longer than multiplying
            scores = tl.where(in_ranges(start + nth, begin, end, begin_2, end_2)[None, :], scores, NEVER)
        largest, shrink, weights = weigh(scores, largest, factor)
        total = total * shrink + tl.sum(weights, axis=1)
        context = multiply(weights.to(v.dtype), v, context * shrink[:, None])
    return largest, total, context
