"""rank[i] = how many positions come before i. A program owns a tile of a row's positions, passes over the whole row and
counts; rows are short and lie in cache, so the op is bound by the latency of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.triton.launch import INTERPRETED, as_rows, ceil_div, kernel, power_of_two
from freedave_kernels.triton.static_step import NO_KEY, expect_length, is_rankable, position_keys

# Comparisons held at once: more would spill. A call of the interpreter costs the same for any number.
TILE = 128
OTHERS = 1024 if INTERPRETED else 32
MAX_LENGTH = 2**15  # positions that a key has room for


@triton.jit
def ranked_keys(
    confidence, mask_index, position, length, block_length, confidence_step, mask_step, LEFT_TO_RIGHT: tl.constexpr
):
    inside = position < length
    masked = tl.load(mask_index + position.to(tl.int64) * mask_step, mask=inside, other=0) != 0
    value = tl.load(confidence + position.to(tl.int64) * confidence_step, mask=masked, other=0.0)
    keys = position_keys(value, masked, position, block_length, LEFT_TO_RIGHT)
    return tl.where(is_rankable(keys), keys, NO_KEY)


@kernel()
def rank_tile(
    confidence,
    mask_index,
    rank,
    length: tl.int32,
    block_length: tl.int32,
    confidence_row: tl.int64,
    confidence_step: tl.int64,
    mask_row: tl.int64,
    mask_step: tl.int64,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
    LEFT_TO_RIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    confidence += row * confidence_row
    mask_index += row * mask_row
    position = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = ranked_keys(
        confidence, mask_index, position, length, block_length, confidence_step, mask_step, LEFT_TO_RIGHT
    )
    before = tl.zeros([TILE], tl.int32)
    for begin in range(0, length, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        others = ranked_keys(
            confidence, mask_index, other, length, block_length, confidence_step, mask_step, LEFT_TO_RIGHT
        )
        before += tl.sum((others[None, :] < keys[:, None]).to(tl.int32), axis=1)
    tl.store(rank + row * length + position, tl.where(keys == NO_KEY, length, before), mask=position < length)


def rank_positions(
    confidence: torch.Tensor, mask_index: torch.Tensor, order: str, block_length: int | None
) -> torch.Tensor:
    rank = confidence.new_empty(confidence.shape, dtype=torch.int32)
    if rank.numel() == 0:
        return rank
    length = confidence.shape[-1]
    expect_length("rank_positions", length, MAX_LENGTH)
    padded = power_of_two(length)
    tile = min(TILE, padded)
    confidence, mask_index = as_rows(confidence), as_rows(mask_index)
    rank_tile.launch(
        (confidence.shape[0], ceil_div(length, tile), 1),
        (
            confidence,
            mask_index,
            rank,
            length,
            min(block_length or length, length),
            *confidence.stride(),
            *mask_index.stride(),
        ),
        (tile, min(OTHERS, padded), order == "left_to_right"),
    )
    return rank
