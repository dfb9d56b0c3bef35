"""floor[i] = the least logit of row i that top-k, top-p and min-p leave.

A program owns a row and reads it some times over, which is in L2 after the first. A search knows between which two keys
(integers that order as logits do) the floor lies; with each reading it adds up the weights above three keys between them, and
a quarter of the keys is left. Weights are integers, as freedave_kernels/reference/logit_floor.py states them, so their sums
come out the same in any order. Bound by instructions.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl

from freedave_kernels.reference import logit_floor as reference
from freedave_kernels.triton.launch import kernel, outer_stride, power_of_two, short_range
from freedave_kernels.triton.scan_logits import NEVER, VECTOR_BYTES, hide_suppressed, load_chunk

CHUNK = 4096  # logits that a program has in registers
WARPS = 8
MAX_REGISTERS = 128  # left to itself, the compiler spills one to fit a third program into a multiprocessor

# The low bits of a key that follow from the others: a logit of 16 bits has fewer than a float.
REDUNDANT_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

LEAST_CANDIDATE = tl.constexpr(-0x7F800000)  # the key of the least float
NOT_A_NUMBER = tl.constexpr(0x7FFFFFFF)
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)

LOG2_E, LN2_HIGH, LN2_LOW = map(tl.constexpr, (reference.LOG2_E, reference.LN2_HIGH, reference.LN2_LOW))
S_6, S_5, S_4, S_3, S_2, S_1, S_0 = map(tl.constexpr, reference.SERIES)
LEAST_DIFFERENCE = tl.constexpr(reference.LEAST_DIFFERENCE)
TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds


@triton.jit
def key_of(logit):
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are equal logits
    return tl.where(logit != logit, NOT_A_NUMBER, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def logit_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(difference):
    counts = difference >= LEAST_DIFFERENCE
    d = tl.where(counts, difference, 0.0)
    whole = (d * LOG2_E + TO_WHOLE) - TO_WHOLE
    r = (d - whole * LN2_HIGH) - whole * LN2_LOW
    series = r * S_6 + S_5
    series = series * r + S_4
    series = series * r + S_3
    series = series * r + S_2
    series = series * r + S_1
    series = series * r + S_0
    mantissa = (series * 1073741824.0).to(tl.int32).to(tl.int64)
    return tl.where(counts, (mantissa << 10) >> (-whole).to(tl.int32).to(tl.int64), 0)


@triton.jit
def load_keys(
    row, lane, first, vocab, suppress_tokens, num_suppressed, suppressed_step, HAS_SUPPRESSED: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, TAIL_VECTOR: tl.constexpr,
):  # fmt: skip
    """`[LANES, GROUP]`; what is suppressed, or lies beyond the vocabulary, is less than any candidate."""
    x = load_chunk(row, lane, first, vocab, GROUP, VECTOR, TAIL_VECTOR)
    if HAS_SUPPRESSED:
        x = hide_suppressed(x, lane, suppress_tokens, num_suppressed, suppressed_step, first, GROUP)
    return key_of(x)


@triton.jit
def sums_above(
    row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, pivot_0, pivot_1, pivot_2, highest, largest,
    scale, WEIGHTED: tl.constexpr, REDUNDANT: tl.constexpr, HAS_SUPPRESSED: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, TAIL_VECTOR: tl.constexpr,
):  # fmt: skip
    """The weights of the keys, without their redundant bits, above each pivot and not above `highest`."""
    sum_0 = tl.zeros([lane.shape[0]], tl.int64)
    sum_1, sum_2 = sum_0, sum_0
    low, middle, high, top = pivot_0.to(tl.int32), pivot_1.to(tl.int32), pivot_2.to(tl.int32), highest.to(tl.int32)
    for first in range(0, vocab, lane.shape[0] * GROUP):
        key = load_keys(
            row, lane, first, vocab, suppress_tokens, num_suppressed, suppressed_step, HAS_SUPPRESSED,
            GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip
        part = key >> REDUNDANT
        inside = (part > low) & (part <= top) & (key >= LEAST_CANDIDATE)
        if WEIGHTED:
            weight = tl.where(inside, weight_of(logit_of(key) * scale - largest), 0)
        else:
            weight = inside.to(tl.int64)
        sum_0 += tl.sum(weight, axis=1)
        sum_1 += tl.sum(tl.where(part > middle, weight, 0), axis=1)
        sum_2 += tl.sum(tl.where(part > high, weight, 0), axis=1)
    return tl.sum(sum_0, axis=0), tl.sum(sum_1, axis=0), tl.sum(sum_2, axis=0)


@triton.jit
def search(
    row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, lowest, highest, largest, scale,
    top_k, top_p, WEIGHTED: tl.constexpr, REDUNDANT: tl.constexpr, HAS_SUPPRESSED: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, TAIL_VECTOR: tl.constexpr,
):  # fmt: skip
    """The least key from `lowest` to `highest`, without redundant bits, above which weights are less than a limit: `top_k`,
    or `top_p` of all those not below `lowest`.
    """
    everything, _, _ = sums_above(
        row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, lowest - 1, highest, highest, highest,
        largest, scale, WEIGHTED, REDUNDANT, HAS_SUPPRESSED, GROUP, VECTOR, TAIL_VECTOR,
    )  # fmt: skip
    if WEIGHTED:
        limit = everything.to(tl.float64) * top_p
    else:
        limit = tl.minimum(everything, top_k).to(tl.float64)  # of fewer than k, all stay
    above = tl.zeros_like(everything)
    while lowest < highest:
        width = highest - lowest
        pivot_0, pivot_1, pivot_2 = lowest + (width >> 2), lowest + (2 * width >> 2), lowest + (3 * width >> 2)
        sum_0, sum_1, sum_2 = sums_above(
            row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, pivot_0, pivot_1, pivot_2, highest,
            largest, scale, WEIGHTED, REDUNDANT, HAS_SUPPRESSED, GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip
        sum_0, sum_1, sum_2 = above + sum_0, above + sum_1, above + sum_2
        room_0, room_1, room_2 = (
            sum_0.to(tl.float64) < limit,
            sum_1.to(tl.float64) < limit,
            sum_2.to(tl.float64) < limit,
        )
        # Between the last pivot above which there is too much, and the first above which there is not.
        lowest = tl.where(room_0, lowest, tl.where(room_1, pivot_0 + 1, tl.where(room_2, pivot_1 + 1, pivot_2 + 1)))
        highest = tl.where(room_0, pivot_0, tl.where(room_1, pivot_1, tl.where(room_2, pivot_2, highest)))
        above = tl.where(room_0, sum_0, tl.where(room_1, sum_1, tl.where(room_2, sum_2, above)))
    return lowest


@kernel(aligned=("logits",))
def find_floor(
    logits,
    mask_index,
    suppress_tokens,
    floor,
    vocab: tl.int32,
    num_suppressed: tl.int32,
    suppressed_step: tl.int64,
    logits_outer: tl.int64,
    mask_outer: tl.int64,
    top_k: tl.int32,
    top_p_bits: tl.int64,
    least_difference: tl.float32,
    temperature,
    temperature_outer: tl.int64,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    TAIL_VECTOR: tl.constexpr,
    REDUNDANT: tl.constexpr,
    HAS_MASK_INDEX: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_SUPPRESSED: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    nth_row = tl.program_id(0)
    divisor = temperature + nth_row.to(tl.int64) * temperature_outer
    wanted = tl.full([], True, tl.int1)
    if HAS_MASK_INDEX:
        wanted = tl.load(mask_index + nth_row.to(tl.int64) * mask_outer) != 0
    if HAS_TEMPERATURE:
        wanted &= tl.load(divisor) > 0.0
    if not wanted:
        tl.store(floor + nth_row, NEVER)
        return
    row = logits + tl.multiple_of(nth_row.to(tl.int64) * logits_outer, VECTOR)
    lane = tl.arange(0, LANES)

    tops = tl.full([LANES], -0x80000000, tl.int32)
    for first in range(0, vocab, LANES * GROUP):
        key = load_keys(
            row, lane, first, vocab, suppress_tokens, num_suppressed, suppressed_step, HAS_SUPPRESSED,
            GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip
        tops = tl.maximum(tops, tl.max(key, axis=1))
    top = tl.max(tops, axis=0)
    scale = tl.full([], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        scale = tl.div_rn(1.0, tl.load(divisor))
    largest = logit_of(top) * scale
    usable = (top >= LEAST_CANDIDATE) & (top != NOT_A_NUMBER) & (tl.abs(largest) <= LARGEST_FLOAT)
    if not usable:
        tl.store(floor + nth_row, NEVER)
        return

    highest = (top >> REDUNDANT).to(tl.int64)
    lowest = tl.full([], LEAST_CANDIDATE >> REDUNDANT, tl.int64)
    top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if HAS_TOP_K:
        lowest = search(
            row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, lowest, highest, largest,
            scale, top_k, top_p, False, REDUNDANT, HAS_SUPPRESSED, GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip
    if HAS_TOP_P:
        lowest = search(
            row, lane, vocab, suppress_tokens, num_suppressed, suppressed_step, lowest, highest, largest,
            scale, top_k, top_p, True, REDUNDANT, HAS_SUPPRESSED, GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip

    leasts = tl.full([LANES], NOT_A_NUMBER, tl.int32)
    for first in range(0, vocab, LANES * GROUP):
        key = load_keys(
            row, lane, first, vocab, suppress_tokens, num_suppressed, suppressed_step, HAS_SUPPRESSED,
            GROUP, VECTOR, TAIL_VECTOR,
        )  # fmt: skip
        stays = ((key >> REDUNDANT) >= lowest.to(tl.int32)) & (key >= LEAST_CANDIDATE)
        stays &= logit_of(key) * scale - largest >= least_difference
        leasts = tl.minimum(leasts, tl.min(tl.where(stays, key, NOT_A_NUMBER), axis=1))
    tl.store(floor + nth_row, logit_of(tl.min(leasts, axis=0)))


def logit_floor(
    logits: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    temperature: torch.Tensor | None,
    mask_index: torch.Tensor | None,
    suppress_tokens: torch.Tensor | None,
) -> torch.Tensor:
    floor = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    if floor.numel() > 0:
        floor_into(floor, logits, top_k, top_p, min_p, temperature, mask_index, suppress_tokens)
    return floor


def floor_into(
    floor: torch.Tensor,
    logits: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    temperature: torch.Tensor | None,
    mask_index: torch.Tensor | None,
    suppress_tokens: torch.Tensor | None,
) -> None:
    """One launch where a single stride walks the leading dimensions, else one for each of the outermost."""
    mask = floor if mask_index is None else mask_index
    divisors = floor if temperature is None else temperature
    outer = outer_stride(logits, 1), outer_stride(mask, 0), outer_stride(divisors, 0)
    if None in outer:
        for n in range(len(floor)):
            divisor, masked = (None if each is None else each[n] for each in (temperature, mask_index))
            floor_into(floor[n], logits[n], top_k, top_p, min_p, divisor, masked, suppress_tokens)
        return
    vocab, itemsize = logits.shape[-1], logits.element_size()
    group = VECTOR_BYTES // itemsize
    lanes = min(CHUNK, max(group, power_of_two(vocab))) // group
    # The lowest bit set is the largest power of two that divides every row's address.
    alignment = logits.data_ptr() | (outer[0] or 0) * itemsize | VECTOR_BYTES
    vector = (alignment & -alignment) // itemsize
    suppressed = floor if suppress_tokens is None else suppress_tokens
    top_p_bits = struct.unpack("<q", struct.pack("<d", 1.0 if top_p is None else top_p))[0]
    flags = (
        mask_index is not None,
        top_k is not None and top_k < vocab,
        top_p is not None and top_p < 1,
        suppress_tokens is not None,
        temperature is not None,
    )
    find_floor.launch(
        (floor.numel(), 1, 1),
        (logits, mask, suppressed, floor, vocab, 0 if suppress_tokens is None else suppressed.numel(),
         0 if suppress_tokens is None else suppressed.stride(0), outer[0], outer[1],
         vocab if top_k is None else min(top_k, vocab), top_p_bits,
         -math.inf if min_p is None else math.log(min_p), divisors, outer[2]),
        (lanes, group, vector, math.gcd(vector, vocab), REDUNDANT_BITS[logits.dtype], *flags),
        (logits.dtype, short_range(logits)),
        min(WARPS, max(1, lanes // 32)),
        MAX_REGISTERS,
    )  # fmt: skip
