"""One state for each 4,096 logits of a row: the scan of scan_logits.py alone, in one launch. It serves callers that never
hold all logits of a row.
"""

from __future__ import annotations

import torch

from freedave_kernels.contract import TOKENS_PER_STATE
from freedave_kernels.triton.scan_logits import scan_logits


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
    # Always whole chunks, however few logits there are: with other lanes, sums would be rounded in another order.
    rest = (measure, suppress_tokens, logits_shift, temperature, seed, positions, floor, TOKENS_PER_STATE)
    return scan_logits(logits, input_ids, mask_token_id, first_token_id, mask_index, *rest)
