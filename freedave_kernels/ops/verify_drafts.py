"""verify_drafts: how far a chain of drafts agrees with static decoding."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import MATCHES
from freedave_kernels.dispatch import dispatched

OP = "verify_drafts"


def verify_drafts(
    drafts: torch.Tensor,
    targets: torch.Tensor,
    *,
    num_drafts: torch.Tensor | None = None,
    match: str = "exact",
    mask_token_id: int | None = None,
) -> torch.Tensor:
    """Finds the last draft of each sequence that static decoding would have reached too.

    Args:
        drafts: `[B, K, L]` int64; draft 0 is right by construction. Ids may be int32 (copied).
        targets: `[B, K, L]` int64 or int32; `targets[b, k]` is the state one static step after `drafts[b, k]`.
        num_drafts: `[B]` int32 or int64, how many drafts are active (None: all). Inactive ones are never accepted.
        match: "exact", or "subset": equal wherever the draft is unmasked.
        mask_token_id: needed by "subset".

    Returns:
        `accepted [B]` int64. Starting at draft 0, the walk goes to the largest j beyond the current draft with `drafts[j]`
        equal to the current draft's target, and stops when there is none.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: verification of FreeDave (free draft-and-verification).
    """
    drafts, targets = arguments.as_int64(drafts), arguments.as_int64(targets)
    return _call(drafts, targets, num_drafts, match, mask_token_id)


def check(drafts: Any, targets: Any, num_drafts: Any, match: Any, mask_token_id: Any) -> None:
    arguments.expect_tensor(OP, "drafts", drafts, [torch.int64])
    arguments.expect_dims(OP, "drafts", drafts, "B, K, L")
    if 0 in drafts.shape[1:]:
        raise ValueError(f"{OP}: drafts must hold a draft and a position at least, got shape {tuple(drafts.shape)}")
    arguments.expect_tensor(OP, "targets", targets, [torch.int64])
    arguments.expect_shape(OP, "targets", targets, drafts.shape, "like drafts")
    if num_drafts is not None:
        arguments.expect_tensor(OP, "num_drafts", num_drafts, arguments.INTEGER_DTYPES)
        arguments.expect_shape(OP, "num_drafts", num_drafts, drafts.shape[:1], "one count a sequence")
    arguments.expect_choice(OP, "match", match, MATCHES)
    if mask_token_id is not None:
        arguments.expect_int(OP, "mask_token_id", mask_token_id)
    elif match == "subset":
        raise ValueError(f"{OP}: match='subset' needs mask_token_id, to tell which positions a draft has filled")
    arguments.expect_same_device(OP, drafts, "drafts", targets=targets, num_drafts=num_drafts)


def fake(
    drafts: torch.Tensor,
    targets: torch.Tensor,
    num_drafts: torch.Tensor | None = None,
    match: str = "exact",
    mask_token_id: int | None = None,
) -> torch.Tensor:
    return drafts.new_empty(drafts.shape[:1])


_call = dispatched(OP, check, fake, window=lambda drafts, *_: (drafts.shape[2], drafts.shape[1]))
