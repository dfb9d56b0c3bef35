"""Single logits of a row, gathered in PyTorch: of tokens to be scored, and of suppressed ones that stay in the softmax.
They are few, so the scan of a vocabulary knows nothing of them.
"""

from __future__ import annotations

import torch


def scale_of(temperature: torch.Tensor) -> torch.Tensor:
    """What logits are multiplied by: 1 where no token is drawn."""
    return torch.where(temperature > 0, 1.0 / temperature, 1.0)


def once(token_ids: torch.Tensor) -> torch.Tensor:
    """A list in which -1, which is no token, stands for a token's repetitions."""
    ordered = token_ids.sort().values
    repeats = torch.zeros_like(ordered, dtype=torch.bool)
    repeats[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(repeats, -1)


def logits_of(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    floor: torch.Tensor | None,
) -> torch.Tensor:
    """Of tokens `[*, L, S]`, as the scan sees them where they are not suppressed: float32, contiguous, -inf for what is no
    token of the vocabulary.
    """
    vocab = logits.shape[-1]
    places = token_ids.clamp(0, vocab - 1)
    if logits_shift:  # the first row serves the first two positions
        rows = (logits[..., :1, :], places[..., :1, :]), (logits[..., :-1, :], places[..., 1:, :])
        x = torch.cat([row.gather(-1, place) for row, place in rows], -2).float()
    else:
        x = logits.gather(-1, places).float()
    absent = (token_ids < 0) | (token_ids >= vocab)
    if temperature is not None:
        absent |= False if floor is None else x < floor[..., None]
        x = x * scale_of(temperature)[..., None]
    return x.masked_fill(absent, float("-inf")).contiguous()


def forbidden_logits(
    logits: torch.Tensor,
    suppress_tokens: torch.Tensor,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    floor: torch.Tensor | None,
    first_token_id: int = 0,
) -> torch.Tensor:
    """`[*, L, S]` of the suppressed tokens, which stay in the softmax; each once."""
    token_ids = (once(suppress_tokens) - first_token_id).expand(*logits.shape[:-1], -1)
    return logits_of(logits, token_ids, logits_shift, temperature, floor)


def scored_logits(
    logits: torch.Tensor,
    scored_ids: torch.Tensor,
    suppress_tokens: torch.Tensor | None,
    suppress: str,
    logits_shift: bool,
    temperature: torch.Tensor | None,
    floor: torch.Tensor | None,
    first_token_id: int = 0,
) -> torch.Tensor:
    """`[*, L]` of the tokens to be scored: -inf for those out of the softmax, NaN where nothing is to be scored."""
    place = (scored_ids - first_token_id)[..., None]
    scored = logits_of(logits, place, logits_shift, temperature, floor).squeeze(-1)
    if suppress == "exclude" and suppress_tokens is not None:
        scored = scored.masked_fill((scored_ids[..., None] == suppress_tokens).any(-1), float("-inf"))
    return scored.masked_fill(scored_ids < 0, float("nan"))
