"""token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i.

A program owns one chunk of one row. It holds the chunk in registers, in groups of 8 logits a thread (one 16-byte load):
the groups' maxima, then the chunk's, then one sum relative to it, so nothing is ever rescaled. Chunks depend on the
vocabulary alone and a second kernel merges them in a fixed order: neither the batch nor the number of SMs can change a
bit. Programs of rows that are not masked return at once. Six instructions an element: bound by memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from freedave_kernels.triton.launch import ceil_div, kernel, outer_stride, power_of_two, short_range
from freedave_kernels.triton.tunables import tunables

CHUNK = 16384  # logits; splits a row of 150 K so that a single one occupies ten SMs
VECTOR_BYTES = 16
MAX_GRID_Y = 65535
MERGED_ROWS = 16  # a program of the second kernel

# Partial results of a chunk, side by side in one float32 workspace [FIELDS, rows, chunks].
MAX = tl.constexpr(0)  # largest logit
GROUP_OF_MAX = tl.constexpr(1)  # the first group that holds it: a small integer, so exact
REST = tl.constexpr(2)  # sum exp(x - max); for the entropy without the terms at the maximum, and times 2^64
SECOND = tl.constexpr(3)  # margin: second largest logit, counting equal ones
TIES = tl.constexpr(3)  # entropy: how many logits equal the maximum
WEIGHTED = tl.constexpr(4)  # entropy: sum (x - max) exp(x - max), times 2^64
FIELDS = {"prob": 3, "margin": 4, "neg_entropy": 5}

LOG2_E = tl.constexpr(1.4426950216293335)  # the nearest float32, and what it lacks
LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)
# exp(x - max) of a confident row's tail lies below what float32 holds, and is all that its entropy consists of.
SCALE = tl.constexpr(18446744073709551616.0)  # 2^64
NEVER = tl.constexpr(float("-inf"))


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


@kernel(aligned=("logits",))
def predict_chunk(
    logits,
    input_ids,
    mask_index,
    suppress_tokens,
    partials,
    length: tl.int32,
    vocab: tl.int32,
    mask_token_id: tl.int64,
    first_token_id: tl.int64,
    num_suppressed: tl.int32,
    suppressed_step: tl.int64,
    logits_outer: tl.int64,
    logits_position: tl.int64,
    ids_outer: tl.int64,
    ids_position: tl.int64,
    mask_outer: tl.int64,
    mask_position: tl.int64,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    TAIL_VECTOR: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    MEASURE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_MASK_INDEX: tl.constexpr,
    HAS_SUPPRESSED: tl.constexpr,
):
    # A row that is not masked costs one load.
    outer, position, chunk = tl.program_id(POSITION_AXIS ^ 1), tl.program_id(POSITION_AXIS), tl.program_id(2)
    ids = input_ids + outer.to(tl.int64) * ids_outer + position.to(tl.int64) * ids_position
    mask = mask_index + outer.to(tl.int64) * mask_outer + position.to(tl.int64) * mask_position
    if not is_masked(ids, mask, mask_token_id, HAS_MASK_INDEX):
        return

    # The whole chunk, in registers. Only a row's last chunk pays for comparing tokens with the vocabulary.
    first = chunk * (LANES * GROUP)
    lane = tl.arange(0, LANES)
    start = logits + row_start(outer, position, logits_outer, logits_position, SHIFT, VECTOR)
    if first + LANES * GROUP <= vocab:
        x = load_groups(start, lane, first, vocab, False, GROUP, 0, GROUP, VECTOR)
    else:
        limit = vocab // TAIL_VECTOR * TAIL_VECTOR  # the vocabulary, known to be divisible
        x = load_groups(start, lane, first, limit, True, GROUP, 0, GROUP, TAIL_VECTOR)
    if HAS_SUPPRESSED:
        # Whatever their logits are, they are not looked at. One bit a place: the loop holds a word a group.
        hidden = tl.zeros([LANES], tl.int32)
        found = 0
        for s in range(num_suppressed):
            place = tl.load(suppress_tokens + s * suppressed_step) - first_token_id - first
            if (place >= 0) & (place < LANES * GROUP):
                hidden |= tl.where(lane == place // GROUP, 1 << (place % GROUP).to(tl.int32), 0)
                found += 1
        if found > 0:
            x = tl.where((hidden[:, None] >> tl.arange(0, GROUP)[None, :]) & 1 == 1, NEVER, x)

    # The maximum of each group, then of the chunk. A NaN is passed over here; the sum finds it.
    if MEASURE == "margin":
        top, runner_up = top_two_of_groups(x, LANES, GROUP)
    else:
        top = tl.max(x, axis=1)
    largest = tl.max(top, axis=0)
    group = tl.min(tl.where(top == largest, lane, LANES), axis=0)

    # The sum. x - max comes first, exactly: folded into the multiplication, a large maximum would cost digits.
    below = x - tl.where(largest == NEVER, 0.0, largest)
    chunks = tl.num_programs(2)
    field = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64) * chunks
    cell = partials + (outer * length + position).to(tl.int64) * chunks + chunk
    if MEASURE == "neg_entropy":
        is_top = x == largest
        below, term = scaled_terms(x, largest, below)
        term = tl.where(is_top, 0.0, term)
        ties = tl.sum(sum_of_groups(is_top.to(tl.float32), LANES, GROUP), axis=0)
        weighted = tl.sum(sum_of_groups(term * below, LANES, GROUP), axis=0)
        tl.store(cell + field * TIES, ties)
        tl.store(cell + field * WEIGHTED, weighted)
    else:
        term = tl.exp2(below * LOG2_E)
    rest = tl.sum(sum_of_groups(term, LANES, GROUP), axis=0)
    if MEASURE == "margin":
        second = tl.max(tl.where(lane == group, runner_up, top), axis=0)
        tl.store(cell + field * SECOND, second)

    tl.store(cell + field * MAX, largest)
    tl.store(cell + field * GROUP_OF_MAX, group.to(tl.float32))
    tl.store(cell + field * REST, rest)


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


@kernel()
def merge_chunks(
    logits,
    input_ids,
    mask_index,
    suppress_tokens,
    partials,
    token_ids,
    confidence,
    rows: tl.int32,
    chunks: tl.int32,
    length: tl.int32,
    vocab: tl.int32,
    mask_token_id: tl.int64,
    first_token_id: tl.int64,
    num_suppressed: tl.int32,
    suppressed_step: tl.int64,
    logits_outer: tl.int64,
    logits_position: tl.int64,
    ids_outer: tl.int64,
    ids_position: tl.int64,
    mask_outer: tl.int64,
    mask_position: tl.int64,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    MEASURE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_MASK_INDEX: tl.constexpr,
    HAS_SUPPRESSED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    outer, position = row // length, row % length
    ids = input_ids + outer.to(tl.int64) * ids_outer + position.to(tl.int64) * ids_position
    given = tl.load(ids, mask=inside, other=0)
    if HAS_MASK_INDEX:
        mask = mask_index + outer.to(tl.int64) * mask_outer + position.to(tl.int64) * mask_position
        masked = tl.load(mask, mask=inside, other=0) != 0
    else:
        masked = inside & (given == mask_token_id)

    # The row's maximum, and each chunk's terms relative to it. In float64: confidence may be all in the last digits.
    chunk = tl.arange(0, CHUNKS)[None, :]
    present = masked[:, None] & (chunk < chunks)
    field = rows.to(tl.int64) * chunks
    cell = partials + row.to(tl.int64)[:, None] * chunks + chunk
    largest = tl.load(cell + field * MAX, mask=present, other=NEVER)
    top = tl.max(largest, axis=1)
    leads = largest == top[:, None]
    shift = largest.to(tl.float64) - tl.where(top == NEVER, 0.0, top).to(tl.float64)[:, None]
    scale = tl.exp(shift)
    rest = tl.load(cell + field * REST, mask=present, other=0.0).to(tl.float64)
    if MEASURE == "neg_entropy":
        ties = tl.load(cell + field * TIES, mask=present, other=0.0).to(tl.float64)
        weighted = tl.load(cell + field * WEIGHTED, mask=present, other=0.0).to(tl.float64) / SCALE
        rest = rest / SCALE
        terms = tl.where(leads, rest, rest + ties)
        shift = tl.where(largest == NEVER, 0.0, shift)
        weighted = tl.sum(scale * (weighted + shift * terms), axis=1)
        rest = tl.sum(scale * terms, axis=1)
        ties = tl.sum(tl.where(leads, ties, 0.0), axis=1)
        total = ties + rest
    else:
        total = tl.sum(scale * rest, axis=1)

    # The token: the first group that holds the maximum, in the first chunk that does; then its first place.
    first_chunk = tl.min(tl.where(leads, chunk, CHUNKS), axis=1)
    chosen = chunk == first_chunk[:, None]
    group = tl.load(cell + field * GROUP_OF_MAX, mask=present & chosen, other=0.0)
    first_token = first_chunk * (LANES * GROUP) + tl.sum(group, axis=1).to(tl.int32) * GROUP
    usable = masked & (top > NEVER) & (total < float("inf"))  # NaN compares false
    place = tl.arange(0, GROUP)[None, :]
    token = first_token[:, None] + place
    start = logits + row_start(outer, position, logits_outer, logits_position, SHIFT, 1)
    x = tl.load(start[:, None] + token, mask=usable[:, None] & (token < vocab), other=NEVER).to(tl.float32)
    if HAS_SUPPRESSED:
        for s in range(num_suppressed):
            x = tl.where(token == tl.load(suppress_tokens + s * suppressed_step), NEVER, x)
    found = tl.min(tl.where(x == top[:, None], token, vocab), axis=1)

    if MEASURE == "prob":
        certainty = 1.0 / total
    elif MEASURE == "margin":
        second = tl.load(cell + field * SECOND, mask=present, other=NEVER)
        second = tl.max(tl.where(chosen, second, largest), axis=1)
        certainty = -expm1(second.to(tl.float64) - top.to(tl.float64)) / total
    else:
        certainty = weighted / total - (tl.log(ties) + log1p(rest / ties))
    tl.store(token_ids + row, tl.where(usable, found.to(tl.int64), given), mask=inside)
    tl.store(confidence + row, tl.where(usable, certainty.to(tl.float32), NEVER), mask=inside)


@triton.jit
def expm1(x):
    """exp(x) - 1 in float64 without cancellation, for x <= 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))  # next term below 1e-14 of it
    return tl.where(x > -1e-3, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) in float64, for x >= 0: the rounding of 1 + x is divided out again."""
    rounded = 1.0 + x
    exact = rounded == 1.0
    return tl.where(exact, x, tl.log(rounded) * x / tl.where(exact, 1.0, rounded - 1.0))


class Scan(NamedTuple):
    """A scan under way, and what a kernel needs that goes on with its results."""

    tensors: tuple[torch.Tensor, ...]
    rows: int
    chunks: int
    sizes: tuple[int, ...]
    constants: tuple[Any, ...]


def scan_logits(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    chunk: int,
) -> Scan | None:
    """Launches `predict_chunk` over chunks of `chunk` logits; None: no single stride walks the leading dimensions."""
    mask = input_ids if mask_index is None else mask_index
    outer = outer_stride(logits, 2), outer_stride(input_ids, 1), outer_stride(mask, 1)
    if outer[0] is None or outer[1] is None or outer[2] is None:
        return None
    rows = input_ids.numel()
    length, vocab = logits.shape[-2:]
    itemsize = logits.element_size()
    group = VECTOR_BYTES // itemsize
    lanes = chunk // group
    chunks = ceil_div(vocab, chunk)
    logits_position = logits.stride(-2) if length > 1 else 0
    # The lowest bit set is the largest power of two that divides every row's address.
    alignment = logits.data_ptr() | outer[0] * itemsize | logits_position * itemsize | VECTOR_BYTES
    vector = (alignment & -alignment) // itemsize

    partials = logits.new_empty(FIELDS[measure] * rows * chunks, dtype=torch.float32)
    suppressed = input_ids if suppress_tokens is None else suppress_tokens
    tensors = (logits, input_ids, mask, suppressed, partials)
    sizes = (
        length,
        vocab,
        mask_token_id,
        first_token_id,
        0 if suppress_tokens is None else suppressed.numel(),
        suppressed.stride(0),
        outer[0],
        logits_position,
        outer[1],
        input_ids.stride(-1),
        outer[2],
        mask.stride(-1),
    )
    flags = (measure, logits_shift, mask_index is not None, suppress_tokens is not None)
    chosen = tunables(logits.device, logits.dtype)
    position_axis = 1 if length <= MAX_GRID_Y else 0
    predict_chunk.launch(
        (rows // length, length, chunks) if position_axis == 1 else (length, rows // length, chunks),
        (*tensors, *sizes),
        (lanes, group, vector, math.gcd(vector, vocab), position_axis, *flags),
        (logits.dtype, short_range(logits)),
        min(chosen.num_warps, max(1, lanes // 32)),
        chosen.max_registers,
    )
    return Scan(tensors, rows, chunks, sizes, (lanes, group, *flags))


def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = input_ids.new_empty(input_ids.shape)
    confidence = logits.new_empty(input_ids.shape, dtype=torch.float32)
    rows = input_ids.numel()
    if rows == 0:
        return token_ids, confidence
    chunk = min(CHUNK, max(VECTOR_BYTES // logits.element_size(), power_of_two(logits.shape[-1])))
    rest = (measure, suppress_tokens, logits_shift)
    scan = scan_logits(logits, input_ids, mask_token_id, 0, mask_index, *rest, chunk)
    if scan is None:
        # One call for each of the outermost.
        for n in range(input_ids.shape[0]):
            masked = None if mask_index is None else mask_index[n]
            token_ids[n], confidence[n] = predict_tokens(logits[n], input_ids[n], mask_token_id, masked, *rest)
        return token_ids, confidence
    merge_chunks.launch(
        (ceil_div(rows, MERGED_ROWS), 1, 1),
        (*scan.tensors, token_ids, confidence, rows, scan.chunks, *scan.sizes),
        (MERGED_ROWS, power_of_two(scan.chunks), *scan.constants),
        (logits.dtype,),
    )
    return token_ids, confidence
