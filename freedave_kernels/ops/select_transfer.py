"""select_transfer: the unmasking rules of existing decoders on one ranking."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import FALLBACKS
from freedave_kernels.dispatch import dispatched

OP = "select_transfer"


def select_transfer(
    confidence: torch.Tensor,
    mask_index: torch.Tensor,
    *,
    num_transfer: int | torch.Tensor = 1,
    threshold: float | torch.Tensor | None = None,
    rule: str = "threshold",
    fallback: str = "top",
    order: str = "confidence",
    block_length: int | None = None,
) -> torch.Tensor:
    """Selects the masked positions that one step unmasks.

    Args:
        confidence: `[*, L]` float32.
        mask_index: `[*, L]` bool, True where a position is masked.
        num_transfer: how many positions, an int >= 0 or an int32/int64 tensor `[*]`; clamped to what can be ranked.
        threshold: also (or instead) what passes it by `rule`, compared in float64; a float, or a float64 or float32 tensor
            `[*]`, one a row (NaN: nothing passes).
        rule: what passes, of the positions in the order of their ranks, up to the first that does not.
            "threshold": `confidence >= threshold`. "strict": `confidence > threshold`.
            "factor" (Fast-dLLM's): the n-th, n from 2 on, with `confidence >= 1 - threshold / (n + 1)`; the first always
            does, and where all masked positions but one pass, so does that one.
            "entropy_bound" (SDAR's): the entropies up to this one, `-confidence` each and at least 0, have a sum below the
            threshold, in float64; for confidences that are "neg_entropy".
        fallback: with a threshold, when the first `num_transfer` ranked positions are taken: "top", when nothing passes;
            "top_if_fewer", instead of the passing ones when these are fewer; "top_always", in addition to them.
        order: "confidence" or "left_to_right". Left to right, the leading run of masked positions that pass is taken.
        block_length: only the current block, the lowest with a masked position, transfers. None: one block.

    Returns:
        `transfer_index [*, L]` bool. Rows with no masked position transfer nothing; positions whose confidence is -inf or
        NaN are never taken.

    Guarantees: ties as in `rank_positions`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: top-k of LLaDA (arXiv:2502.09992), confidence threshold and factor of Fast-dLLM (arXiv:2505.22618), entropy bound
    of SDAR (arXiv:2510.06303).
    """
    counts = arguments.for_all_or_each(num_transfer, 1)
    limits = arguments.for_all_or_each(threshold, None)
    return _call(confidence, mask_index, *counts, *limits, rule, fallback, order, block_length)


def check(
    confidence: Any,
    mask_index: Any,
    count: Any,
    counts: Any,
    threshold: Any,
    thresholds: Any,
    rule: Any,
    fallback: Any,
    order: Any,
    block_length: Any,
) -> None:
    arguments.expect_tensor(OP, "confidence", confidence, [torch.float32], min_dims=1)
    arguments.expect_tensor(OP, "mask_index", mask_index, [torch.bool])
    arguments.expect_shape(OP, "mask_index", mask_index, confidence.shape, "like confidence")
    arguments.expect_int(OP, "num_transfer", count, minimum=0)
    if counts is not None:
        arguments.expect_tensor(OP, "num_transfer", counts, arguments.INTEGER_DTYPES)
        arguments.expect_shape(OP, "num_transfer", counts, confidence.shape[:-1], "one count a row")
    arguments.expect_threshold(OP, threshold, thresholds, confidence.shape[:-1])
    arguments.expect_rule(OP, rule, threshold, thresholds)
    arguments.expect_choice(OP, "fallback", fallback, FALLBACKS)
    arguments.expect_order(OP, order, block_length)
    arguments.expect_same_device(
        OP, confidence, "confidence", mask_index=mask_index, num_transfer=counts, threshold=thresholds
    )


def fake(
    confidence: torch.Tensor,
    mask_index: torch.Tensor,
    num_transfer: int = 1,
    num_transfer_per_row: torch.Tensor | None = None,
    threshold: float | None = None,
    threshold_per_row: torch.Tensor | None = None,
    rule: str = "threshold",
    fallback: str = "top",
    order: str = "confidence",
    block_length: int | None = None,
) -> torch.Tensor:
    return mask_index.new_empty(mask_index.shape)


_call = dispatched(OP, check, fake, window=lambda confidence, *_: (confidence.shape[-1], 0))
