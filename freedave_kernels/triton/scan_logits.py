"""The pass over the vocabulary: the softmax of each chunk of the logits of each masked row, as a state.

A program owns one chunk of one row. It holds the chunk in registers, in groups of 8 logits a thread (one 16-byte load):
the groups' maxima, then the chunk's, then one sum relative to it, so nothing is ever rescaled. It leaves a state, as
ops/partial_predictions.py describes it; merge_predictions.py merges those of a row. Chunks depend on the vocabulary alone:
neither the batch nor the number of SMs can change a bit. Programs of rows that are not masked store the neutral state and
read no logit. Nine instructions an element: bound by memory. With drawn tokens 30, most of them for the words of their noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import STATE_FIELDS
from freedave_kernels.triton.launch import ceil_div, kernel, outer_stride, short_range
from freedave_kernels.triton.sampling import noise_of, word_of, words_of
from freedave_kernels.triton.tunables import tunables

VECTOR_BYTES = 16
MAX_GRID_Y = 65535

FIELDS = tl.constexpr(STATE_FIELDS)
LOG2_E = tl.constexpr(1.4426950216293335)  # the nearest float32, and what it lacks
LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)
# exp(x - max) of a confident row's tail lies below what float32 holds, and is all that its entropy consists of.
SCALE = tl.constexpr(18446744073709551616.0)  # 2^64
UNIT = tl.constexpr(1 / 18446744073709551616.0)
NEVER = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least float32 that is one


class Needs(NamedTuple):
    """What a measure of confidence needs of the scan, beside the largest logit and the sum of exponentials."""

    second: bool = False
    """The second largest logit, equal to the largest on a tie."""
    entropy: bool = False
    """Terms weighted by their logits; and those of the largest logit counted apart from all others."""
    others: bool = False
    """The terms of all tokens but the chosen one, apart from its 1."""


# A measure that is missing here has no scan: looking it up fails.
NEEDS = {
    "prob": Needs(),
    "margin": Needs(second=True),
    "neg_entropy": Needs(entropy=True),
    "log_odds": Needs(others=True),
}


@triton.jit
def load_groups(
    row,
    lane,
    first,
    limit,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """float32 logits `[LANES, WIDTH]`: places BEGIN and on of each lane's group, in a chunk that starts at token `first`.

    VECTOR are as many as one load may fetch. Narrower loads are joined to what the widest would have brought, in the
    same threads: a row gives the same bits however it is aligned. MASKED: -inf for tokens from `limit` on.
    """
    if WIDTH == VECTOR:
        if row.dtype.element_ty == tl.bfloat16 and VECTOR > 1:
            # Two a word: each becomes a float32 in one instruction. As 16-bit values they would be unpacked first.
            place = lane[:, None] * (GROUP // 2) + BEGIN // 2 + tl.arange(0, WIDTH // 2)[None, :]
            words = (row + first).to(tl.pointer_type(tl.uint32), bitcast=True) + place
            if MASKED:
                pair = tl.load(words, mask=first + 2 * place < limit, other=0xFF80FF80)
            else:
                pair = tl.load(words)
            low = (pair << 16).to(tl.float32, bitcast=True)
            high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
            return tl.reshape(tl.join(low, high), [lane.shape[0], WIDTH])
        else:
            place = lane[:, None] * GROUP + BEGIN + tl.arange(0, WIDTH)[None, :]
            if MASKED:
                return tl.load(row + first + place, mask=first + place < limit, other=NEVER).to(tl.float32)
            else:
                return tl.load(row + first + place).to(tl.float32)
    else:
        HALF: tl.constexpr = WIDTH // 2
        left = load_groups(row, lane, first, limit, MASKED, GROUP, BEGIN, HALF, VECTOR)
        right = load_groups(row, lane, first, limit, MASKED, GROUP, BEGIN + HALF, HALF, VECTOR)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [lane.shape[0], WIDTH])


@triton.jit
def sum_of_groups(x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """`[LANES]`: each group's sum, as a balanced tree over places, whatever registers they lie in."""
    if WIDTH == 1:
        return tl.reshape(x, [LANES])
    else:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(x, [LANES, 2, HALF]), (0, 2, 1)))
        return sum_of_groups(left + right, LANES, HALF)


@triton.jit
def top_two_of_groups(x, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """`[LANES, 1]` twice: each group's largest and second largest element, equal ones counted twice."""
    HALF: tl.constexpr = WIDTH // 2
    left, right = tl.split(tl.permute(tl.reshape(x, [LANES, 2, HALF]), (0, 2, 1)))
    first = tl.maximum(left, right)
    second = tl.minimum(left, right)
    return merge_top_two(first, second, LANES, HALF)


@triton.jit
def merge_top_two(first, second, LANES: tl.constexpr, WIDTH: tl.constexpr):
    if WIDTH == 1:
        return tl.reshape(first, [LANES]), tl.reshape(second, [LANES])
    else:
        HALF: tl.constexpr = WIDTH // 2
        first_a, first_b = tl.split(tl.permute(tl.reshape(first, [LANES, 2, HALF]), (0, 2, 1)))
        second_a, second_b = tl.split(tl.permute(tl.reshape(second, [LANES, 2, HALF]), (0, 2, 1)))
        runner_up = tl.maximum(tl.minimum(first_a, first_b), tl.maximum(second_a, second_b))
        return merge_top_two(tl.maximum(first_a, first_b), runner_up, LANES, HALF)


@triton.jit
def is_masked(input_ids, mask_index, mask_token_id, HAS_MASK_INDEX: tl.constexpr):
    """What the pointers say: a position is masked by `mask_index` where there is one, else by its token."""
    if HAS_MASK_INDEX:
        return tl.load(mask_index) != 0
    else:
        return tl.load(input_ids) == mask_token_id


@triton.jit
def row_start(outer, position, outer_stride, position_stride, SHIFT: tl.constexpr, VECTOR: tl.constexpr):
    """Where a position's logits begin; in a shifted model's row before its own, except for the first."""
    if SHIFT:
        position = tl.maximum(position - 1, 0)
    start = outer.to(tl.int64) * outer_stride + position.to(tl.int64) * position_stride
    return tl.multiple_of(start, VECTOR)


@triton.jit
def load_chunk(row, lane, first, vocab, GROUP: tl.constexpr, VECTOR: tl.constexpr, TAIL_VECTOR: tl.constexpr):
    """float32 logits `[LANES, GROUP]` from token `first` on. Only a row's last chunk compares tokens with the vocabulary."""
    if first + lane.shape[0] * GROUP <= vocab:
        x = load_groups(row, lane, first, vocab, False, GROUP, 0, GROUP, VECTOR)
    else:
        limit = vocab // TAIL_VECTOR * TAIL_VECTOR  # the vocabulary, known to be divisible
        x = load_groups(row, lane, first, limit, True, GROUP, 0, GROUP, TAIL_VECTOR)
    return x  # one return: with two, Triton would move the chunk to another layout through shared memory


@triton.jit
def hide_suppressed(x, lane, suppress_tokens, num_suppressed, suppressed_step, first_id, GROUP: tl.constexpr):
    """The chunk, whose first token has the id `first_id`, with suppressed tokens at -inf: even a NaN is not looked at."""
    # One bit a place: the loop holds a word a group.
    hidden = tl.zeros([lane.shape[0]], tl.int32)
    found = 0
    for s in range(num_suppressed):
        place = tl.load(suppress_tokens + s * suppressed_step) - first_id
        if (place >= 0) & (place < lane.shape[0] * GROUP):
            hidden |= tl.where(lane == place // GROUP, 1 << (place % GROUP).to(tl.int32), 0)
            found += 1
    if found > 0:
        x = tl.where((hidden[:, None] >> tl.arange(0, GROUP)[None, :]) & 1 == 1, NEVER, x)
    return x


@triton.jit
def logits_of(
    row,
    token,
    vocab,
    suppress_tokens,
    num_suppressed,
    suppressed_step,
    first_token_id,
    scale,
    floor,
    HAS_SUPPRESSED: tl.constexpr,
    DRAWN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):
    """The logits of some tokens as the chunk has them, loaded again: float32, -inf where there is none to choose."""
    x = tl.load(row + token, mask=token < vocab, other=NEVER).to(tl.float32)
    if HAS_FLOOR:
        x = tl.where(x < floor, NEVER, x)
    if DRAWN:
        x *= scale
    if HAS_SUPPRESSED:
        for s in range(num_suppressed):
            x = tl.where(token == tl.load(suppress_tokens + s * suppressed_step) - first_token_id, NEVER, x)
    return x


@triton.jit
def lowest_token(x, token, vocab, logit, first_token_id):
    """The id of the first of the tokens `token` whose logit in x is `logit`, or -1: for -inf and NaN. And the terms of the
    others of them, relative to it.
    """
    found = tl.min(tl.where(x == logit, token, vocab), axis=0)
    below = x - tl.where(logit == NEVER, 0.0, logit)
    others = tl.sum(tl.where(token == found, 0.0, tl.exp2(below * LOG2_E)), axis=0)
    return tl.where(logit > NEVER, found + first_token_id, -1), others


@triton.jit
def scaled_terms(x, largest, below):
    """2^64 exp(x - max) to full float32 precision, and x - max clamped to where such a term is 0.

    In a peaked row the terms lie far below 1, where rounding x - max and its product with log2(e) would show in their
    digits. What was rounded off is known exactly; exp(d + lost) = exp(d) (1 + lost).
    """
    minus_largest = below - x
    lost = (x - (below - minus_largest)) - (largest + minus_largest)
    negligible = below < -256.0  # also -inf, of which nothing may be subtracted; not NaN, which must stay
    below = tl.where(negligible, -256.0, below)
    lost = tl.where(negligible, 0.0, lost)
    exponent = below * LOG2_E
    lost += LN_2 * (tl.fma(below, LOG2_E, -exponent) + below * LOG2_E_REST)
    # 64 is added where that is exact: to exponents beyond -32; the others' terms are scaled by multiplication.
    tiny = exponent < -32.0
    power = tl.exp2(tl.where(tiny, exponent + 64.0, exponent)) * tl.where(tiny, 1.0, SCALE)
    return below, tl.fma(power, lost, power)


@triton.jit
def sums_below(
    x,
    largest,
    lane,
    group,
    others,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """How many logits equal the largest, sum exp(x - largest) and sum (x - largest) exp(x - largest), in float64.

    The last is 0 where ENTROPY is false, and so is the first: then the logits that equal the largest are in the second. With
    OTHERS the first is the chosen token alone, and the lane `group`, which has it, counts as what is beside it: `others`.
    """
    # x - max comes first, exactly: folded into the multiplication, a large maximum would cost digits.
    below = x - tl.where(largest == NEVER, 0.0, largest)
    ties = tl.full([], 0.0, tl.float64)
    weighted = tl.full([], 0.0, tl.float64)
    if ENTROPY:
        is_top = x == largest
        below, term = scaled_terms(x, largest, below)
        term = tl.where(is_top, 0.0, term)
        equal = tl.sum(sum_of_groups(is_top.to(tl.float32), LANES, GROUP), axis=0)
        ties = tl.where(largest > NEVER, equal, 0.0).to(tl.float64)  # where there is nothing, everything equals it
        weighted = tl.sum(sum_of_groups(term * below, LANES, GROUP), axis=0).to(tl.float64) * UNIT
        rest = tl.sum(sum_of_groups(term, LANES, GROUP), axis=0).to(tl.float64) * UNIT
    else:
        terms = sum_of_groups(tl.exp2(below * LOG2_E), LANES, GROUP)
        if OTHERS:
            terms = tl.where(lane == group, others, terms)
            ties = tl.where(largest > NEVER, 1.0, 0.0).to(tl.float64)
        rest = tl.sum(terms, axis=0).to(tl.float64)
    return ties, rest, weighted


@triton.jit
def most_noisy_of_quads(x, seed, position, first_id, lane, GROUP: tl.constexpr):
    """`[LANES, GROUP // 4]`: what no token of four neighbours comes to more than, with its noise; -inf where all are.

    Their largest logit with their smallest word: with w the uniform number, noise is at most -log w. Here w lacks its last
    bits; what rounding takes away is left to `bar_below`.
    """
    QUADS: tl.constexpr = GROUP // 4
    quad = first_id // 4 + lane[:, None] * QUADS + tl.arange(0, QUADS)[None, :]
    first, second, third, fourth = words_of(quad, seed, position)
    word = tl.minimum(tl.minimum(first, second), tl.minimum(third, fourth))
    w = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    top = tl.max(tl.reshape(x, [lane.shape[0], QUADS, 4]), axis=2)
    most = tl.fma(tl.log2(w), -LN_2, top)
    return tl.where(top > NEVER, most, NEVER)


@triton.jit
def bar_below(noisy):
    """What cannot reach this loses against `noisy`, which is rounded to its own precision; bounds are too low by 2e-5."""
    return noisy - (tl.abs(noisy) * 2.3841858e-07 + 1e-4)


@triton.jit
def draw_token(
    x,
    bar,
    lane,
    seed,
    position,
    row,
    first,
    vocab,
    suppress_tokens,
    num_suppressed,
    suppressed_step,
    first_token_id,
    scale,
    floor,
    GROUP: tl.constexpr,
    HAS_SUPPRESSED: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):
    """Of a chunk, the token with the largest noisy logit (the lowest of equal ones; -1 where there is none), that logit, and
    without its noise. What does not reach `bar` is not drawn.

    Noise takes more than all else that is done with a logit, and few tokens need it: one quad after the other is looked at,
    from that with the largest bound down, until no bound reaches what was found. What is left out loses for certain.
    """
    QUADS: tl.constexpr = GROUP // 4
    most = most_noisy_of_quads(x, seed, position, first_token_id + first, lane, GROUP)
    token, noisy, logit = tl.full([], -1, tl.int64), tl.full([], NEVER, tl.float32), tl.full([], 0.0, tl.float32)
    place = lane[:, None] * QUADS + tl.arange(0, QUADS)[None, :]
    highest = tl.max(tl.max(most, axis=1), axis=0)
    while highest >= bar:
        quad = tl.min(tl.min(tl.where(most == highest, place, lane.shape[0] * QUADS), axis=1), axis=0)
        four = first + quad * 4 + tl.arange(0, 4)
        y = logits_of(
            row, four, vocab, suppress_tokens, num_suppressed, suppressed_step, first_token_id, scale, floor,
            HAS_SUPPRESSED, True, HAS_FLOOR,
        )  # fmt: skip
        noisy_four = y + noise_of(word_of(first_token_id + four, seed, position))
        best = tl.max(noisy_four, axis=0)
        chosen = tl.min(tl.where(noisy_four == best, four, vocab), axis=0)
        wins = (best > noisy) | ((best == noisy) & (first_token_id + chosen < token))
        wins &= best > NEVER
        logit = tl.where(wins, tl.max(tl.where(four == chosen, y, NEVER), axis=0), logit)
        token = tl.where(wins, first_token_id + chosen, token)
        noisy = tl.where(wins, best, noisy)
        bar = tl.maximum(bar, tl.where(noisy < float("inf"), bar_below(noisy), noisy))
        most = tl.where(place == quad, NEVER, most)
        highest = tl.max(tl.max(most, axis=1), axis=0)
    return token, noisy, logit


@triton.jit
def store_state(state, largest, second, token, ties, rest, weighted):
    tl.store(state, largest.to(tl.float64))
    tl.store(state + 1, second.to(tl.float64))
    tl.store(state + 2, token.to(tl.float64))
    tl.store(state + 3, ties)
    tl.store(state + 4, rest)
    tl.store(state + 5, weighted)


@triton.jit
def store_neutral_state(state):
    """Of a chunk of which nothing is known: merged with any other, it changes nothing."""
    never, zero = tl.full([], NEVER, tl.float64), tl.full([], 0.0, tl.float64)
    store_state(state, never, never, tl.full([], -1, tl.int64), zero, zero, zero)


@kernel(aligned=("logits",))
def scan_chunk(
    logits, input_ids, mask_index, suppress_tokens, states,
    length: tl.int32, vocab: tl.int32, mask_token_id: tl.int64, first_token_id: tl.int64,
    num_suppressed: tl.int32, suppressed_step: tl.int64,
    logits_outer: tl.int64, logits_position: tl.int64,
    ids_outer: tl.int64, ids_position: tl.int64,
    mask_outer: tl.int64, mask_position: tl.int64,
    temperature, seed, positions, floor,
    temperature_outer: tl.int64, temperature_position: tl.int64,
    seed_outer: tl.int64, seed_position: tl.int64,
    positions_outer: tl.int64, positions_position: tl.int64,
    floor_outer: tl.int64, floor_position: tl.int64,
    LANES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, TAIL_VECTOR: tl.constexpr,
    POSITION_AXIS: tl.constexpr, SECOND: tl.constexpr, ENTROPY: tl.constexpr, OTHERS: tl.constexpr,
    SHIFT: tl.constexpr, HAS_MASK_INDEX: tl.constexpr, HAS_SUPPRESSED: tl.constexpr, DRAWN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    outer, position, chunk = tl.program_id(POSITION_AXIS ^ 1), tl.program_id(POSITION_AXIS), tl.program_id(2)
    nth_row = (outer * length + position).to(tl.uint32)  # unsigned, so that the product takes one instruction
    state = states + (nth_row.to(tl.int64) * tl.num_programs(2) + chunk) * FIELDS
    ids = input_ids + outer.to(tl.int64) * ids_outer + position.to(tl.int64) * ids_position
    mask = mask_index + outer.to(tl.int64) * mask_outer + position.to(tl.int64) * mask_position
    if not is_masked(ids, mask, mask_token_id, HAS_MASK_INDEX):
        store_neutral_state(state)
        return

    # The whole chunk, in registers.
    first = chunk * (LANES * GROUP)
    lane = tl.arange(0, LANES)
    row = logits + row_start(outer, position, logits_outer, logits_position, SHIFT, VECTOR)
    x = load_chunk(row, lane, first, vocab, GROUP, VECTOR, TAIL_VECTOR)
    least = tl.full([], NEVER, tl.float32)
    if HAS_FLOOR:
        least = tl.load(floor + outer.to(tl.int64) * floor_outer + position.to(tl.int64) * floor_position)
        x = tl.where(x < least, NEVER, x)
    scale, draws = tl.full([], 1.0, tl.float32), True
    if DRAWN:
        place = outer.to(tl.int64) * temperature_outer + position.to(tl.int64) * temperature_position
        divisor = tl.load(temperature + place)
        draws = divisor > 0.0
        scale = tl.where(draws, tl.div_rn(1.0, divisor), 1.0)
        x *= scale
    if HAS_SUPPRESSED:
        x = hide_suppressed(x, lane, suppress_tokens, num_suppressed, suppressed_step, first_token_id + first, GROUP)

    # The maximum of each group, then of the chunk. A NaN is passed over here; the sum finds it.
    if SECOND:
        top, runner_up = top_two_of_groups(x, LANES, GROUP)
    else:
        top = tl.max(x, axis=1)
    largest = tl.max(top, axis=0)
    group = tl.min(tl.where(top == largest, lane, LANES), axis=0)

    # The token: the first place of that group, whose logits are loaded again while the sum is worked out.
    near = first + group * GROUP + tl.arange(0, GROUP)
    y = logits_of(
        row, near, vocab, suppress_tokens, num_suppressed, suppressed_step, first_token_id, scale, least,
        HAS_SUPPRESSED, DRAWN, HAS_FLOOR,
    )  # fmt: skip
    token, others = lowest_token(y, near, vocab, largest, first_token_id)
    second = tl.full([], NEVER, tl.float32)
    if SECOND:
        second = tl.max(tl.where(lane == group, runner_up, top), axis=0)
    ties, rest, weighted = sums_below(x, largest, lane, group, others, LANES, GROUP, ENTROPY, OTHERS)
    if DRAWN:
        place = outer.to(tl.int64) * seed_outer + position.to(tl.int64) * seed_position
        key = tl.load(seed + place)
        place = outer.to(tl.int64) * positions_outer + position.to(tl.int64) * positions_position
        # Where no token is drawn, no bound reaches the bar, and the choice stays the largest logit.
        bar = tl.where(draws, LOWEST, float("inf"))
        drawn, second, weighted = draw_token(
            x, bar, lane, key, tl.load(positions + place), row, first, vocab, suppress_tokens, num_suppressed,
            suppressed_step, first_token_id, scale, least, GROUP, HAS_SUPPRESSED, HAS_FLOOR,
        )  # fmt: skip
        second = tl.where(drawn < 0, largest, second)
        weighted = tl.where(drawn < 0, tl.where(token < 0, 0.0, largest), weighted)
        token = tl.where(drawn < 0, token, drawn)
    store_state(state, largest, second, token, ties, rest, weighted)


def scan_logits(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    floor: torch.Tensor | None,
    chunk: int,
) -> torch.Tensor:
    """States `[*, L, C, 6]`, one for each `chunk` logits: a power of two, and at least as many as one load fetches."""
    chunks = ceil_div(logits.shape[-1], chunk)
    states = logits.new_empty((*input_ids.shape, chunks, STATE_FIELDS), dtype=torch.float64)
    if input_ids.numel() > 0:
        rest = (measure, suppress_tokens, logits_shift, temperature, seed, positions, floor, chunk)
        scan_into(states, logits, input_ids, mask_token_id, first_token_id, mask_index, *rest)
    return states


def scan_into(
    states: torch.Tensor,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    floor: torch.Tensor | None,
    chunk: int,
) -> None:
    """Launches the scan, once where a single stride walks the leading dimensions, else for each of the outermost."""
    mask = input_ids if mask_index is None else mask_index
    divisors = input_ids if temperature is None else temperature
    keys = input_ids if seed is None else seed
    places = input_ids if positions is None else positions
    floors = input_ids if floor is None else floor
    outer = (
        outer_stride(logits, 2),
        *(outer_stride(each, 1) for each in (input_ids, mask, divisors, keys, places, floors)),
    )
    if None in outer:
        for n in range(input_ids.shape[0]):
            given = (None if each is None else each[n] for each in (mask_index, temperature, seed, positions, floor))
            masked, divisor, key, place, least = given
            rest = (measure, suppress_tokens, logits_shift, divisor, key, place, least, chunk)
            scan_into(states[n], logits[n], input_ids[n], mask_token_id, first_token_id, masked, *rest)
        return
    length, vocab = logits.shape[-2:]
    outermost = input_ids.numel() // length
    itemsize = logits.element_size()
    group = VECTOR_BYTES // itemsize
    lanes = chunk // group
    chunks = states.shape[-2]
    logits_position = logits.stride(-2) if length > 1 else 0
    # The lowest bit set is the largest power of two that divides every row's address.
    alignment = logits.data_ptr() | (outer[0] or 0) * itemsize | logits_position * itemsize | VECTOR_BYTES
    vector = (alignment & -alignment) // itemsize
    suppressed = input_ids if suppress_tokens is None else suppress_tokens
    flags = (
        *NEEDS[measure],
        logits_shift,
        mask_index is not None,
        suppress_tokens is not None,
        temperature is not None,
        floor is not None,
    )
    chosen = tunables(logits.device, logits.dtype)
    position_axis = 1 if length <= MAX_GRID_Y else 0
    scan_chunk.launch(
        (outermost, length, chunks) if position_axis == 1 else (length, outermost, chunks),
        (logits, input_ids, mask, suppressed, states,
         length, vocab, mask_token_id, first_token_id,
         0 if suppress_tokens is None else suppressed.numel(), suppressed.stride(0),
         outer[0], logits_position, outer[1], input_ids.stride(-1), outer[2], mask.stride(-1),
         divisors, keys, places, floors, outer[3], divisors.stride(-1), outer[4], keys.stride(-1),
         outer[5], places.stride(-1), outer[6], floors.stride(-1)),
        (lanes, group, vector, math.gcd(vector, vocab), position_axis, *flags),
        (logits.dtype, short_range(logits)),
        # Noise takes registers beside the chunk, so a thread has half as much of it.
        min(chosen.num_warps, max(1, lanes // 32)),
        chosen.max_registers,
    )  # fmt: skip
