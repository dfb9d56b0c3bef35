"""The baseline: what the public FreeDave implementation does between two forwards, in plain PyTorch.

Same results (without ties, blocks and non-finite logits, which it does not treat). Whatever it does once a draft or once a
sequence, a top-k, a scatter, a comparison read back by the host, is done so here; nothing is made slower than it is there.
"""

from __future__ import annotations

import torch

from freedave_kernels import TOKENS_PER_STATE

NEVER = float("-inf")


def predict_tokens(
    logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    mask_index = input_ids == mask_token_id
    masked_logits = logits[mask_index]
    chosen = masked_logits.argmax(-1)
    probability = torch.softmax(masked_logits, -1).gather(-1, chosen[:, None]).squeeze(-1)
    token_ids = input_ids.clone()
    token_ids[mask_index] = chosen
    confidence = torch.full(input_ids.shape, NEVER, device=input_ids.device)
    confidence[mask_index] = probability.float()
    return token_ids, confidence


def partial_predictions(
    logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[R, C]` each, of R masked rows and C stretches of a vocabulary: the largest logit, its token, sum exp(x - max)."""
    stretches = logits[input_ids == mask_token_id].unflatten(-1, (-1, TOKENS_PER_STATE))
    largest, place = stretches.max(-1)
    first = torch.arange(stretches.shape[1], device=logits.device) * TOKENS_PER_STATE
    return largest.float(), place + first, (stretches.float() - largest[..., None].float()).exp().sum(-1)


def merge_predictions(states: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest, token, total = states[..., 0], states[..., 2], states[..., 4]
    top, part = largest.max(-1, keepdim=True)
    probability = 1 / (total * (largest - top).exp()).sum(-1)
    return token.gather(-1, part).squeeze(-1).long(), probability.float()


def logit_floor(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """`[R]`: as transformers' logits warpers truncate, which sort the vocabulary."""
    truncated = torch.where(logits < logits.topk(top_k).values[:, -1:], NEVER, logits)
    ordered = truncated.sort(-1).values
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    return torch.where(removed, torch.inf, ordered).amin(-1).float()


def rank_positions(confidence: torch.Tensor, mask_index: torch.Tensor) -> torch.Tensor:
    order = torch.where(mask_index, confidence, NEVER).sort(-1, descending=True).indices
    rank = order.argsort(-1)
    return torch.where(mask_index, rank, confidence.shape[-1]).int()


def select_transfer(confidence: torch.Tensor, mask_index: torch.Tensor, num_transfer: int) -> torch.Tensor:
    transfer_index = torch.zeros_like(mask_index)
    for b in range(confidence.shape[0]):
        ranked = torch.where(mask_index[b], confidence[b], NEVER)
        transfer_index[b, ranked.topk(min(num_transfer, int(mask_index[b].sum()))).indices] = True
    return transfer_index


def static_step(
    state: torch.Tensor, token_ids: torch.Tensor, confidence: torch.Tensor, mask_token_id: int, count: int
) -> torch.Tensor:
    """`[L]` each: the state with the `count` most confident masked positions filled."""
    mask_index = state == mask_token_id
    ranked = torch.where(mask_index, confidence, NEVER)
    picked = ranked.topk(min(count, int(mask_index.sum()))).indices
    filled = state.clone()
    filled[picked] = token_ids[picked]
    return filled


def build_drafts(
    input_ids: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
) -> torch.Tensor:
    sequences = []
    for b in range(input_ids.shape[0]):
        arguments = (input_ids[b], token_ids[b], confidence[b], mask_token_id)
        sequences.append(torch.stack([static_step(*arguments, k + 1) for k in range(draft_steps)]))
    return torch.stack(sequences)


def verify_drafts(drafts: torch.Tensor, targets: torch.Tensor) -> list[int]:
    return [_accept(drafts[b], targets[b]) for b in range(drafts.shape[0])]


def _accept(drafts: torch.Tensor, targets: torch.Tensor) -> int:
    accepted = 0
    for _ in range(1, len(drafts)):
        reached = [j for j in range(accepted + 1, len(drafts)) if torch.equal(drafts[j], targets[accepted])]
        if not reached:
            break
        accepted = reached[-1]
    return accepted


def keep(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
) -> None:
    """One layer after the other, as a cache with a pair of tensors a layer has it."""
    for b, (draft, begin, number) in enumerate(zip(accepted.tolist(), start.tolist(), count.tolist(), strict=True)):
        for layer in range(window_key.shape[0]):
            stored_key[layer, b, begin : begin + number] = window_key[layer, b, draft, :number]
            stored_value[layer, b, begin : begin + number] = window_value[layer, b, draft, :number]


def draft_step(
    drafts: torch.Tensor, token_ids: torch.Tensor, confidence: torch.Tensor, mask_token_id: int, draft_steps: int
) -> torch.Tensor:
    """Targets of every draft, verification, and the next (nested) drafts, one sequence after the other."""
    following = []
    for b in range(drafts.shape[0]):
        targets = [
            static_step(state, tokens, certainty, mask_token_id, 1)
            for state, tokens, certainty in zip(drafts[b], token_ids[b], confidence[b], strict=True)
        ]
        a = _accept(drafts[b], torch.stack(targets))
        following.append(
            build_drafts(drafts[b, a][None], token_ids[b, a][None], confidence[b, a][None], mask_token_id, draft_steps)
        )
    return torch.cat(following)
