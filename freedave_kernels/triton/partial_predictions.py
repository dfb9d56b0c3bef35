"""What is known of each stretch of a vocabulary, for rows whose logits do not exist all at once.

The scan of predict_tokens over chunks of 4,096 logits; then a program a chunk looks its token up, while the logits are there,
and writes the state that every backend merges.
"""

from __future__ import annotations

import torch
import triton.language as tl

from freedave_kernels.contract import STATE_FIELDS, TOKENS_PER_STATE
from freedave_kernels.triton.launch import ceil_div, kernel
from freedave_kernels.triton.predict_tokens import (
    GROUP_OF_MAX,
    MAX,
    NEVER,
    REST,
    SCALE,
    SECOND,
    TIES,
    WEIGHTED,
    is_masked,
    row_start,
    scan_logits,
)

FIELDS = tl.constexpr(STATE_FIELDS)


@kernel()
def write_state(
    logits,
    input_ids,
    mask_index,
    suppress_tokens,
    partials,
    states,
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
    MEASURE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_MASK_INDEX: tl.constexpr,
    HAS_SUPPRESSED: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    outer, position = row // length, row % length
    chunks = tl.num_programs(1)
    state = states + (row.to(tl.int64) * chunks + chunk) * FIELDS
    ids = input_ids + outer.to(tl.int64) * ids_outer + position.to(tl.int64) * ids_position
    mask = mask_index + outer.to(tl.int64) * mask_outer + position.to(tl.int64) * mask_position
    largest = tl.full([], NEVER, tl.float32)
    second = tl.full([], NEVER, tl.float32)
    token = tl.full([], -1, tl.int64)
    ties = tl.full([], 0.0, tl.float64)
    rest = tl.full([], 0.0, tl.float64)
    weighted = tl.full([], 0.0, tl.float64)
    if is_masked(ids, mask, mask_token_id, HAS_MASK_INDEX):
        field = tl.num_programs(0).to(tl.int64) * chunks
        cell = partials + row.to(tl.int64) * chunks + chunk
        largest = tl.load(cell + field * MAX)
        rest = tl.load(cell + field * REST).to(tl.float64)
        if MEASURE == "neg_entropy":
            ties = tl.load(cell + field * TIES).to(tl.float64)
            ties = tl.where(largest > NEVER, ties, 0.0)  # where there is nothing, everything equals it
            weighted = tl.load(cell + field * WEIGHTED).to(tl.float64) / SCALE
            rest = rest / SCALE
        if MEASURE == "margin":
            second = tl.load(cell + field * SECOND)

        # The first place of the group that holds the maximum.
        group = tl.load(cell + field * GROUP_OF_MAX).to(tl.int32)
        place = chunk * (LANES * GROUP) + group * GROUP + tl.arange(0, GROUP)
        start = logits + row_start(outer, position, logits_outer, logits_position, SHIFT, 1)
        x = tl.load(start + place, mask=place < vocab, other=NEVER).to(tl.float32)
        if HAS_SUPPRESSED:
            for s in range(num_suppressed):
                x = tl.where(place == tl.load(suppress_tokens + s * suppressed_step) - first_token_id, NEVER, x)
        found = tl.min(tl.where((x == largest) & (x > NEVER), place, vocab), axis=0)
        token = tl.where(found < vocab, found + first_token_id, token)
    tl.store(state, largest.to(tl.float64))
    tl.store(state + 1, second.to(tl.float64))
    tl.store(state + 2, token.to(tl.float64))
    tl.store(state + 3, ties)
    tl.store(state + 4, rest)
    tl.store(state + 5, weighted)


def partial_predictions(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
) -> torch.Tensor:
    chunks = ceil_div(logits.shape[-1], TOKENS_PER_STATE)
    states = logits.new_empty((*input_ids.shape, chunks, STATE_FIELDS), dtype=torch.float64)
    if input_ids.numel() == 0:
        return states
    rest = (measure, suppress_tokens, logits_shift)
    # Always a whole chunk, however few logits there are: with other lanes, sums would be rounded in another order.
    scan = scan_logits(logits, input_ids, mask_token_id, first_token_id, mask_index, *rest, TOKENS_PER_STATE)
    if scan is None:
        # One call for each of the outermost.
        for n in range(input_ids.shape[0]):
            masked = None if mask_index is None else mask_index[n]
            states[n] = partial_predictions(logits[n], input_ids[n], mask_token_id, first_token_id, masked, *rest)
        return states
    write_state.launch(
        (scan.rows, scan.chunks, 1), (*scan.tensors, states, *scan.sizes), scan.constants, (logits.dtype,), num_warps=1
    )
    return states
