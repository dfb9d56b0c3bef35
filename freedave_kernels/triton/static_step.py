"""One step of static decoding as Triton functions: the total order of positions, and which of them a step unmasks.

A row of at most MAX_LENGTH positions lies across a program's threads, and everything is found by repeated minima: the next
position to unmask is the masked one with the smallest key. Steps unmask a position or a few, so a step is a reduction or
a few, over values that never leave the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import RULES, BackendUnavailableError

MAX_LENGTH = 2048  # positions: a program's registers hold a row, or several short ones

# A key is (block, descending confidence, position), most significant first.
POSITION_BITS = tl.constexpr(15)
BLOCK_SHIFT = tl.constexpr(47)
POSITION_MASK = tl.constexpr((1 << 15) - 1)
UNRANKABLE = tl.constexpr(0xFFFFFFFF)  # larger than any confidence's bits: ranked last in its block, never picked
NO_KEY = tl.constexpr((1 << 63) - 1)  # of a position that is not masked
NO_RULE = tl.constexpr(0)  # of a call without a threshold; the others are those of RULES, from 1 on
STRICT, FACTOR = (tl.constexpr(1 + RULES.index(rule)) for rule in ("strict", "factor"))
NOT_FILLED = tl.constexpr((1 << 31) - 1)  # of a position that no draft fills


@triton.jit
def descending(confidence):
    """Integers in [0, 2^32) that order as the confidences do, largest confidence first; UNRANKABLE for NaN and -inf."""
    bits = (confidence + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are equal confidences, hence + 0
    ordered = tl.where(bits < 0, bits, ~bits & 0x7FFFFFFF).to(tl.int64) & 0xFFFFFFFF
    return tl.where(confidence > float("-inf"), ordered, UNRANKABLE)


@triton.jit
def predicted_confidence(token, confidence, mask_token_id):
    """The confidence, -inf where the mask itself is predicted: a step never fills a position with the mask."""
    return tl.where(token == mask_token_id, float("-inf"), confidence)


@triton.jit
def position_keys(confidence, masked, position, block_length, LEFT_TO_RIGHT: tl.constexpr):
    """int64 keys that are smallest where unmasking comes first: lower block, higher confidence, lower position."""
    order = descending(confidence)
    if LEFT_TO_RIGHT:
        order = tl.where(order == UNRANKABLE, order, 0)
    block = (position // block_length).to(tl.int64)
    return tl.where(masked, (block << BLOCK_SHIFT) | (order << POSITION_BITS) | position, NO_KEY)


@triton.jit
def is_rankable(key):
    """Whether a position with this key may be picked; false for NO_KEY."""
    return ((key >> POSITION_BITS) & UNRANKABLE) != UNRANKABLE


@triton.jit
def first_ranked(keys, position, count):
    """The first `count` positions of the current block, the lowest with a masked position, that can be ranked."""
    block = tl.min(keys, axis=0) >> BLOCK_SHIFT
    picked = position < 0
    taken = 0
    going = taken < count
    while going:
        best = tl.min(keys, axis=0)
        going = is_rankable(best) & ((best >> BLOCK_SHIFT) == block)
        here = going & (position == (best & POSITION_MASK))
        picked = picked | here
        keys = tl.where(here, NO_KEY, keys)
        taken += 1
        going = going & (taken < count)
    return picked


@triton.jit
def passing(keys, confidence, masked, position, threshold, RULE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr):
    """Positions of the current block that pass the threshold; left to right, the leading run of masked ones that do."""
    in_block = masked & ((keys >> BLOCK_SHIFT) == (tl.min(keys, axis=0) >> BLOCK_SHIFT))
    if RULE >= FACTOR:  # or an entropy bound, which comes after it
        passes = passing_in_turn(keys, confidence, in_block, position, threshold, RULE, LEFT_TO_RIGHT)
    else:
        if RULE == STRICT:
            passes = in_block & is_rankable(keys) & (confidence > threshold)
        else:
            passes = in_block & is_rankable(keys) & (confidence >= threshold)
        if LEFT_TO_RIGHT:
            end = tl.min(tl.where(in_block & ~passes, position, POSITION_MASK), axis=0)
            passes = passes & (position < end)
    return passes


@triton.jit
def passing_in_turn(keys, confidence, in_block, position, threshold, RULE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr):
    """`passing` for rules that ask one position after the other, up to the first that fails. `in_block` are the masked
    positions of the current block.
    """
    left = in_block
    count = 0
    entropy = tl.full([], 0.0, tl.float64)
    going = threshold == threshold
    while going:
        # Left to right, a position that cannot be ranked keeps its place, and ends the run.
        if LEFT_TO_RIGHT:
            spot = tl.min(tl.where(left, position, POSITION_MASK), axis=0)
        else:
            spot = (tl.min(tl.where(left, keys, NO_KEY), axis=0) & POSITION_MASK).to(tl.int32)
        here = left & (position == spot)
        value = tl.sum(tl.where(here, confidence, 0.0), axis=0)
        if RULE == FACTOR:
            limit = 1.0 - threshold / (count + 2)
            going = (count == 0) | (value >= limit)
        else:
            entropy -= tl.minimum(value, 0.0).to(tl.float64)
            going = entropy < threshold
        going = (spot != POSITION_MASK) & (value > float("-inf")) & going
        left = left & ~(here & going)
        count += going.to(tl.int32)
    if RULE == FACTOR:  # a last position is not left alone
        alone = (count > 0) & (tl.sum(left.to(tl.int32), axis=0) == 1)
        left = left & ~(alone & (confidence > float("-inf")))
    return in_block & ~left


@triton.jit
def as_float64(number):
    """As confidences are compared with it. (An interpreted kernel gets Python's number, and takes that for a float32.)"""
    return tl.full([], number, tl.float64)


@triton.jit
def step_of(
    sequence, tokens_per_step, tokens_each, tokens_each_step, threshold, threshold_each, threshold_each_step, length,
    HAS_TOKENS_EACH: tl.constexpr, HAS_THRESHOLD_EACH: tl.constexpr,
):  # fmt: skip
    """A sequence's `tokens_per_step` and `threshold` (NaN: none): its own where each has one."""
    if HAS_TOKENS_EACH:
        tokens = tl.load(tokens_each + sequence * tokens_each_step).to(tl.int64)
        tokens_per_step = tl.minimum(tl.maximum(tokens, 1), length).to(tl.int32)
    if HAS_THRESHOLD_EACH:
        threshold = tl.load(threshold_each + sequence * threshold_each_step)
    return tokens_per_step, as_float64(threshold)


@triton.jit
def picks_of(tokens_per_step, threshold, RULE: tl.constexpr):
    """How many positions each draft after the first adds to the one before."""
    picks = tokens_per_step
    if RULE != NO_RULE:
        picks = tl.where(threshold == threshold, 1, tokens_per_step)
    return picks


@triton.jit
def static_step(
    keys,
    confidence,
    masked,
    position,
    tokens_per_step,
    threshold,
    RULE: tl.constexpr,
    LEFT_TO_RIGHT: tl.constexpr,
):
    """The positions that one step of static decoding unmasks."""
    if RULE != NO_RULE:
        picked = passing(keys, confidence, masked, position, threshold, RULE, LEFT_TO_RIGHT)
        if tl.max(picked.to(tl.int32), axis=0) == 0:
            picked = first_ranked(keys, position, tokens_per_step)
    else:
        picked = first_ranked(keys, position, tokens_per_step)
    return picked


@triton.jit
def plan_drafts(
    keys,
    confidence,
    masked,
    position,
    draft_steps,
    tokens_per_step,
    threshold,
    LENGTH: tl.constexpr,
    RULE: tl.constexpr,
    LEFT_TO_RIGHT: tl.constexpr,
):
    """Numbers each position with the nested draft that fills it, or NOT_FILLED, and counts the drafts.

    A draft never crosses a block. A masked position that cannot be ranked ends the plan after its block.
    """
    draft_of = tl.full([LENGTH], NOT_FILLED, tl.int32)
    planned = 0
    per_draft = picks_of(tokens_per_step, threshold, RULE)
    going = planned < draft_steps
    if RULE != NO_RULE:
        # Draft 0 fills what passes, or the first ranked where nothing does; every further draft fills one.
        first = static_step(keys, confidence, masked, position, tokens_per_step, threshold, RULE, LEFT_TO_RIGHT)
        draft_of = tl.where(first, 0, draft_of)
        keys = tl.where(first, NO_KEY, keys)
        planned = tl.max(first.to(tl.int32), axis=0)
        going = planned > 0

    filled = per_draft  # of the current draft; as if it were full, so that the first position begins another
    block = tl.min(keys, axis=0) >> BLOCK_SHIFT
    while going:
        best = tl.min(keys, axis=0)
        opens = (filled == per_draft) | ((best >> BLOCK_SHIFT) != block)
        going = is_rankable(best) & ~(opens & (planned == draft_steps))
        planned += (going & opens).to(tl.int32)
        filled = tl.where(opens, 1, filled + 1)
        block = best >> BLOCK_SHIFT
        here = going & (position == (best & POSITION_MASK))
        draft_of = tl.where(here, planned - 1, draft_of)
        keys = tl.where(here, NO_KEY, keys)
    return draft_of, planned


def rule_of(rule: str, threshold: float | None, threshold_per_row: torch.Tensor | None) -> int:
    """What kernels are compiled for: the rule, where there is a threshold."""
    return 0 if threshold is None and threshold_per_row is None else 1 + RULES.index(rule)


def expect_length(op: str, length: int, longest: int = MAX_LENGTH) -> None:
    if length > longest:
        raise BackendUnavailableError(
            f"{op}: backend 'triton' serves windows of at most {longest} positions, got {length}; use the backend "
            "'reference' for this call"
        )


def resources_for(elements: int) -> tuple[int, int]:
    """Warps of a program that holds `elements`, and the registers that a thread may take.

    A usual window fits a single warp, which reduces without shared memory. Such a program waits for its own results most of
    the time. It may take all registers: left alone, the compiler keeps some for other programs, and spills.
    """
    num_warps = min(16, max(1, elements // 256))
    return num_warps, min(255, 65536 // (32 * num_warps))
