"""transfer[i] = whether position i is unmasked now, by the rule of some decoder: the first ranked, those above a
threshold, or both. A program owns a row; the first ranked are found by one reduction each.
"""

from __future__ import annotations

import torch
import triton.language as tl

from freedave_kernels.triton.launch import as_rows, kernel, power_of_two
from freedave_kernels.triton.static_step import (
    NO_RULE,
    as_float64,
    expect_length,
    first_ranked,
    passing,
    position_keys,
    resources_for,
    rule_of,
)


@kernel()
def select_row(
    confidence,
    mask_index,
    counts,
    thresholds,
    transfer,
    threshold: tl.float64,
    length: tl.int32,
    num_transfer: tl.int32,
    count_step: tl.int64,
    threshold_step: tl.int64,
    block_length: tl.int32,
    confidence_row: tl.int64,
    confidence_step: tl.int64,
    mask_row: tl.int64,
    mask_step: tl.int64,
    LENGTH: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    RULE: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    FALLBACK: tl.constexpr,
    LEFT_TO_RIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, LENGTH)
    inside = position < length
    masked = tl.load(mask_index + row * mask_row + position.to(tl.int64) * mask_step, mask=inside, other=0) != 0
    value = tl.load(confidence + row * confidence_row + position.to(tl.int64) * confidence_step, mask=masked, other=0.0)
    keys = position_keys(value, masked, position, block_length, LEFT_TO_RIGHT)
    if HAS_COUNTS:
        count = tl.load(counts + row * count_step).to(tl.int64)
        num_transfer = tl.minimum(tl.maximum(count, 0), length).to(tl.int32)

    top = first_ranked(keys, position, num_transfer)
    if HAS_THRESHOLDS:
        threshold = tl.load(thresholds + row * threshold_step)
    if RULE != NO_RULE:
        passes = passing(keys, value, masked, position, as_float64(threshold), RULE, LEFT_TO_RIGHT)
        if FALLBACK == "top_always":
            chosen = passes | top
        else:
            # `top` has at most as many positions as can be ranked, so their number is `num_transfer`, clamped.
            needed = 1 if FALLBACK == "top" else tl.sum(top.to(tl.int32), axis=0)
            enough = tl.sum(passes.to(tl.int32), axis=0) >= needed
            chosen = (enough & passes) | (~enough & top)
    else:
        chosen = top
    tl.store(transfer + row * length + position, chosen, mask=inside)


def select_transfer(
    confidence: torch.Tensor,
    mask_index: torch.Tensor,
    num_transfer: int,
    num_transfer_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    fallback: str,
    order: str,
    block_length: int | None,
) -> torch.Tensor:
    transfer_index = mask_index.new_empty(mask_index.shape)
    if transfer_index.numel() == 0:
        return transfer_index
    length = confidence.shape[-1]
    expect_length("select_transfer", length)
    confidence, mask_index = as_rows(confidence), as_rows(mask_index)
    counts = confidence if num_transfer_per_row is None else num_transfer_per_row.reshape(-1)
    thresholds = confidence if threshold_per_row is None else threshold_per_row.reshape(-1)
    select_row.launch(
        (confidence.shape[0], 1, 1),
        (
            confidence,
            mask_index,
            counts,
            thresholds,
            transfer_index,
            as_number(threshold),
            length,
            min(num_transfer, length),
            counts.stride(0),
            thresholds.stride(0),
            min(block_length or length, length),
            *confidence.stride(),
            *mask_index.stride(),
        ),
        (
            power_of_two(length),
            num_transfer_per_row is not None,
            rule_of(rule, threshold, threshold_per_row),
            threshold_per_row is not None,
            fallback,
            order == "left_to_right",
        ),
        (counts.dtype, thresholds.dtype),
        *resources_for(length),
    )
    return transfer_index


def as_number(threshold: float | None) -> float:
    """0 where there is no threshold."""
    return 0.0 if threshold is None else float(threshold)
