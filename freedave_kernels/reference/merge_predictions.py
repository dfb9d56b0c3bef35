"""merge_predictions in plain PyTorch."""

from __future__ import annotations

import torch

from freedave_kernels.contract import STATE_FIELDS
from freedave_kernels.reference.predict_tokens import NEVER, log_odds_of


def merge_predictions(
    states: torch.Tensor, input_ids: torch.Tensor, measure: str, drawn: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Of each row; a state that does not know such a logit has -inf.
    scored, *forbidden = states[..., STATE_FIELDS:].amax(-2).unbind(-1) if states.shape[-1] > STATE_FIELDS else (None,)
    largest, second, token, ties, rest, weighted = states[..., :STATE_FIELDS].unbind(-1)
    known = token >= 0
    top = torch.where(known, largest, NEVER).amax(-1, keepdim=True)
    leads = known & (largest == top)
    first, logit = leads, torch.zeros_like(top.squeeze(-1))
    if drawn:  # `second` is the largest noisy logit, and `weighted` its logit
        noisy = torch.where(known, second, NEVER)
        first = known & (noisy == noisy.amax(-1, keepdim=True))
    chosen = torch.where(first, token, torch.inf).amin(-1, keepdim=True)
    if drawn:
        logit = torch.where(token == chosen, weighted - top, 0.0).sum(-1)
    usable = (top.squeeze(-1).isfinite()) & (rest.sum(-1) < torch.inf)  # NaN compares false

    # Each part's terms relative to the top of all; what leads keeps its ties, what does not has them among its terms.
    shift = torch.where(known & usable[..., None], largest - top, 0.0)
    scale = torch.where(known, shift.exp(), 0.0)
    terms = torch.where(leads, rest, ties + rest)
    tied = torch.where(leads, ties, 0.0).sum(-1)
    rest = (scale * terms).sum(-1)
    weighted = (scale * (weighted + shift * terms)).sum(-1)
    others = torch.where(token == chosen, second, largest).amax(-1)
    top = top.squeeze(-1)
    margin = -torch.expm1(others - top)  # of the second, which is one that may be chosen
    reference, tied, rest, weighted = with_forbidden(top, tied, rest, weighted, forbidden)
    usable &= rest < torch.inf
    logit = torch.where(usable, logit + (top - reference), 0.0)
    log_sum = torch.where(tied > 0, tied.log() + torch.log1p(rest / tied), rest.log())
    confidence = {
        "prob": lambda: logit.exp() / (tied + rest),
        "margin": lambda: logit.exp() * margin / (tied + rest),
        "neg_entropy": lambda: weighted / (tied + rest) - log_sum,
        # Of another token than the largest, that is among its others.
        "log_odds": lambda: log_odds_of(logit, torch.where(logit < 0, (tied + rest) - logit.exp(), (tied - 1) + rest)),
    }[measure]()
    token_ids = torch.where(usable, chosen.squeeze(-1), 0.0).long()
    token_ids, confidence = torch.where(usable, token_ids, input_ids), torch.where(usable, confidence.float(), NEVER)
    if scored is None:
        return token_ids, confidence, confidence.new_empty(0)
    return token_ids, confidence, torch.where(usable, scored - reference - log_sum, torch.nan).float()


def with_forbidden(
    top: torch.Tensor, tied: torch.Tensor, rest: torch.Tensor, weighted: torch.Tensor, forbidden: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The softmax relative to `top` with these logits in it, and what it is relative to then. NaN and +inf break a row."""
    for logit in forbidden:
        larger = torch.maximum(top, torch.where(logit < torch.inf, logit, NEVER))
        shift, below = torch.where(top > NEVER, top - larger, 0.0), torch.where(logit > NEVER, logit - larger, NEVER)
        terms = torch.where(shift < 0, tied + rest, rest)
        weighted = shift.exp() * (weighted + shift * (tied + rest))
        tied = torch.where(shift < 0, 0.0, tied) + (below == 0)
        rest = shift.exp() * terms + torch.where(
            below == 0, 0.0, torch.where(logit < torch.inf, below.exp(), torch.nan)
        )
        weighted = weighted + torch.where(below > NEVER, below.exp() * below, 0.0)
        top = larger
    return top, tied, rest, weighted
