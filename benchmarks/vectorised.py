"""The best eager form of every op: no Python loop over sequences or drafts, no synchronisation, nothing gathered.

This is what the provider `compiled` compiles, so that our kernels are compared with the best that a compiler is given, not
with the compiled form of the public implementation's loops. Same results as `eager` (no ties, blocks, non-finite logits).
"""

from __future__ import annotations

import torch

from freedave_kernels import TOKENS_PER_STATE

NEVER = float("-inf")
MOST_DRAFTS = 64


def predict_tokens(
    logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row, no gather of the masked ones. The arg max is found among equals of the maximum, which compilers vectorise
    where they do not vectorise a reduction that carries an index."""
    x = logits.float()
    top = x.amax(-1, keepdim=True)
    total = (x - top).exp().sum(-1)
    token_ids = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    token = torch.where(x == top, token_ids, x.shape[-1]).amin(-1).long()
    masked = input_ids == mask_token_id
    return torch.where(masked, token, input_ids), torch.where(masked, 1 / total, NEVER)


def partial_predictions(
    logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every row, as `predict_tokens` above."""
    x = logits.float()
    tokens = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    x, tokens = x.unflatten(-1, (-1, TOKENS_PER_STATE)), tokens.view(-1, TOKENS_PER_STATE)
    top = x.amax(-1, keepdim=True)
    total = (x - top).exp().sum(-1)
    return top.squeeze(-1), torch.where(x == top, tokens, logits.shape[-1]).amin(-1).long(), total


def merge_predictions(states: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest, token, total = states[..., 0], states[..., 2], states[..., 4]
    top = largest.amax(-1, keepdim=True)
    probability = 1 / (total * (largest - top).exp()).sum(-1)
    return torch.where(largest == top, token, torch.inf).amin(-1).long(), probability.float()


def logit_floor(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Only what `top_k` leaves is sorted and summed."""
    largest = logits.topk(top_k).values.float()
    probability = largest.softmax(-1)
    above = probability.cumsum(-1) - probability
    return torch.where(above < top_p, largest, torch.inf).amin(-1)


def rank_positions(confidence: torch.Tensor, mask_index: torch.Tensor) -> torch.Tensor:
    order = torch.where(mask_index, confidence, NEVER).argsort(-1, descending=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return torch.where(mask_index, rank, confidence.shape[-1]).int()


def select_transfer(confidence: torch.Tensor, mask_index: torch.Tensor, num_transfer: int) -> torch.Tensor:
    return rank_positions(confidence, mask_index) < torch.where(mask_index, num_transfer, 0)


def build_drafts(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
) -> torch.Tensor:
    """One ranking serves every draft: draft k fills what is ranked below k + 1."""
    rank = rank_positions(confidence, input_ids == mask_token_id)
    counts = torch.arange(1, draft_steps + 1, device=rank.device)[:, None]
    return torch.where(rank[:, None] < counts, token_ids[:, None], input_ids[:, None])


def verify_drafts(drafts: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[B]`: from draft to draft by pointer doubling, so that the steps do not grow with the drafts (at most 64)."""
    assert drafts.shape[1] <= MOST_DRAFTS
    index = torch.arange(drafts.shape[1], device=drafts.device)
    equal = (targets[:, :, None] == drafts[:, None]).all(-1) & (index > index[:, None])
    following = torch.where(equal, index, index[:, None]).amax(-1)  # the largest draft reached, or the draft itself
    for _ in range(6):
        following = following.gather(1, following)
    return following[:, 0]


def keep(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
) -> None:
    """Every position of the window is written, those beyond the count with what is there. (All of it must fit.)"""
    row = torch.arange(accepted.shape[0], device=accepted.device)[:, None]
    position = torch.arange(window_key.shape[3], device=accepted.device)
    place, kept = start[:, None] + position, (position < count[:, None])[..., None, None]
    for window, stored in ((window_key, stored_key), (window_value, stored_value)):
        stored[:, row, place] = torch.where(kept, window[:, row, accepted[:, None], position], stored[:, row, place])


def draft_step(
    drafts: torch.Tensor, token_ids: torch.Tensor, confidence: torch.Tensor, mask_token_id: int, draft_steps: int
) -> torch.Tensor:
    """Targets of every draft, verification and the next nested drafts, for the whole batch at once."""
    masked = drafts == mask_token_id
    ranked = torch.where(masked, confidence, NEVER)
    first = ranked.argmax(-1, keepdim=True)
    at_first = torch.arange(drafts.shape[-1], device=drafts.device) == first
    targets = torch.where(at_first & masked, token_ids, drafts)
    accepted = verify_drafts(drafts, targets)[:, None, None].expand(-1, 1, drafts.shape[-1])
    state, tokens, certainty = (tensor.gather(1, accepted)[:, 0] for tensor in (drafts, token_ids, confidence))
    return build_drafts(state, tokens, certainty, mask_token_id, draft_steps)
