"""logit_floor in plain PyTorch: a sort, and sums of integers."""

from __future__ import annotations

import math

import torch

from freedave_kernels.reference.predict_tokens import NEVER, suppressed_tokens
from freedave_kernels.single_logits import scale_of

LOG2_E = 1.44269504088896341
LN2_HIGH = 0.693359375  # 10 bits: its product with a whole number is exact
LN2_LOW = -2.12194440e-4
SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # of exp, for arguments up to ln 2 / 2
UNITS = 40  # binary places of a weight
LEAST_DIFFERENCE = -28.0  # further down a weight is less than a unit


def logit_floor(
    logits: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    temperature: torch.Tensor | None,
    mask_index: torch.Tensor | None,
    suppress_tokens: torch.Tensor | None,
) -> torch.Tensor:
    x = logits.float() + 0.0  # -0.0 and 0.0 are equal logits
    if suppress_tokens is not None:
        x = x.masked_fill(suppressed_tokens(suppress_tokens, x.shape[-1]), NEVER)
    x = x.sort(-1, descending=True).values  # NaN wherever the row has one comes first
    scaled = x if temperature is None else x * scale_of(temperature)[..., None]
    usable = scaled[..., 0].isfinite()
    below = torch.where(usable[..., None], scaled - scaled[..., :1], 0.0)

    stays = x > NEVER
    if top_k is not None:
        stays &= x >= x[..., min(top_k, x.shape[-1]) - 1, None]
    if top_p is not None and top_p < 1:
        weight = torch.where(stays, weight_of(below), 0)
        above = weight.cumsum(-1) - weight
        stays &= above.double() < weight.sum(-1, keepdim=True).double() * top_p
    if min_p is not None:
        stays &= below >= torch.tensor(math.log(min_p), dtype=torch.float32, device=x.device)
    floor = torch.where(stays, x, math.inf).amin(-1)
    for wanted in (mask_index, None if temperature is None else temperature > 0):
        usable = usable if wanted is None else usable & wanted
    return torch.where(usable, floor, NEVER)


def weight_of(difference: torch.Tensor) -> torch.Tensor:
    """exp(difference) for what is at most 0, as a whole number of 2^-40, rounded down. csrc/freedave/logit_floor.h states the
    same. Each operation is rounded on its own: no fused multiply-add, no library exponential.
    """
    counts = difference >= LEAST_DIFFERENCE
    d = torch.where(counts, difference, 0.0)
    whole = (d * LOG2_E).round()
    r = (d - whole * LN2_HIGH) - whole * LN2_LOW
    series = torch.full_like(r, SERIES[0])
    for coefficient in SERIES[1:]:
        series = series * r + coefficient
    mantissa = (series * 2.0**30).int().long()
    return torch.where(counts, (mantissa << (UNITS - 30)) >> -whole.long(), 0)
