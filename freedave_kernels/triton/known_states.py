"""The states that were forwarded, as a program sees them: input drafts first, then the pool's entries, numbered through.

A known state's number `k` and a position may each be one or many: a row of a state, a column of all, or a tile. Nothing is
copied: drafts lie in rows of positions, entries in rows of columns, each is read where it lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from freedave_kernels.triton.static_step import NOT_FILLED, position_keys, static_step

# A key of all known states is (distance, age, number) or (age, number), most significant first.
NUMBER_BITS = tl.constexpr(10)
NUMBER_MASK = tl.constexpr((1 << 10) - 1)
DISTANCE_SHIFT = tl.constexpr(51)  # leaves 41 bits for an age, which grows by the number of drafts a call
NO_STATE = tl.constexpr((1 << 63) - 1)

EFFECT = tl.constexpr(0.5)  # how much of a measured effect is expected at other states

MAX_STATES = 1 << NUMBER_BITS.value  # input drafts and entries of a pool


class Known(NamedTuple):
    """Where the known states of a sequence lie, and what is predicted at each."""

    drafts: Any
    token_ids: Any
    confidence: Any
    drafts_row: Any
    drafts_step: Any
    tokens_row: Any
    tokens_step: Any
    confidence_row: Any
    confidence_step: Any
    extents: Any
    extents_step: Any
    has_extents: Any
    """Whether `extents`, how many leading positions of each draft were computed, is given."""
    pool_states: Any
    pool_token_ids: Any
    pool_confidence: Any
    count: Any
    """Of input drafts; entry n has number `count + n`."""
    length: Any
    """L."""
    columns: Any
    """C."""
    origin: Any
    """The column of position 0."""
    position: Any
    """Of all columns, each once."""
    column: Any
    """Of each position."""
    stays: Any
    """Positions from here on were others when the entries were written: the entries know nothing of them."""
    mask_token_id: Any


class Census(NamedTuple):
    """A number for each known state, in the order of `k`."""

    k: Any
    live: Any
    age: Any
    """Larger is newer."""
    computed: Any
    """Leading positions of the window whose predictions are known."""


class Rule(NamedTuple):
    """Static decoding of a sequence."""

    mask_token_id: Any
    tokens_per_step: Any
    threshold: Any
    block_length: Any
    length: Any
    rule: Any
    left_to_right: Any
    eos_token_id: Any
    answer_start: Any
    has_eos: Any
    has_answer_start: Any


@triton.jit
def column_of(position, origin, columns):
    column = origin + position
    return tl.where(column < columns, column, column - columns)


@triton.jit
def state_at(known, k, position, column, wanted):
    """Tokens of known states; the mask where they are not `wanted`."""
    of_draft = k < known.count
    inside = wanted & (position < tl.where(of_draft, known.length, 0))
    place = k.to(tl.int64) * known.drafts_row + position.to(tl.int64) * known.drafts_step
    draft = tl.load(known.drafts + place, mask=inside, other=known.mask_token_id)
    inside = wanted & (position < tl.where(of_draft, 0, known.stays))
    entry = tl.load(
        known.pool_states + (k - known.count) * known.columns + column, mask=inside, other=known.mask_token_id
    )
    return tl.where(of_draft, draft, entry)


@triton.jit
def extent_of(known, k):
    """How many leading positions of draft `k` were computed."""
    extent = k * 0 + known.length
    if known.has_extents:
        given = tl.load(known.extents + k.to(tl.int64) * known.extents_step, mask=k < known.count, other=0)
        extent = tl.minimum(tl.maximum(given, 0), known.length).to(tl.int32)
    return extent


@triton.jit
def predictions_at(known, k, wanted):
    """Predicted tokens at known state `k` and their confidences, -inf where nothing was predicted or it is not `wanted`."""
    position = known.position.to(tl.int64)
    if k < known.count:
        row = k.to(tl.int64)
        inside = wanted & (known.position < known.length)
        place = row * known.drafts_row + position * known.drafts_step
        state = tl.load(known.drafts + place, mask=inside, other=known.mask_token_id)
        inside = wanted & (known.position < extent_of(known, k))
        place = row * known.tokens_row + position * known.tokens_step
        token = tl.where(inside, tl.load(known.token_ids + place, mask=inside, other=0), state)
        predicted = inside & (state == known.mask_token_id) & (token != known.mask_token_id)
        place = row * known.confidence_row + position * known.confidence_step
        value = tl.load(known.confidence + place, mask=predicted, other=float("-inf"))
    else:
        inside = wanted & (known.position < known.stays)
        place = ((k - known.count) * known.columns + known.column).to(tl.int64)
        token = tl.load(known.pool_token_ids + place, mask=inside, other=known.mask_token_id)
        value = tl.load(known.pool_confidence + place, mask=inside, other=float("-inf"))
    return token, value


@triton.jit
def compare(known, k, total, state, COUNT: tl.constexpr, TILE: tl.constexpr):
    """`[COUNT]` twice: in how many positions each known state differs from `state`, and in how many that are filled there."""
    distance = tl.zeros([COUNT], tl.int32)
    conflicts = tl.zeros([COUNT], tl.int32)
    for begin in range(0, total, TILE):
        row = begin + tl.arange(0, TILE)
        inside = (row < total)[:, None] & (known.position < known.columns)[None, :]
        there = state_at(known, row[:, None], known.position[None, :], known.column[None, :], inside)
        differs = inside & (there != state[None, :])
        of_row = tl.sum(differs.to(tl.int32), axis=1)
        distance += tl.sum(tl.where(k[:, None] == row[None, :], of_row[None, :], 0), axis=1)
        differs = differs & (state != known.mask_token_id)[None, :]
        of_row = tl.sum(differs.to(tl.int32), axis=1)
        conflicts += tl.sum(tl.where(k[:, None] == row[None, :], of_row[None, :], 0), axis=1)
    return distance, conflicts


@triton.jit
def additions(known, census, COUNT: tl.constexpr, TILE: tl.constexpr):
    """`[COUNT]` twice: of each draft that fills one position more than the draft before it, that position, else -1; and
    whether it is filled in draft 0, from which decoding goes on.

    The effect of filling it on the confidences elsewhere is measured: it is the difference of the two drafts' confidences.
    """
    adds = tl.full([COUNT], -1, tl.int32)
    for begin in range(0, known.count, TILE):
        row = begin + tl.arange(0, TILE)
        inside = ((row > 0) & (row < known.count))[:, None] & (known.position < known.length)[None, :]
        there = state_at(known, row[:, None], known.position[None, :], known.column[None, :], inside)
        before = state_at(known, row[:, None] - 1, known.position[None, :], known.column[None, :], inside)
        differs = inside & (there != before)
        count = tl.sum(tl.where(before == known.mask_token_id, 1, 2) * differs.to(tl.int32), axis=1)
        place = tl.sum(tl.where(differs, known.position[None, :], 0), axis=1)
        here = (census.k[:, None] == row[None, :]) & (count == 1)[None, :]
        adds = tl.maximum(adds, tl.max(tl.where(here, place[None, :], -1), axis=1))
    adds = tl.where(census.live, adds, -1)
    first = tl.zeros([], tl.int32)
    held = state_at(known, first, adds, column_of(adds, known.origin, known.columns), adds >= 0)
    return adds, held != known.mask_token_id


@triton.jit
def newest(census, distance, among, end):
    """Of the known states in `among`, the newest that is the state at work and is computed up to `end`; -1 where none is."""
    same = among & (distance == 0) & (census.computed >= end)
    best = tl.max(tl.where(same, (census.age << NUMBER_BITS) | census.k, -1), axis=0)
    return tl.where(best >= 0, best & NUMBER_MASK, -1).to(tl.int32)


@triton.jit
def newest_agreeing(census, conflicts, most):
    """The newest `most` known states without a conflict."""
    kept = census.live & (conflicts == 0)
    key = (census.age << NUMBER_BITS) | census.k
    excess = tl.sum(kept.to(tl.int32), axis=0) - most
    while excess > 0:
        kept = kept & (key != tl.min(tl.where(kept, key, NO_STATE), axis=0))
        excess -= 1
    return kept


@triton.jit
def foresee(known, census, distance, adds, added, wanted, state, LENGTH: tl.constexpr):
    """What to expect where `wanted`: as predicted at the nearest known state, the oldest of them, that predicts there.

    What is filled by now, but not in that state, has half the effects on the confidence that were measured (`additions`;
    those that are `added` are filled by now).
    """
    token = state
    value = tl.full([LENGTH], float("-inf"), tl.float32)
    key = (distance.to(tl.int64) << DISTANCE_SHIFT) | (census.age << NUMBER_BITS) | census.k
    key = tl.where(census.live, key, NO_STATE)
    nearest = tl.min(key, axis=0)
    while nearest != NO_STATE:
        k = (nearest & NUMBER_MASK).to(tl.int32)
        token_there, value_there = predictions_at(known, k, wanted)
        predicted = wanted & (value_there > float("-inf"))
        token = tl.where(predicted, token_there, token)
        value = tl.where(predicted, value_there, value)
        held = state_at(known, k, adds, column_of(adds, known.origin, known.columns), added)
        effects = added & (held == known.mask_token_id)
        draft = tl.min(tl.where(effects, census.k, NOT_FILLED), axis=0)
        while draft != NOT_FILLED:
            _, before = predictions_at(known, draft - 1, predicted)
            _, after = predictions_at(known, draft, predicted)
            measured = (before > float("-inf")) & (after > float("-inf"))
            value += tl.where(measured, EFFECT * (after - before), 0.0)
            draft = tl.min(tl.where(effects & (census.k > draft), census.k, NOT_FILLED), axis=0)
        wanted = wanted & ~predicted
        open_still = tl.max(wanted.to(tl.int32), axis=0) > 0
        nearest = tl.min(tl.where((key > nearest) & open_still, key, NO_STATE), axis=0)
    return token, value


@triton.jit
def current_block(rule, state, position):
    """Where the lowest block with a masked position begins and ends; twice the length where there is none."""
    masked = (position < rule.length) & (state == rule.mask_token_id)
    first = tl.min(tl.where(masked, position, rule.length), axis=0)
    begin = tl.where(first < rule.length, first // rule.block_length * rule.block_length, rule.length)
    return begin, tl.minimum(begin + rule.block_length, rule.length)


@triton.jit
def picks_at(rule, state, value, position):
    """The positions that a static step from `state` fills."""
    masked = (position < rule.length) & (state == rule.mask_token_id)
    keys = position_keys(value, masked, position, rule.block_length, rule.left_to_right)
    return static_step(
        keys, value, masked, position, rule.tokens_per_step, rule.threshold, rule.rule, rule.left_to_right
    )


@triton.jit
def fill(known, census, state, token, value, picked, distance, conflicts, adds, added, values):
    """Fills the picked positions of the state at work, in ascending order, which `values` is multiplied in.

    Returns the state, its distances from the known states and their conflicts with it, which of the positions in `adds` are
    filled, and `values` times the picked positions' confidences, taken for probabilities.
    """
    state = tl.where(picked, token, state)
    position = known.position
    spot = tl.min(tl.where(picked, position, NOT_FILLED), axis=0)
    while spot != NOT_FILLED:
        here = position == spot
        chosen = tl.sum(tl.where(here, token, 0), axis=0)
        certainty = tl.sum(tl.where(here, value, 0.0), axis=0)
        values = values * tl.minimum(tl.maximum(certainty, 0.0), 1.0)
        there = state_at(known, census.k, spot, column_of(spot, known.origin, known.columns), census.live)
        conflicts += (there != chosen).to(tl.int32)
        added = added | (adds == spot)
        distance += (there != chosen).to(tl.int32) - (there != known.mask_token_id).to(tl.int32)
        spot = tl.min(tl.where(picked & (position > spot), position, NOT_FILLED), axis=0)
    return state, distance, conflicts, added, values
