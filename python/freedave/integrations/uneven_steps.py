"""Decoding in steps that fill different numbers of positions, which our loop does not have: draft-and-verify over the ops.

For full attention without a cache; the answer is one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

import freedave_kernels as fk
from freedave.decode.output import NonFiniteLogitsError
from freedave.models.diffusion_lm import DiffusionLM


def decode_unevenly(
    lm: DiffusionLM, prompts: torch.Tensor, counts: Sequence[int], draft_steps: int, measure: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers `[B, new]` to `prompts [B, P]`, and the step that filled each position.

    Step s fills `counts[s]` positions, at least one, the first ones as `ranked` has it; `new` is their sum. Draft k of a
    sequence is its state k steps after what is certain, made from the predictions of one state; it is right if each draft
    before it predicts the next one. With one draft that is static decoding.

    Raises:
        NonFiniteLogitsError: the model produced NaN or infinite logits.
    """
    mask, device = lm.mask_token_id, lm.device
    filled = torch.tensor([0, *itertools.accumulate(counts)], device=device)  # after so many steps
    last = len(counts)
    answers = torch.full((len(prompts), sum(counts)), mask, device=device)
    step_map = torch.full_like(answers, -1)
    going = torch.arange(len(prompts), device=device)
    taken = torch.zeros_like(going)
    drafts, num_drafts = answers[:, None], torch.ones_like(going)
    chain = torch.arange(draft_steps, device=device)
    while len(going):
        masked = drafts == mask
        token_ids, rank = _ranked_drafts(lm, prompts[going], drafts, masked, measure)
        step = torch.clamp(
            taken[:, None] + chain[: drafts.shape[1]], max=last - 1
        )  # that each draft's predictions take
        fills = rank < (filled[step + 1] - filled[step])[..., None]
        targets = torch.where(fills, token_ids, drafts)
        accepted = fk.verify_drafts(drafts, targets, num_drafts=num_drafts)

        right = (chain[: drafts.shape[1]] <= accepted[:, None])[..., None]
        expect_predicted(masked & right, rank)
        row = torch.arange(len(going), device=device)
        before, token_ids, rank = drafts[row, accepted], token_ids[row, accepted], rank[row, accepted]
        answers[going] = targets[row, accepted]
        # The last right draft in which a position is masked fills it.
        found = taken[:, None] + (masked & right).sum(1) - 1
        step_map[going] = torch.where(masked[:, 0] & (answers[going] != mask), found, step_map[going])

        begin = filled[taken + accepted]
        taken = taken + accepted + 1
        reached = filled[torch.clamp(taken[:, None] + chain, max=last)] - begin[:, None]
        drafts = torch.where(rank[:, None] < reached[..., None], token_ids[:, None], before[:, None])
        num_drafts = torch.clamp(last - taken, max=draft_steps)
        more = num_drafts > 0
        going, taken, num_drafts, drafts = going[more], taken[more], num_drafts[more], drafts[more]
        drafts = drafts[:, : max(num_drafts.tolist(), default=1)]
    return answers, step_map


def _ranked_drafts(
    lm: DiffusionLM, prompts: torch.Tensor, drafts: torch.Tensor, masked: torch.Tensor, measure: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ranked` of drafts `[B, K, L]`, each behind its prompt; only the logits of masked positions are made."""
    run, position = masked.flatten(0, 1).nonzero().unbind(1)
    input_ids = torch.cat([prompts[:, None].expand(-1, drafts.shape[1], -1), drafts], 2).flatten(0, 1)
    rows = run * input_ids.shape[1] + prompts.shape[1] + position - int(lm.logits_shift)
    with torch.inference_mode():
        logits = lm.logits(input_ids, rows)
    return ranked(lm, logits, drafts, masked, measure)


def ranked(
    lm: DiffusionLM, logits: torch.Tensor, state: torch.Tensor, masked: torch.Tensor, measure: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of `state [*, L]` from the logits `[R, V]` of its masked positions, and the rank of each: 0 comes first.

    Probabilities are ranked in the logits' dtype: in 16 bits, many are equal. Equal ones go to the lowest position. What has
    no finite logits has rank L, as what is not masked.
    """
    mask = lm.mask_token_id
    token_ids, confidence = state.clone(), torch.full(state.shape, -torch.inf, device=state.device)
    rank_dtype = "logits" if measure == "prob" else "float32"
    token_ids[masked], confidence[masked] = fk.predict_tokens(
        logits, state[masked], mask, measure=measure, suppress_tokens=[mask], rank_dtype=rank_dtype
    )
    return token_ids, fk.rank_positions(confidence, masked & (confidence > -torch.inf))


def expect_predicted(masked: torch.Tensor, rank: torch.Tensor) -> None:
    """Raises NonFiniteLogitsError where a position `[*, L]` that is masked has no rank."""
    broken = masked & (rank == rank.shape[-1])
    if broken.any():
        position = int(broken.nonzero()[0, -1])
        raise NonFiniteLogitsError(
            f"the logits of position {position} of the answer are not finite; check the weights and the dtype of the model"
        )
