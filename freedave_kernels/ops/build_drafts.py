"""build_drafts: several decoding steps ahead from one prediction."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.dispatch import dispatched

OP = "build_drafts"


def build_drafts(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    *,
    tokens_per_step: int | torch.Tensor = 1,
    threshold: float | torch.Tensor | None = None,
    rule: str = "threshold",
    order: str = "confidence",
    block_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts the next `draft_steps` states of each sequence from one prediction of all its masked positions.

    Args:
        input_ids: `[B, L]` int64, the current states; int32 ids are copied (give int64 where a graph is captured).
        token_ids: `[B, L]` int64 or int32 and confidence: `[B, L]` float32, as `predict_tokens` returns them. Where the mask
            itself is predicted, nothing is (as if the confidence were -inf): no draft fills a position with the mask.
        mask_token_id: marks masked positions in `input_ids`.
        draft_steps: K, the number of drafts.
        tokens_per_step: positions that one step unmasks, an int or an int32/int64 tensor `[B]`, one a sequence (below 1
            counts as 1).
        threshold: draft 0 is the thresholded state (`select_transfer`); each further draft adds one ranked position. A float,
            or a float64 or float32 tensor `[B]`, one a sequence (NaN: this sequence has none). Compared in float64.
        rule: what the threshold bounds, as in `select_transfer`.
        order, block_length: as in `rank_positions`.

    Returns:
        `drafts [B, K, L]` int64 and `num_drafts [B]` int32. Draft 0 is one static step, so it is right by construction.
        Draft k is draft k-1 with the next `tokens_per_step` ranked positions filled; a step never crosses a block boundary
        (static decoding finishes a block first). Without blocks draft k is therefore `rank < tokens_per_step * (k + 1)`,
        and `num_drafts = min(K, ceil(masked / tokens_per_step))`. Drafts beyond that repeat the last one and are inactive.
        Nothing is filled beyond a block with a position that cannot be ranked (confidence -inf or NaN, or a predicted mask).

    Guarantees: drafts are nested, also where confidences tie (lower position first).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: draft construction of FreeDave (free draft-and-verification).
    """
    input_ids, token_ids = arguments.as_int64(input_ids), arguments.as_int64(token_ids)
    call = (
        input_ids, token_ids, confidence, mask_token_id, draft_steps, *arguments.for_all_or_each(tokens_per_step, 1),
        *arguments.for_all_or_each(threshold, None), rule, order, block_length,
    )  # fmt: skip
    return _call(*call)


def check(
    input_ids: Any,
    token_ids: Any,
    confidence: Any,
    mask_token_id: Any,
    draft_steps: Any,
    tokens_per_step: Any,
    tokens_each: Any,
    threshold: Any,
    threshold_each: Any,
    rule: Any,
    order: Any,
    block_length: Any,
) -> None:
    arguments.expect_tensor(OP, "input_ids", input_ids, [torch.int64])
    arguments.expect_dims(OP, "input_ids", input_ids, "B, L")
    if input_ids.shape[1] == 0:
        raise ValueError(f"{OP}: input_ids must have at least one position, got shape {tuple(input_ids.shape)}")
    arguments.expect_tensor(OP, "token_ids", token_ids, [torch.int64])
    arguments.expect_shape(OP, "token_ids", token_ids, input_ids.shape, "like input_ids")
    arguments.expect_tensor(OP, "confidence", confidence, [torch.float32])
    arguments.expect_shape(OP, "confidence", confidence, input_ids.shape, "like input_ids")
    arguments.expect_int(OP, "draft_steps", draft_steps, minimum=1)
    arguments.expect_static_step(
        OP,
        "input_ids",
        input_ids,
        mask_token_id,
        tokens_per_step,
        tokens_each,
        threshold,
        threshold_each,
        rule,
        order,
        block_length,
    )
    arguments.expect_same_device(OP, input_ids, "input_ids", token_ids=token_ids, confidence=confidence)


def fake(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int = 1,
    tokens_per_step_per_row: torch.Tensor | None = None,
    threshold: float | None = None,
    threshold_per_row: torch.Tensor | None = None,
    rule: str = "threshold",
    order: str = "confidence",
    block_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length = input_ids.shape
    return input_ids.new_empty((batch, draft_steps, length)), input_ids.new_empty((batch,), dtype=torch.int32)


def window(input_ids: torch.Tensor, *rest: Any) -> tuple[int, int]:
    return input_ids.shape[1], rest[3]


_call = dispatched(OP, check, fake, window)
