"""Everything between two forwards: which drafts were right, what is final, and the next drafts.

A program owns a sequence. Its state, one window, lies across the threads; input drafts are compared a tile of rows at a
time; the chain of accepted drafts, and each pick of the next drafts, is a reduction or two. One launch, whose time is the
latency of those reductions: a few for each step accepted and each draft built.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import COUNTERS, RecordLayout
from freedave_kernels.triton.launch import each_or, kernel, power_of_two
from freedave_kernels.triton.select_transfer import as_number
from freedave_kernels.triton.static_step import (
    BLOCK_SHIFT,
    NO_KEY,
    NOT_FILLED,
    POSITION_MASK,
    expect_length,
    is_rankable,
    picks_of,
    plan_drafts,
    position_keys,
    predicted_confidence,
    resources_for,
    rule_of,
    static_step,
    step_of,
)
from freedave_kernels.triton.verify_drafts import furthest_equal, tile_of

WIDTH = tl.constexpr(len(COUNTERS))


@triton.jit
def any_of(flags):
    return tl.max(flags.to(tl.int32), axis=0) > 0


@triton.jit
def count_of(flags):
    return tl.sum(flags.to(tl.int32), axis=0)


@triton.jit
def complete_prefix(masked, position, length, block_length):
    """How many positions the complete blocks before the first masked position hold."""
    first = tl.min(tl.where(masked, position, length), axis=0)
    return tl.where(first < length, first // block_length * block_length, length)


@triton.jit
def distances(
    drafts, state, k, active, position, length, row_stride, position_stride, COUNT: tl.constexpr, TILE: tl.constexpr
):
    """`[COUNT]`: in how many positions each input draft differs from `state`."""
    distance = tl.zeros([COUNT], tl.int32)
    for begin in range(0, active, TILE):
        row = begin + tl.arange(0, TILE)
        inside = (row < active)[:, None] & (position < length)[None, :]
        place = row.to(tl.int64)[:, None] * row_stride + position.to(tl.int64)[None, :] * position_stride
        draft = tl.load(drafts + place, mask=inside, other=0)
        differs = tl.sum((inside & (draft != state[None, :])).to(tl.int32), axis=1)
        if TILE == COUNT:
            distance = differs
        else:
            distance += tl.sum(tl.where(k[:, None] == row[None, :], differs[None, :], 0), axis=1)
    return distance


@triton.jit
def accept_chain(
    drafts, draft_at, token_at, confidence_at, active, position, length, open_before, state, tokens, value,
    mask_token_id, tokens_per_step, block_length, threshold, drafts_row, drafts_step, tokens_row, confidence_row,
    LENGTH: tl.constexpr, TILE: tl.constexpr, RULE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr, SUBSET: tl.constexpr,
):  # fmt: skip
    """Walks from draft 0 to the furthest later draft that is its target, the state one static step after it, and so on.

    Returns the draft where that ends, its state, its tokens and their confidence; the static step, counted from this call's
    first, that filled each position on the way; and how many steps filled any.
    """
    inside = position < length
    filled_by = tl.full([LENGTH], NOT_FILLED, tl.int32)
    accepted = 0
    steps = 0
    moving = active > 1
    while moving:
        masked = inside & (state == mask_token_id)
        keys = position_keys(value, masked, position, block_length, LEFT_TO_RIGHT)
        picked = static_step(keys, value, masked, position, tokens_per_step, threshold, RULE, LEFT_TO_RIGHT)
        target = tl.where(picked, tokens, state)
        furthest = furthest_equal(
            drafts, target, accepted, active, position, length, mask_token_id, drafts_row, drafts_step, TILE, SUBSET
        )
        moving = furthest > accepted
        if moving:
            accepted = furthest
            state = tl.load(draft_at + accepted.to(tl.int64) * drafts_row, mask=inside, other=0)
            tokens = tl.load(token_at + accepted.to(tl.int64) * tokens_row, mask=inside, other=0)
            value = tl.load(confidence_at + accepted.to(tl.int64) * confidence_row, mask=inside, other=0.0)
            value = predicted_confidence(tokens, value, mask_token_id)
            fresh = open_before & (state != mask_token_id) & (filled_by == NOT_FILLED)
            filled_by = tl.where(fresh, steps, filled_by)
            # A step that fills nothing is none: where nothing can be ranked, a draft's target is the draft itself.
            steps += any_of(fresh).to(tl.int32)
        moving = moving & (accepted + 1 < active)
    return accepted, state, tokens, value, filled_by, steps


@triton.jit
def fill_ranked(
    drafts, draft, distance, keys, token, picks, picking, k, active, position, mask_token_id, drafts_row, drafts_step
):
    """Fills the first `picks` ranked positions of the draft's current block. Returns the draft, its distances from the input
    drafts, and how many positions it has filled.
    """
    block = tl.min(keys, axis=0) >> BLOCK_SHIFT
    filled = 0
    while picking:
        best = tl.min(keys, axis=0)
        picking = is_rankable(best) & ((best >> BLOCK_SHIFT) == block)
        if picking:
            spot = best & POSITION_MASK
            here = position == spot
            chosen = tl.sum(tl.where(here, token, 0), axis=0)
            draft = tl.where(here, chosen, draft)
            keys = tl.where(here, NO_KEY, keys)
            there = tl.load(drafts + k.to(tl.int64) * drafts_row + spot * drafts_step, mask=k < active, other=0)
            distance += (there != chosen).to(tl.int32) - (there != mask_token_id).to(tl.int32)
            filled += 1
        picking = picking & (filled < picks)
    return draft, distance, filled


@triton.jit
def recycle_drafts(
    drafts, draft_at, token_at, confidence_at, next_at, draft, tokens, value, built, needs_forward, active, position, length,
    draft_steps, mask_token_id, picks, block_length, drafts_row, drafts_step, tokens_row, confidence_row,
    COUNT: tl.constexpr, TILE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr,
):  # fmt: skip
    """Writes the drafts after draft 0. Each takes the predictions of the input draft nearest to the draft before it; where
    that input draft has a token already, those of the accepted draft, `tokens` and `value`.

    A draft differs from the one before in the picked positions alone, so distances are updated, not counted again. Returns
    the last draft, how many there are, and how many of the leading ones need a forward.
    """
    inside = position < length
    k = tl.arange(0, COUNT)
    distance = distances(drafts, draft, k, active, position, length, drafts_row, drafts_step, COUNT, TILE)
    going = (built > 0) & (built < draft_steps)
    while going:
        lowest = tl.min(tl.where(k < active, distance, NOT_FILLED), axis=0)
        nearest = tl.min(tl.where((k < active) & (distance == lowest), k, COUNT), axis=0).to(tl.int64)
        open_there = tl.load(draft_at + nearest * drafts_row, mask=inside, other=0) == mask_token_id
        masked = inside & (draft == mask_token_id)
        known = masked & open_there
        token = tl.load(token_at + nearest * tokens_row, mask=known, other=0)
        token = tl.where(known, token, tokens)
        certainty = tl.load(confidence_at + nearest * confidence_row, mask=known, other=0.0)
        certainty = predicted_confidence(token, tl.where(known, certainty, value), mask_token_id)
        keys = position_keys(certainty, masked, position, block_length, LEFT_TO_RIGHT)
        draft, distance, filled = fill_ranked(
            drafts, draft, distance, keys, token, picks, built < draft_steps, k, active, position, mask_token_id,
            drafts_row, drafts_step,
        )  # fmt: skip
        going = filled > 0
        if going:
            tl.store(next_at + built * length, draft, mask=inside)
            open_still = any_of(inside & (draft == mask_token_id)) & (needs_forward == built)
            built += 1
            needs_forward += open_still.to(tl.int32)
        going = going & (built < draft_steps)
    return draft, built, needs_forward


@triton.jit
def nest_drafts(next_at, draft, draft_of, state, tokens, planned, needs_forward, inside, length, mask_token_id):
    """Writes the drafts after draft 0, all from the accepted draft's predictions. Returns the last one, and how many of the
    leading ones need a forward.
    """
    for n in range(1, planned):
        draft = tl.where(draft_of <= n, tokens, state)
        tl.store(next_at + n * length, draft, mask=inside)
        open_still = any_of(inside & (draft == mask_token_id)) & (needs_forward == n)
        needs_forward += open_still.to(tl.int32)
    return draft, needs_forward


@triton.jit
def has_ended(
    committed, position, complete, eos_token_id, start_at, HAS_EOS: tl.constexpr, HAS_ANSWER_START: tl.constexpr
):
    """1 where an end of sequence stands in the complete blocks, the prompt left out; else 0."""
    ended = 0
    if HAS_EOS:
        ends = (eos_token_id >= 0) & (committed == eos_token_id) & (position < complete)
        if HAS_ANSWER_START:
            ends = ends & (position >= tl.load(start_at))
        ended = any_of(ends).to(tl.int32)
    return ended


@triton.jit
def account(
    record, step_map_at, accepted, steps, built, needs_forward, filled_by, reusable, broken, open_before, committed,
    still_masked, position, length, block_length, eos_token_id, taken_at, start_at,
    HAS_EOS: tl.constexpr, HAS_TAKEN: tl.constexpr, HAS_ANSWER_START: tl.constexpr,
):  # fmt: skip
    """Writes the step map, and the counters in the order of COUNTERS.

    `reusable` is how many positions the accepted draft's complete blocks hold; `broken` are the masked positions of the
    current block, before the last step, without a prediction.
    """
    inside = position < length
    # What only the new draft 0 fills was committed by one more static step.
    fresh = open_before & ~still_masked & (filled_by == NOT_FILLED)
    step_map = tl.where(fresh, steps, filled_by).to(tl.int64)
    steps += any_of(fresh).to(tl.int32)
    if HAS_TAKEN:
        step_map += tl.load(taken_at)
    step_map = tl.where(open_before & ~still_masked, step_map, -1)
    tl.store(step_map_at, step_map, mask=inside)

    first_broken = tl.min(tl.where(broken, position, length), axis=0)
    complete = complete_prefix(still_masked, position, length, block_length)
    in_window = count_of(still_masked)
    ended = has_ended(committed, position, complete, eos_token_id, start_at, HAS_EOS, HAS_ANSWER_START)
    tl.store(record + 0, accepted)
    tl.store(record + 1, steps)
    tl.store(record + 2, count_of(step_map >= 0))
    tl.store(record + 3, count_of(still_masked & (position < complete + block_length)))
    tl.store(record + 4, in_window)
    tl.store(record + 5, reusable)
    tl.store(record + 6, needs_forward)
    tl.store(record + 7, ((ended > 0) | (in_window == 0)).to(tl.int32))
    tl.store(record + 8, tl.where(first_broken < length, first_broken, -1))
    tl.store(record + 9, built)
    tl.store(record + 10, ended)


@kernel()
def step_sequence(
    drafts, token_ids, confidence, num_drafts, taken, answer_start, tokens_each, threshold_each, eos_each, record,
    record_as_float, threshold: tl.float64, count: tl.int32, length: tl.int32, draft_steps: tl.int32,
    mask_token_id: tl.int64, tokens_per_step: tl.int32, block_length: tl.int32, eos_token_id: tl.int64,
    drafts_sequence: tl.int64, drafts_row: tl.int64, drafts_step: tl.int64,
    tokens_sequence: tl.int64, tokens_row: tl.int64, tokens_step: tl.int64,
    confidence_sequence: tl.int64, confidence_row: tl.int64, confidence_step: tl.int64,
    num_drafts_step: tl.int64, taken_step: tl.int64, answer_start_step: tl.int64, tokens_each_step: tl.int64,
    threshold_each_step: tl.int64, eos_each_step: tl.int64,
    LENGTH: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, RULE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr,
    RECYCLED: tl.constexpr, SUBSET: tl.constexpr, HAS_EOS: tl.constexpr, HAS_TAKEN: tl.constexpr, HAS_EOS_EACH: tl.constexpr,
    HAS_ANSWER_START: tl.constexpr, HAS_TOKENS_EACH: tl.constexpr, HAS_THRESHOLD_EACH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    drafts += sequence * drafts_sequence
    # A record: counters, token ids, the step map, the next drafts, and confidences, two in the place of an integer.
    confidence_place = WIDTH + (2 + draft_steps) * length
    width = confidence_place + (length + 1) // 2
    record += sequence * width
    record_as_float += 2 * (sequence * width + confidence_place)
    position = tl.arange(0, LENGTH)
    inside = position < length
    draft_at = drafts + position.to(tl.int64) * drafts_step
    token_at = token_ids + sequence * tokens_sequence + position.to(tl.int64) * tokens_step
    confidence_at = confidence + sequence * confidence_sequence + position.to(tl.int64) * confidence_step
    active = tl.load(num_drafts + sequence * num_drafts_step).to(tl.int64)
    active = tl.minimum(tl.maximum(active, 1), count).to(tl.int32)  # draft 0 is right by construction

    tokens_per_step, threshold = step_of(
        sequence, tokens_per_step, tokens_each, tokens_each_step, threshold, threshold_each, threshold_each_step, length,
        HAS_TOKENS_EACH, HAS_THRESHOLD_EACH,
    )  # fmt: skip
    eos_token_id = tl.load(eos_each + sequence * eos_each_step).to(tl.int64) if HAS_EOS_EACH else eos_token_id
    # Verify.
    given = tl.load(draft_at, mask=inside, other=0)
    open_before = inside & (given == mask_token_id)
    tokens = tl.load(token_at, mask=inside, other=0)
    value = predicted_confidence(tokens, tl.load(confidence_at, mask=inside, other=0.0), mask_token_id)
    accepted, state, tokens, value, filled_by, steps = accept_chain(
        drafts, draft_at, token_at, confidence_at, active, position, length, open_before, given, tokens, value,
        mask_token_id, tokens_per_step, block_length, threshold, drafts_row, drafts_step, tokens_row, confidence_row,
        LENGTH, TILE, RULE, LEFT_TO_RIGHT, SUBSET,
    )  # fmt: skip

    # Carry the accepted predictions over, and draft again from the accepted state.
    tl.store(record + WIDTH + position, tokens, mask=inside)
    tl.store(record_as_float + position, value, mask=inside)
    tl.store(record_as_float + length, 0.0, mask=length % 2 == 1)
    masked = inside & (state == mask_token_id)
    keys = position_keys(value, masked, position, block_length, LEFT_TO_RIGHT)
    most = 1 if RECYCLED else draft_steps
    draft_of, built = plan_drafts(
        keys, value, masked, position, most, tokens_per_step, threshold, LENGTH, RULE, LEFT_TO_RIGHT
    )
    committed = tl.where(draft_of == 0, tokens, state)  # draft 0 of the next, right by construction
    still_masked = inside & (committed == mask_token_id)
    next_at = record + WIDTH + 2 * length + position
    tl.store(next_at, committed, mask=inside)
    needs_forward = (any_of(still_masked) & (built > 0)).to(tl.int32)
    if RECYCLED:
        picks = picks_of(tokens_per_step, threshold, RULE)
        draft, built, needs_forward = recycle_drafts(
            drafts, draft_at, token_at, confidence_at, next_at, committed, tokens, value, built, needs_forward, active,
            position, length, draft_steps, mask_token_id, picks, block_length, drafts_row, drafts_step, tokens_row,
            confidence_row, COUNT, TILE, LEFT_TO_RIGHT,
        )  # fmt: skip
    else:
        draft, needs_forward = nest_drafts(
            next_at, committed, draft_of, state, tokens, built, needs_forward, inside, length, mask_token_id
        )
    for n in range(tl.maximum(built, 1), draft_steps):  # those beyond the last repeat it
        tl.store(next_at + n * length, draft, mask=inside)

    reusable = complete_prefix(masked, position, length, block_length)
    broken = masked & (position < reusable + block_length) & ~(value > float("-inf"))
    account(
        record, record + WIDTH + length + position, accepted, steps, built, needs_forward, filled_by, reusable, broken,
        open_before, committed, still_masked, position, length, block_length, eos_token_id, taken + sequence * taken_step,
        answer_start + sequence * answer_start_step, HAS_EOS, HAS_TAKEN, HAS_ANSWER_START,
    )  # fmt: skip


def draft_step(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int,
    tokens_per_step_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    order: str,
    block_length: int | None,
    drafting: str,
    match: str,
    eos_token_id: int | None,
    eos_token_id_per_row: torch.Tensor | None,
    step: torch.Tensor | None,
    answer_start: torch.Tensor | None,
) -> torch.Tensor:
    batch, count, length = drafts.shape
    expect_length("draft_step", length)
    record = drafts.new_empty((batch, RecordLayout.of(length, draft_steps).width))
    numbers = each_or(drafts, step, answer_start, tokens_per_step_per_row, threshold_per_row, eos_token_id_per_row)
    padded, tile = tile_of(count, length)
    step_sequence.launch(
        (batch, 1, 1),
        (
            drafts,
            token_ids,
            confidence,
            num_drafts,
            *numbers,
            record,
            record.view(torch.float32),
            as_number(threshold),
            count,
            length,
            draft_steps,
            mask_token_id,
            min(tokens_per_step, length),
            min(block_length or length, length),
            eos_token_id or 0,
            *drafts.stride(),
            *token_ids.stride(),
            *confidence.stride(),
            num_drafts.stride(0),
            *(number.stride(0) for number in numbers),
        ),
        (
            padded,
            power_of_two(count),
            tile,
            rule_of(rule, threshold, threshold_per_row),
            order == "left_to_right",
            drafting == "recycled",
            match == "subset",
            eos_token_id is not None or eos_token_id_per_row is not None,
            step is not None,
            eos_token_id_per_row is not None,
            answer_start is not None,
            tokens_per_step_per_row is not None,
            threshold_per_row is not None,
        ),
        (num_drafts.dtype, *(number.dtype for number in numbers[2:])),
        *resources_for(padded * tile),
    )
    return record
