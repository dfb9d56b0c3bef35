"""partial_predictions in plain PyTorch, in float64."""

from __future__ import annotations

import torch

from freedave_kernels.contract import TOKENS_PER_STATE
from freedave_kernels.reference.predict_tokens import NEVER, logits_to_choose_from
from freedave_kernels.reference.sampling import token_noise


def partial_predictions(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    floor: torch.Tensor | None,
) -> torch.Tensor:
    masked = input_ids == mask_token_id if mask_index is None else mask_index
    vocab = logits.shape[-1]
    suppressed_here = None if suppress_tokens is None else suppress_tokens - first_token_id
    x = logits_to_choose_from(logits, suppressed_here, logits_shift, temperature, floor)
    x = torch.where(masked[..., None], x, NEVER)

    states = -(-vocab // TOKENS_PER_STATE)
    x = torch.nn.functional.pad(x, (0, states * TOKENS_PER_STATE - vocab), value=NEVER)
    x = x.unflatten(-1, (states, TOKENS_PER_STATE))
    token = torch.arange(states * TOKENS_PER_STATE, device=x.device).view(states, TOKENS_PER_STATE)

    broken = (x.isnan() | (x == float("inf"))).any(-1)
    x = torch.where(x.isfinite(), x, NEVER)
    top = x.amax(-1, keepdim=True)
    is_top = (x == top) & (top > NEVER)
    chosen = torch.where(is_top, token, states * TOKENS_PER_STATE).amin(-1)
    others = torch.where(token == chosen[..., None], NEVER, x)
    second = others.amax(-1) if measure == "margin" else torch.full_like(chosen, NEVER, dtype=torch.float64)

    below = torch.where(x > NEVER, x - top, NEVER)
    term = below.exp()
    ties = is_top.sum(-1).double()
    rest = torch.where(is_top, 0.0, term).sum(-1)
    weighted = torch.where(term > 0, term * below, 0.0).sum(-1)
    nothing = torch.zeros_like(rest)
    if measure != "neg_entropy":
        weighted = nothing
    if temperature is not None:  # the token with the largest noisy logit, both of which take fields that are free then
        assert seed is not None and positions is not None
        noise = token_noise(seed, positions, first_token_id, states * TOKENS_PER_STATE).view_as(x)
        noise = noise.masked_fill(~(temperature > 0)[..., None, None], 0.0)
        noisy = (x.float() + noise).double()
        second = noisy.amax(-1)
        is_drawn = (noisy == second[..., None]) & (noisy > NEVER)
        chosen = torch.where(is_drawn, token, states * TOKENS_PER_STATE).amin(-1)
        weighted = torch.where(token == chosen[..., None], x, 0.0).sum(-1)
    chosen = torch.where(is_top.any(-1), chosen + first_token_id, -1)
    if measure == "log_odds":  # one is the chosen token, and all that equal it are among the others
        beside = torch.where(others > NEVER, others - top, NEVER).exp().sum(-1)
        counted, summed = is_top.any(-1).double(), beside
    elif measure == "neg_entropy":
        counted, summed = ties, rest
    else:
        counted, summed = nothing, rest + ties
    fields = [
        top.squeeze(-1),
        second,
        chosen.double(),
        counted,
        torch.where(broken, torch.nan, summed),
        weighted,
    ]
    return torch.stack(fields, -1)
