"""How probable each token was when it was committed, worked out beside `draft_step` where it is asked for.

A step may commit several static steps' tokens, each predicted at another state: at one of the drafts, or, where drafts are
pooled, at a state of an earlier forward. All of that stays on the device, and can be captured.
"""

from __future__ import annotations

from array import array

import torch
import torch.nn.functional as F

from freedave_kernels import DraftPool, DraftStep

Known = tuple[torch.Tensor, torch.Tensor]


def remembered(
    pool: DraftPool,
    slots: torch.Tensor | None,
    window_start: torch.Tensor,
    forget: torch.Tensor | None,
    mask_token_id: int,
    length: int,
) -> Known:
    """What a pool knows before a step, whose windows have L positions: states and confidences `[B, P, L]`."""
    states, confidence, age, start = pool.states, pool.confidence, pool.age, pool.start
    if slots is not None:
        states, confidence, age, start = states[slots], confidence[slots], age[slots], start[slots]
    positions = window_start[:, None] + torch.arange(length, device=states.device)
    columns = (positions % pool.length)[:, None].expand(-1, pool.num_states, -1)
    # The columns of positions that the window has left since then are those of the positions that it has come to.
    new = (positions >= start[:, None] + pool.length)[:, None]
    nothing = new | (age == 0)[..., None]
    if forget is not None:
        nothing = nothing | forget[:, None, None]
    states = states.gather(2, columns).masked_fill(new, mask_token_id)
    return states, confidence.gather(2, columns).masked_fill(nothing, float("-inf"))


def committed_log_probs(
    drafts: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    mask_token_id: int,
    steps_taken: torch.Tensor,
    step: DraftStep,
    measure: str,
    known: Known | None,
) -> torch.Tensor:
    """Log-probabilities `[B, L]` float32 of what a step committed, NaN elsewhere; `steps_taken [B]` before it.

    The state from which a position was committed is draft 0 with all filled that earlier steps committed: whichever draft or
    remembered state has filled these, and nothing else, was on the way, and the static step after them is its prediction.
    """
    index = torch.arange(drafts.shape[1], device=drafts.device)
    inactive = index >= num_drafts[:, None].clamp(min=1)
    states, confidence = drafts, confidence.masked_fill(inactive[..., None], float("-inf"))
    if known is not None:
        states, confidence = torch.cat([drafts, known[0]], 1), torch.cat([confidence, known[1]], 1)
    committed, step_map = step.drafts[:, 0], step.step_map
    hop = torch.where(step_map >= 0, step_map - steps_taken[:, None], -1)[:, None]
    filled = (drafts[:, :1] == mask_token_id) & (states != mask_token_id)
    next_hop = torch.where(filled, hop, -1).amax(-1, keepdim=True) + 1
    as_committed = torch.where((hop >= 0) & (hop < next_hop), states == committed[:, None], ~filled)
    on_the_way = as_committed.all(-1, keepdim=True)
    found = torch.where(on_the_way & (hop == next_hop), confidence, float("-inf")).amax(1)
    values = found.log() if measure == "prob" else -F.softplus(-found)
    return torch.where(step_map >= 0, values, float("nan"))


def beside(record: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """A record `[B, N]` and behind it the log-probabilities `[B, L]`, as integers of the same bits: one read for both."""
    return torch.cat([record, log_probs.double().view(torch.int64)], 1)


def read_behind(row: list[int], length: int) -> list[float]:
    """The log-probabilities at the end of a row."""
    return array("d", array("q", row[-length:]).tobytes()).tolist()
