"""token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i.

Two launches: the scan of scan_logits.py over long chunks, and the merge of merge_predictions.py. Where single logits of a
row are wanted beside, PyTorch gathers them first.
"""

from __future__ import annotations

import torch

from freedave_kernels.single_logits import forbidden_logits, scored_logits
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
    temperature: torch.Tensor | None,
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
    of_row = (logits_shift, temperature, floor)
    if suppress == "forbid" and suppress_tokens is not None and suppress_tokens.numel():
        forbidden = forbidden_logits(logits, suppress_tokens, *of_row)
    if scored_ids is not None:
        scored = scored_logits(logits, scored_ids, suppress_tokens, suppress, *of_row)
    return merge_and_score(states, input_ids, measure, temperature is not None, forbidden, scored)
