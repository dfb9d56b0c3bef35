"""drafts[k] = the state after k + 1 static steps under one prediction. A program owns a sequence: it numbers every position
with the draft that fills it, one reduction a position, and writes the drafts.
"""

from __future__ import annotations

import torch
import triton.language as tl

from freedave_kernels.triton.launch import each_or, kernel, power_of_two
from freedave_kernels.triton.select_transfer import as_number
from freedave_kernels.triton.static_step import (
    expect_length,
    plan_drafts,
    position_keys,
    predicted_confidence,
    resources_for,
    rule_of,
    step_of,
)


@kernel()
def build_sequence(
    input_ids,
    token_ids,
    confidence,
    drafts,
    num_drafts,
    tokens_each,
    threshold_each,
    threshold: tl.float64,
    length: tl.int32,
    draft_steps: tl.int32,
    mask_token_id: tl.int64,
    tokens_per_step: tl.int32,
    block_length: tl.int32,
    ids_row: tl.int64,
    ids_step: tl.int64,
    tokens_row: tl.int64,
    tokens_step: tl.int64,
    confidence_row: tl.int64,
    confidence_step: tl.int64,
    tokens_each_step: tl.int64,
    threshold_each_step: tl.int64,
    LENGTH: tl.constexpr,
    RULE: tl.constexpr,
    LEFT_TO_RIGHT: tl.constexpr,
    HAS_TOKENS_EACH: tl.constexpr,
    HAS_THRESHOLD_EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, LENGTH)
    inside = position < length
    offset = position.to(tl.int64)
    state = tl.load(input_ids + row * ids_row + offset * ids_step, mask=inside, other=0)
    masked = inside & (state == mask_token_id)
    tokens = tl.load(token_ids + row * tokens_row + offset * tokens_step, mask=masked, other=0)
    value = tl.load(confidence + row * confidence_row + offset * confidence_step, mask=masked, other=0.0)
    value = predicted_confidence(tokens, value, mask_token_id)

    tokens_per_step, threshold = step_of(
        row, tokens_per_step, tokens_each, tokens_each_step, threshold, threshold_each, threshold_each_step, length,
        HAS_TOKENS_EACH, HAS_THRESHOLD_EACH,
    )  # fmt: skip
    keys = position_keys(value, masked, position, block_length, LEFT_TO_RIGHT)
    draft_of, planned = plan_drafts(
        keys, value, masked, position, draft_steps, tokens_per_step, threshold, LENGTH, RULE, LEFT_TO_RIGHT
    )
    tl.store(num_drafts + row, planned)
    for k in range(draft_steps):
        draft = tl.where(draft_of <= k, tokens, state)
        tl.store(drafts + (row * draft_steps + k) * length + offset, draft, mask=inside)


def build_drafts(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int,
    tokens_per_step_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    order: str,
    block_length: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length = input_ids.shape
    expect_length("build_drafts", length)
    drafts = input_ids.new_empty((batch, draft_steps, length))
    num_drafts = input_ids.new_empty((batch,), dtype=torch.int32)
    tokens, limits = each_or(confidence, tokens_per_step_per_row, threshold_per_row)
    build_sequence.launch(
        (batch, 1, 1),
        (
            input_ids,
            token_ids,
            confidence,
            drafts,
            num_drafts,
            tokens,
            limits,
            as_number(threshold),
            length,
            draft_steps,
            mask_token_id,
            min(tokens_per_step, length),
            min(block_length or length, length),
            *input_ids.stride(),
            *token_ids.stride(),
            *confidence.stride(),
            tokens.stride(0),
            limits.stride(0),
        ),
        (
            power_of_two(length),
            rule_of(rule, threshold, threshold_per_row),
            order == "left_to_right",
            tokens_per_step_per_row is not None,
            threshold_per_row is not None,
        ),
        (tokens.dtype, limits.dtype),
        *resources_for(length),
    )
    return drafts, num_drafts
