"""token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i.

Two launches: the scan of scan_logits.py over long chunks, and the merge of merge_predictions.py. Where single logits of a
row are wanted beside, PyTorch gathers them first.
"""

from __future__ import annotations

import torch

from freedave_kernels.triton.launch import power_of_two
from freedave_kernels.triton.merge_predictions import merge_and_score
from freedave_kernels.triton.scan_logits import VECTOR_BYTES, scan_logits

CHUNK = 16384  # logits; splits a row of 150 K so that a single one occupies ten SMs


def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    mask_index: torch.Tensor | None,
    measure: str,
    suppress_tokens: torch.Tensor | None,
    logits_shift: bool,
    temperature: float,
    seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    floor: torch.Tensor | None,
    scored_ids: torch.Tensor | None,
    suppress: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunk = min(CHUNK, max(VECTOR_BYTES // logits.element_size(), power_of_two(logits.shape[-1])))
    rest = (measure, suppress_tokens, logits_shift, temperature, seed, positions, floor, chunk)
    states = scan_logits(logits, input_ids, mask_token_id, 0, mask_index, *rest)
    forbidden = scored = None
    if suppress == "forbid" and suppress_tokens is not None and suppress_tokens.numel():
        token_ids = once(suppress_tokens).expand(*input_ids.shape, -1)
        forbidden = logits_of(logits, token_ids, logits_shift, temperature, floor)
    if scored_ids is not None:
        scored = logits_of(logits, scored_ids[..., None], logits_shift, temperature, floor).squeeze(-1)
        if suppress == "exclude" and suppress_tokens is not None:
            scored = scored.masked_fill((scored_ids[..., None] == suppress_tokens).any(-1), float("-inf"))
        scored = scored.masked_fill(scored_ids < 0, float("nan"))
    return merge_and_score(states, input_ids, measure, temperature, forbidden, scored)


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
    temperature: float,
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
    if temperature > 0:
        absent |= False if floor is None else x < floor[..., None]
        x = x * (1 / temperature)
    return x.masked_fill(absent, float("-inf")).contiguous()
