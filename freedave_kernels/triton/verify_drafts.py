"""accepted[b] = the draft reached from draft 0 by hopping to the furthest later draft that equals the current one's
target. A program owns a sequence and compares a target with every draft at once, a tile of rows at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.triton.launch import kernel, power_of_two
from freedave_kernels.triton.static_step import expect_length, resources_for

TILE_ELEMENTS = 4096  # of drafts compared at once: a few registers a thread


@triton.jit
def furthest_equal(
    drafts,
    target,
    current,
    active,
    position,
    length,
    mask_token_id,
    row_stride,
    position_stride,
    TILE: tl.constexpr,
    SUBSET: tl.constexpr,
):
    """The last of the drafts in (current, active) that equals the target; `current` where none does."""
    furthest = current
    for begin in range(0, active, TILE):
        k = begin + tl.arange(0, TILE)
        later = (k > current) & (k < active)
        inside = later[:, None] & (position < length)[None, :]
        place = k.to(tl.int64)[:, None] * row_stride + position.to(tl.int64)[None, :] * position_stride
        draft = tl.load(drafts + place, mask=inside, other=0)
        differs = inside & (draft != target[None, :])
        if SUBSET:
            differs = differs & (draft != mask_token_id)
        equal = later & (tl.max(differs.to(tl.int32), axis=1) == 0)
        furthest = tl.maximum(furthest, tl.max(tl.where(equal, k, -1), axis=0))
    return furthest


@kernel()
def verify_sequence(
    drafts,
    targets,
    num_drafts,
    accepted,
    count: tl.int32,
    length: tl.int32,
    mask_token_id: tl.int64,
    drafts_sequence: tl.int64,
    drafts_row: tl.int64,
    drafts_step: tl.int64,
    targets_sequence: tl.int64,
    targets_row: tl.int64,
    targets_step: tl.int64,
    num_drafts_step: tl.int64,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_NUM_DRAFTS: tl.constexpr,
    SUBSET: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    drafts += sequence * drafts_sequence
    targets += sequence * targets_sequence
    position = tl.arange(0, LENGTH)
    active = count
    if HAS_NUM_DRAFTS:
        active = tl.minimum(tl.load(num_drafts + sequence * num_drafts_step).to(tl.int64), count).to(tl.int32)

    current = 0
    moving = active > 1
    while moving:
        place = targets_row * current + position.to(tl.int64) * targets_step
        target = tl.load(targets + place, mask=position < length, other=0)
        furthest = furthest_equal(
            drafts, target, current, active, position, length, mask_token_id, drafts_row, drafts_step, TILE, SUBSET
        )
        moving = furthest > current
        current = furthest
    tl.store(accepted + sequence, current)


def verify_drafts(
    drafts: torch.Tensor, targets: torch.Tensor, num_drafts: torch.Tensor | None, match: str, mask_token_id: int | None
) -> torch.Tensor:
    batch, count, length = drafts.shape
    expect_length("verify_drafts", length)
    accepted = drafts.new_empty((batch,))
    active = drafts if num_drafts is None else num_drafts
    padded, tile = tile_of(count, length)
    verify_sequence.launch(
        (batch, 1, 1),
        (
            drafts,
            targets,
            active,
            accepted,
            count,
            length,
            mask_token_id or 0,
            *drafts.stride(),
            *targets.stride(),
            active.stride(0),
        ),
        (padded, tile, num_drafts is not None, match == "subset"),
        (active.dtype,),
        *resources_for(padded * tile),
    )
    return accepted


def tile_of(count: int, length: int) -> tuple[int, int]:
    """A row's length and the number of rows that a program compares at once, as powers of two."""
    padded = power_of_two(length)
    return padded, min(power_of_two(count), max(1, TILE_ELEMENTS // padded))
