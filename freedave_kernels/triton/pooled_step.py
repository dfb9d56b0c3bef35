"""Everything between two forwards where drafts are pooled: static decoding through all known states, and the next drafts.

A program owns a sequence. Its state at work, one window, lies across the threads, and so do the distances of all known
states from it, which are kept up to date as it is filled: finding it among them, at distance 0, is a reduction. The pool is
written last, when nothing of it will be read any more. One launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import BackendUnavailableError, RecordLayout
from freedave_kernels.triton.draft_step import WIDTH, account, any_of, complete_prefix, count_of, has_ended
from freedave_kernels.triton.known_states import (
    MAX_STATES,
    Census,
    Known,
    Rule,
    additions,
    column_of,
    compare,
    current_block,
    extent_of,
    fill,
    foresee,
    newest,
    newest_agreeing,
    picks_at,
    predictions_at,
    state_at,
)
from freedave_kernels.triton.launch import each_or, kernel, power_of_two
from freedave_kernels.triton.select_transfer import as_number
from freedave_kernels.triton.static_step import NOT_FILLED, expect_length, rule_of, step_of

DECAY = tl.constexpr(0.85)  # of a draft's score
LEAST_SCORE = tl.constexpr(1e-6)

# A candidate's key is (bits of its score, which is not negative, and -its index), so that the least one goes first.
SCORE_SHIFT = tl.constexpr(32)
INDEX_MASK = tl.constexpr((1 << 31) - 1)
NO_SLOT = tl.constexpr((1 << 63) - 1)

OP = "draft_step"  # what a user has called
WARP = 32  # a vector takes no fewer threads than these, so that shorter ones need no binary of their own
ELEMENTS = 128  # of a vector, in the registers of a warp
LONGEST = 1024  # positions: a multiprocessor has no registers for more
TILE_ELEMENTS = 512  # of known states that a warp compares at once


@triton.jit
def is_over(rule, state, position, begin):
    """Whether nothing is left to decode; `begin` is where the current block does."""
    ended = has_ended(state, position, begin, rule.eos_token_id, rule.answer_start, rule.has_eos, rule.has_answer_start)
    return (ended > 0) | (begin == rule.length)


@triton.jit
def verify(known, census, rule, state, distance, conflicts, adds, added, LENGTH: tl.constexpr):
    """Static decoding from draft 0 for as long as its states are known.

    Returns the last known state on the way; the state after it, with its distances and conflicts, which of `adds` are filled,
    and whether it is another;
    how many known states there were, and the number of the one at which each position was filled; the last draft among
    them, and how many positions its complete blocks hold.
    """
    position = known.position
    filled_at = tl.full([LENGTH], NOT_FILLED, tl.int32)
    at = tl.zeros([], tl.int32)
    last, accepted = (
        tl.full([], -1, tl.int32),
        at,
    )  # `last` as `at` would stay that: the compiler takes it for unchanged
    hops = 0
    certain = tl.full([], 1.0, tl.float32)
    begin, end = current_block(rule, state, position)
    serves = (begin < end) & (end <= extent_of(known, at))
    reusable = begin
    moved = serves
    while at >= 0:
        last = at
        accepted = tl.where(at < known.count, at, accepted)
        reusable = tl.where(at < known.count, begin, reusable)
        token, value = predictions_at(known, at, position < tl.where(serves, rule.length, 0))
        picked = picks_at(rule, state, value, position)
        filled_at = tl.where(picked, hops, filled_at)
        hops += 1
        state, distance, conflicts, added, _ = fill(
            known, census, state, token, value, picked, distance, conflicts, adds, added, certain
        )
        begin, end = current_block(rule, state, position)
        moved = any_of(picked)
        serves = moved & ~is_over(rule, state, position, begin)
        at = tl.where(serves, newest(census, distance, census.live, end), -1)
    return last, state, distance, conflicts, added, moved, hops, filled_at, accepted, reusable


@triton.jit
def admit(best, score, values, candidates, draft_steps, PIPELINED: tl.constexpr):
    """Whether another candidate, or any after it, can be one of the next drafts; and with it, the best so far.

    Scores fall, but for a later block, whose score falls with the values; ties go to the earlier. Candidate 0 is certain.
    """
    if PIPELINED:
        least = tl.min(best, axis=0)
        square = values * values
        at_most = tl.maximum(score, square * square).to(tl.int32, bitcast=True)
        room = (candidates == 0) | ((least >> SCORE_SHIFT) < at_most)
        key = score.to(tl.int32, bitcast=True).to(tl.int64) << SCORE_SHIFT
        key = key | (INDEX_MASK - candidates)
        best = tl.where(room & (candidates > 0) & (best == least) & (key > least), key, best)
    else:
        room = candidates < draft_steps
    return room, best


@triton.jit
def walk(
    known, census, rule, kept, state, distance, conflicts, adds, added, draft_steps, going,
    LENGTH: tl.constexpr, DRAFTS: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """Goes on from `state` as decoding is expected to: by what is known where the state is, else as foreseen.

    States of the second kind are candidates for the next drafts. Returns where that ends, the candidate after which each
    position was filled, how many candidates there were, and the keys of the best.
    """
    position = known.position
    after = tl.full([LENGTH], NOT_FILLED, tl.int32)
    slot = tl.arange(0, DRAFTS)
    best = tl.where(slot < draft_steps - 1, (-1 - slot).to(tl.int64), NO_SLOT)
    candidates = 0
    score = tl.full([], 1.0, tl.float32)
    values = score
    begin, end = current_block(rule, state, position)
    block = tl.full([], -1, tl.int32)  # as `begin` it would stay that: the compiler takes it for unchanged
    going = going & ~is_over(rule, state, position, begin)
    while going:
        if PIPELINED:
            square = values * values
            score = tl.where(begin != block, square * square, score)
        block = begin
        at = newest(census, distance, kept, end)
        if at >= 0:
            token, value = predictions_at(known, at, position < rule.length)
        else:
            going, best = admit(best, score, values, candidates, draft_steps, PIPELINED)
            candidates += going.to(tl.int32)
            score = score * DECAY
            wanted = (state == rule.mask_token_id) & (position < tl.where(going, end, 0))
            token, value = foresee(known, census, distance, adds, added, wanted, state, LENGTH)
        picked = picks_at(rule, state, value, position)
        after = tl.where(picked, candidates - 1, after)
        state, distance, conflicts, added, product = fill(
            known, census, state, token, value, picked, distance, conflicts, adds, added, values
        )
        values = tl.where(at >= 0, values, product)
        begin, end = current_block(rule, state, position)
        going = going & any_of(picked) & ~is_over(rule, state, position, begin) & (score > LEAST_SCORE)
    return state, after, candidates, best


@triton.jit
def write_drafts(
    next_at, committed, state, after, candidates, best, inside, length, draft_steps, moved, PIPELINED: tl.constexpr
):
    """Writes the next drafts: the committed state, the best candidates in the order of the walk, the last one repeated.

    Returns how many there are: none where nothing could be filled.
    """
    index = INDEX_MASK - (best & INDEX_MASK)
    used = (best >= 0) & (best != NO_SLOT)
    built = 1 + count_of(used) if PIPELINED else tl.maximum(candidates, 1)
    draft = committed
    tl.store(next_at, draft, mask=inside)
    chosen = tl.zeros([], tl.int64)
    for n in range(1, draft_steps):
        if n < built:
            if PIPELINED:
                chosen = tl.min(tl.where(used & (index > chosen), index, INDEX_MASK), axis=0)
            else:
                chosen += 1
            draft = tl.where(after < chosen, state, committed)
        tl.store(next_at + n * length, draft, mask=inside)
    return tl.where(moved, built, 0)


@triton.jit
def forget_what_was_left(known, entries, TILE: tl.constexpr):
    """Positions that the window has left make room for others."""
    for begin in range(0, entries, TILE):
        row = begin + tl.arange(0, TILE)
        left = (row < entries)[:, None] & ((known.position >= known.stays) & (known.position < known.columns))[None, :]
        place = row[:, None] * known.columns + known.column[None, :]
        tl.store(known.pool_states + place, known.mask_token_id, mask=left)
        tl.store(known.pool_token_ids + place, known.mask_token_id, mask=left)
        tl.store(known.pool_confidence + place, float("-inf"), mask=left)


@triton.jit
def write_pool(known, census, kept, entries, start, start_at, age_at, computed_at, TILE: tl.constexpr):
    """Entries that are kept stay where they are; drafts go where there is room, the oldest first."""
    tl.debug_barrier()  # whatever a thread still reads, another one may write now
    if known.stays < known.columns:
        forget_what_was_left(known, entries, TILE)
        tl.debug_barrier()  # a row that is written next may be among those
    k = census.k
    entry = k - known.count
    is_entry = (entry >= 0) & (entry < entries)
    age = tl.where(kept, census.age, 0)
    computed = tl.load(computed_at + entry, mask=is_entry, other=0)
    position = known.position
    inside = position < known.columns
    draft = tl.min(tl.where(kept & (k < known.count), k, NOT_FILLED), axis=0)
    while draft != NOT_FILLED:
        slot = tl.min(tl.where(is_entry & (age <= 0), k, NOT_FILLED), axis=0)
        age = tl.where(k == slot, tl.max(tl.where(k == draft, age, 0), axis=0), age)
        computed = tl.where(k == slot, start + extent_of(known, draft), computed)
        place = (slot - known.count) * known.columns + known.column
        token, value = predictions_at(known, draft, inside)
        tl.store(known.pool_states + place, state_at(known, draft, position, known.column, inside), mask=inside)
        tl.store(known.pool_token_ids + place, token, mask=inside)
        tl.store(known.pool_confidence + place, value, mask=inside)
        draft = tl.min(tl.where(kept & (k < known.count) & (k > draft), k, NOT_FILLED), axis=0)
    tl.store(age_at + entry, age, mask=is_entry)
    tl.store(computed_at + entry, computed, mask=is_entry)
    tl.store(start_at, start)


@triton.jit
def take_census(k, known, active, entries, start, age_at, computed_at, empty):
    """Who is known. With `empty`, no entry of the pool is."""
    entry = k - known.count
    of_entry = (entry >= 0) & (entry < tl.where(empty, 0, entries))
    age = tl.load(age_at + entry, mask=of_entry, other=0)
    until = tl.load(computed_at + entry, mask=of_entry, other=0) - start
    until = tl.minimum(tl.maximum(until, 0), known.length).to(tl.int32)
    of_draft = k < active
    clock = tl.maximum(tl.max(age, axis=0), 0)
    age = tl.where(of_draft, clock + 1 + k, age)
    return Census(k, age > 0, age, tl.where(of_draft, extent_of(known, k), until))


@triton.jit
def step_census(
    known, census, rule, entries, draft_steps, start, start_at, age_at, computed_at, record, sure_at, taken_at,
    LENGTH: tl.constexpr, KNOWN: tl.constexpr, DRAFTS: tl.constexpr, TILE: tl.constexpr, PIPELINED: tl.constexpr,
    HAS_TAKEN: tl.constexpr,
):  # fmt: skip
    """The step of a sequence whose pool and arguments have been found."""
    length, position = rule.length, known.position
    inside = position < length
    first = tl.zeros([], tl.int32)
    given = state_at(known, first, position, known.column, inside)
    distance, conflicts = compare(known, census.k, known.count + entries, given, KNOWN, TILE)
    adds, added = additions(known, census, KNOWN, TILE)
    last, committed, distance, conflicts, added, moved, hops, filled_at, accepted, reusable = verify(
        known, census, rule, given, distance, conflicts, adds, added, LENGTH
    )
    kept = newest_agreeing(census, conflicts, entries)
    state, after, candidates, best = walk(
        known, census, rule, kept, committed, distance, conflicts, adds, added, draft_steps, moved, LENGTH, DRAFTS,
        PIPELINED,
    )  # fmt: skip
    next_at = record + WIDTH + 2 * length + position
    built = write_drafts(
        next_at, committed, state, after, candidates, best, inside, length, draft_steps, moved, PIPELINED
    )

    token, value = predictions_at(known, last, inside)
    tl.store(record + WIDTH + position, token, mask=inside)
    tl.store(sure_at + position, value, mask=inside)
    if length % 2 == 1:
        tl.store(sure_at + length, 0.0)
    still_masked = inside & (committed == rule.mask_token_id)
    open_last = still_masked | (filled_at == hops - 1)  # before the last step
    begin = complete_prefix(open_last, position, length, rule.block_length)
    broken = open_last & (position < begin + rule.block_length) & ~(value > float("-inf"))
    # Every candidate is open.
    needs_forward = tl.where(any_of(still_masked), built, 0)
    account(
        record, record + WIDTH + length + position, accepted, hops - 1, built, needs_forward,
        tl.where(filled_at == hops - 1, NOT_FILLED, filled_at), reusable, broken,
        inside & (given == rule.mask_token_id), committed, still_masked, position, length, rule.block_length,
        rule.eos_token_id, taken_at, rule.answer_start, rule.has_eos, HAS_TAKEN, rule.has_answer_start,
    )  # fmt: skip
    write_pool(known, census, kept, entries, start, start_at, age_at, computed_at, TILE)


@kernel()
def step_pooled(
    drafts, token_ids, confidence, num_drafts, pool, pool_as_float, taken, answer_start, window_start, tokens_each,
    threshold_each, eos_each, computed_length, slots, forget, record, record_as_float, threshold: tl.float64,
    count: tl.int32, length: tl.int32, draft_steps: tl.int32, num_slots: tl.int32, entries: tl.int32, columns: tl.int32,
    mask_token_id: tl.int64, tokens_per_step: tl.int32, block_length: tl.int32, eos_token_id: tl.int64,
    drafts_sequence: tl.int64, drafts_row: tl.int64, drafts_step: tl.int64,
    tokens_sequence: tl.int64, tokens_row: tl.int64, tokens_step: tl.int64,
    confidence_sequence: tl.int64, confidence_row: tl.int64, confidence_step: tl.int64,
    num_drafts_step: tl.int64, taken_step: tl.int64, answer_start_step: tl.int64, window_start_step: tl.int64,
    tokens_each_step: tl.int64, threshold_each_step: tl.int64, eos_each_step: tl.int64,
    computed_sequence: tl.int64, computed_step: tl.int64, slots_step: tl.int64, forget_step: tl.int64,
    LENGTH: tl.constexpr, KNOWN: tl.constexpr, DRAFTS: tl.constexpr, TILE: tl.constexpr,
    RULE: tl.constexpr, LEFT_TO_RIGHT: tl.constexpr, PIPELINED: tl.constexpr, HAS_EOS: tl.constexpr,
    HAS_TAKEN: tl.constexpr, HAS_ANSWER_START: tl.constexpr, HAS_WINDOW_START: tl.constexpr,
    HAS_TOKENS_EACH: tl.constexpr, HAS_THRESHOLD_EACH: tl.constexpr, HAS_EOS_EACH: tl.constexpr,
    HAS_COMPUTED: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_FORGET: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, LENGTH)
    # A slot of the pool, in the order of PoolLayout; confidences stand two in the place of an integer.
    slot = tl.load(slots + sequence * slots_step).to(tl.int64) if HAS_SLOTS else sequence
    slot = tl.minimum(tl.maximum(slot, 0), num_slots - 1)
    size = entries.to(tl.int64) * columns
    sure_place = 2 * size + 2 * entries + 1
    pool_width = sure_place + (size + 1) // 2
    pool += slot * pool_width
    computed_at = pool + 2 * size
    age_at = computed_at + entries
    start_at = age_at + entries
    sure_at = pool_as_float + 2 * (slot * pool_width + sure_place)

    start = tl.load(window_start + sequence * window_start_step) if HAS_WINDOW_START else sequence * 0
    gone = start - tl.load(start_at)
    slid = (gone >= 0) & (gone < columns)  # else a new start
    empty = ~slid
    if HAS_FORGET:
        empty = empty | (tl.load(forget + sequence * forget_step) != 0)
    origin = start % columns
    origin = tl.where(origin < 0, origin + columns, origin).to(tl.int32)
    known = Known(
        drafts + sequence * drafts_sequence, token_ids + sequence * tokens_sequence,
        confidence + sequence * confidence_sequence, drafts_row, drafts_step, tokens_row, tokens_step, confidence_row,
        confidence_step, computed_length + sequence * computed_sequence, computed_step, HAS_COMPUTED,
        pool, pool + size, sure_at, count, length, columns, origin, position, column_of(position, origin, columns),
        (columns - tl.where(slid, gone, 0)).to(tl.int32), mask_token_id,
    )  # fmt: skip
    tokens_per_step, threshold = step_of(
        sequence, tokens_per_step, tokens_each, tokens_each_step, threshold, threshold_each, threshold_each_step, length,
        HAS_TOKENS_EACH, HAS_THRESHOLD_EACH,
    )  # fmt: skip
    if HAS_EOS_EACH:
        eos_token_id = tl.load(eos_each + sequence * eos_each_step).to(tl.int64)
    rule = Rule(
        mask_token_id, tokens_per_step, threshold, block_length, length, RULE, LEFT_TO_RIGHT,
        eos_token_id, answer_start + sequence * answer_start_step, HAS_EOS, HAS_ANSWER_START,
    )  # fmt: skip
    active = tl.load(num_drafts + sequence * num_drafts_step).to(tl.int64)
    active = tl.minimum(tl.maximum(active, 1), count).to(tl.int32)  # draft 0 is right by construction
    # A record: counters, token ids, the step map, the next drafts, and confidences, two in the place of an integer.
    sure_in_record = WIDTH + (2 + draft_steps) * length
    width = sure_in_record + (length + 1) // 2
    census = take_census(tl.arange(0, KNOWN), known, active, entries, start, age_at, computed_at, empty)
    step_census(
        known, census, rule, entries, draft_steps, start, start_at, age_at, computed_at,
        record + sequence * width, record_as_float + 2 * (sequence * width + sure_in_record), taken + sequence * taken_step,
        LENGTH, KNOWN, DRAFTS, TILE, PIPELINED, HAS_TAKEN,
    )  # fmt: skip


def pooled_step(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    pool: torch.Tensor,
    pool_states: int,
    pool_length: int,
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
    eos_token_id: int | None,
    eos_token_id_per_row: torch.Tensor | None,
    step: torch.Tensor | None,
    answer_start: torch.Tensor | None,
    window_start: torch.Tensor | None,
    computed_length: torch.Tensor | None,
    slots: torch.Tensor | None,
    forget: torch.Tensor | None,
) -> torch.Tensor:
    batch, count, length = drafts.shape
    expect_length(OP, pool_length, LONGEST)
    if count + pool_states > MAX_STATES:
        raise BackendUnavailableError(
            f"{OP}: backend 'triton' serves at most {MAX_STATES} drafts and states of a pool together, got {count} and "
            f"{pool_states}; use the backend 'reference' for this call"
        )
    record = drafts.new_empty((batch, RecordLayout.of(length, draft_steps).width))
    numbers = each_or(
        drafts, step, answer_start, window_start, tokens_per_step_per_row, threshold_per_row, eos_token_id_per_row
    )
    computed = drafts[:, 0] if computed_length is None else computed_length
    places, forgotten = each_or(num_drafts, slots, forget)
    padded, known = max(WARP, power_of_two(pool_length)), max(WARP, power_of_two(count + pool_states))
    num_warps = max(1, max(padded, known) // ELEMENTS)
    step_pooled.launch(
        (batch, 1, 1),
        (drafts, token_ids, confidence, num_drafts, pool, pool.view(torch.float32), *numbers, computed, places, forgotten,
         record, record.view(torch.float32), as_number(threshold), count, length, draft_steps, pool.shape[0], pool_states,
         pool_length, mask_token_id, min(tokens_per_step, length), min(block_length or length, length), eos_token_id or 0,
         *drafts.stride(), *token_ids.stride(), *confidence.stride(), num_drafts.stride(0),
         *(number.stride(0) for number in numbers), *computed.stride(), places.stride(0), forgotten.stride(0)),
        (padded, known, max(WARP, power_of_two(draft_steps)), max(1, TILE_ELEMENTS * num_warps // padded),
         rule_of(rule, threshold, threshold_per_row), order == "left_to_right", drafting == "pipelined",
         eos_token_id is not None or eos_token_id_per_row is not None,
         *(given is not None for given in (step, answer_start, window_start, tokens_per_step_per_row, threshold_per_row,
                                           eos_token_id_per_row, computed_length, slots, forget))),
        (num_drafts.dtype, *(number.dtype for number in numbers[3:]), places.dtype, forgotten.dtype),
        num_warps,
        max_registers=255,  # such a program waits for its own results most of the time, so it may take all
    )  # fmt: skip
    return record
