"""merge_predictions in plain PyTorch."""

from __future__ import annotations

import torch

from freedave_kernels.reference.predict_tokens import NEVER, log_odds_of


def merge_predictions(
    states: torch.Tensor, input_ids: torch.Tensor, measure: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    largest, second, token, ties, rest, weighted = states.unbind(-1)
    known = token >= 0
    top = torch.where(known, largest, NEVER).amax(-1, keepdim=True)
    leads = known & (largest == top)
    first, logit = leads, torch.zeros_like(top.squeeze(-1))
    if temperature > 0:  # `second` is the largest noisy logit, and `weighted` its logit
        noisy = torch.where(known, second, NEVER)
        first = known & (noisy == noisy.amax(-1, keepdim=True))
    chosen = torch.where(first, token, torch.inf).amin(-1, keepdim=True)
    if temperature > 0:
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
    confidence = {
        "prob": lambda: logit.exp() / (tied + rest),
        "margin": lambda: -torch.expm1(others - top.squeeze(-1)) / rest,
        "neg_entropy": lambda: weighted / (tied + rest) - (tied.log() + torch.log1p(rest / tied)),
        # Of another token than the largest, that is among its others.
        "log_odds": lambda: log_odds_of(logit, torch.where(logit < 0, (tied + rest) - logit.exp(), (tied - 1) + rest)),
    }[measure]()
    token_ids = torch.where(usable, chosen.squeeze(-1), 0.0).long()
    return torch.where(usable, token_ids, input_ids), torch.where(usable, confidence.float(), NEVER)
