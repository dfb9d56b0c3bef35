"""draft_step in plain PyTorch: the other ops, composed."""

from __future__ import annotations

import torch

from freedave_kernels.reference.build_drafts import build_drafts, threshold_of_each, tokens_of_each
from freedave_kernels.reference.rank_positions import block_of, predicted_confidence, rankable
from freedave_kernels.reference.select_transfer import in_current_block, select_transfer
from freedave_kernels.reference.verify_drafts import accept_chain


def draft_step(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int,
    tokens_per_step_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    order: str,
    block_length: int | None,
    drafting: str,
    match: str,
    eos_token_id: int | None,
    eos_token_id_per_row: torch.Tensor | None,
    step: torch.Tensor | None,
    answer_start: torch.Tensor | None,
) -> torch.Tensor:
    batch, count, length = drafts.shape
    rows = torch.arange(batch, device=drafts.device)
    tokens = tokens_of_each(drafts, tokens_per_step, tokens_per_step_per_row)
    limit = threshold_of_each(confidence, threshold, threshold_per_row)
    step_rule = (tokens_per_step, tokens, threshold, limit, rule, order, block_length)
    of_drafts = (tokens.repeat_interleave(count), threshold, limit.repeat_interleave(count), rule, order, block_length)
    confidence = predicted_confidence(token_ids, confidence, mask_token_id)

    # Verify: each draft's target is one static step from it under its own predictions.
    ids, predicted, certainty = (x.reshape(batch * count, length) for x in (drafts, token_ids, confidence))
    targets, _ = build_drafts(ids, predicted, certainty, mask_token_id, 1, tokens_per_step, *of_drafts)
    targets = targets.view(batch, count, length)
    accepted, hop = accept_chain(drafts, targets, num_drafts, match, mask_token_id)

    # Draft again from the accepted state.
    state, carried_tokens, carried_confidence = (x[rows, accepted] for x in (drafts, token_ids, confidence))
    next_drafts, next_count = build_drafts(
        state, carried_tokens, carried_confidence, mask_token_id, draft_steps, *step_rule
    )
    if drafting == "recycled":
        picks = torch.where(limit.isnan(), tokens, 1)
        first = (next_drafts[:, 0], next_count)
        inputs = (drafts, token_ids, confidence, num_drafts, accepted)
        next_drafts, next_count = _recycle(*first, *inputs, mask_token_id, draft_steps, picks, order, block_length)

    # Account for what is final now: the committed state is the next draft 0.
    committed = next_drafts[:, 0]
    step_map, steps = _step_map(drafts, committed, hop, hop[rows, accepted], mask_token_id)
    if step is not None:
        step_map = torch.where(step_map >= 0, step_map + step[:, None], -1)
    end = torch.tensor(-1 if eos_token_id is None else eos_token_id, device=drafts.device)
    end = (end if eos_token_id_per_row is None else eos_token_id_per_row).expand(batch)
    counters = _counters(
        accepted,
        steps,
        step_map,
        next_drafts,
        next_count,
        state,
        carried_confidence,
        mask_token_id,
        block_length,
        end,
        answer_start,
    )
    # Two confidences in the place of an integer; a 0 fills up the last one.
    pairs = torch.nn.functional.pad(carried_confidence, (0, length % 2)).view(torch.int64)
    return torch.cat([counters, carried_tokens, step_map, next_drafts.flatten(1), pairs], -1)


def _recycle(
    first: torch.Tensor,
    first_count: torch.Tensor,
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    accepted: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    picks: torch.Tensor,
    order: str,
    block_length: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next drafts from all input drafts' predictions; `first` is draft 0, which the accepted draft's alone decide, and
    every further one fills `picks [B]` positions.
    """
    batch, count, length = drafts.shape
    rows = torch.arange(batch, device=drafts.device)
    index = torch.arange(count, device=drafts.device)
    inactive = index >= num_drafts[:, None].clamp(min=1)

    state, built = first, [first]
    num_built = first_count.clamp(max=1)
    for _ in range(1, draft_steps):
        distance = (drafts != state[:, None]).sum(-1).masked_fill(inactive, length + 1)
        nearest = torch.where(distance == distance.amin(-1, keepdim=True), index, count).amin(-1)
        open_there = drafts[rows, nearest] == mask_token_id
        token = torch.where(open_there, token_ids[rows, nearest], token_ids[rows, accepted])
        certainty = torch.where(open_there, confidence[rows, nearest], confidence[rows, accepted])

        masked = state == mask_token_id
        pick = select_transfer(certainty, masked, 1, picks, None, None, "threshold", "top", order, block_length)
        pick = pick & (num_built == len(built))[:, None]  # a chain that has ended stays ended
        state = torch.where(pick, token, state)
        num_built = num_built + pick.any(-1)
        built.append(state)
    return torch.stack(built, 1), num_built.int()


def _step_map(
    drafts: torch.Tensor,
    committed: torch.Tensor,
    hop: torch.Tensor,
    hops: torch.Tensor,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, L]`: the static step, counted from 0, that committed each position in this call, else -1; `[B]`: steps taken.

    Each hop of the chain is a step, and so is the one to the new draft 0. A step that fills nothing is none: where nothing
    can be ranked, a draft's target is the draft itself.
    """
    batch, count, _ = drafts.shape
    open_before = drafts[:, 0] == mask_token_id
    in_chain = (drafts != mask_token_id) & (hop < count)[..., None]
    filled_by = torch.where(in_chain, hop[..., None], count).amin(1)  # the first hop that did
    last = (filled_by == count) & (committed != mask_token_id)
    filled_by = torch.where(last, hops[:, None] + 1, filled_by)
    filled_by = torch.where(open_before & ((filled_by < count) | last), filled_by, 0)  # 0: none

    fills = torch.zeros(batch, count + 1, dtype=torch.int64, device=drafts.device).scatter(1, filled_by, 1)
    fills[:, 0] = 0
    static_step = (fills.cumsum(-1) - 1).gather(1, filled_by)
    return torch.where((filled_by > 0) & (committed != mask_token_id), static_step, -1), fills.sum(-1)


def _counters(
    accepted: torch.Tensor,
    steps: torch.Tensor,
    step_map: torch.Tensor,
    drafts: torch.Tensor,
    num_drafts: torch.Tensor,
    state: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    block_length: int | None,
    eos_token_id: torch.Tensor,
    answer_start: torch.Tensor | None,
) -> torch.Tensor:
    _, count, length = drafts.shape
    position = torch.arange(length, device=drafts.device)
    block = block_of(length, block_length, drafts.device)
    committed = drafts[:, 0]
    masked = committed == mask_token_id

    open_before = state == mask_token_id
    current, complete = _first_open_block(masked, block_length)
    _, reusable = _first_open_block(open_before, block_length)

    needs_forward = (drafts == mask_token_id).any(-1) & (
        torch.arange(count, device=drafts.device) < num_drafts[:, None]
    )
    ends = (committed == eos_token_id[:, None]) & (eos_token_id >= 0)[:, None] & (position < complete[:, None])
    if answer_start is not None:
        ends = ends & (position >= answer_start[:, None])
    ended = ends.any(-1)

    broken = open_before & in_current_block(open_before, block_length) & ~rankable(confidence, open_before)
    first_broken = torch.where(broken, position, length).amin(-1)

    columns = [
        accepted,
        steps,
        (step_map >= 0).sum(-1),
        (masked & (block == current[:, None])).sum(-1),
        masked.sum(-1),
        reusable,
        needs_forward.long().cumprod(-1).sum(-1),
        ended | ~masked.any(-1),
        torch.where(first_broken < length, first_broken, -1),
        num_drafts,
        ended,
    ]
    return torch.stack([column.long() for column in columns], -1)


def _first_open_block(masked: torch.Tensor, block_length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B]` each: the lowest block with a masked position, and how many positions the complete blocks before it hold."""
    length = masked.shape[-1]
    size = block_length or length
    position = torch.arange(length, device=masked.device)
    first = torch.where(masked, position, length).amin(-1)
    block = first // size
    return block, torch.where(first < length, block * size, length)
