"""log(p / (1 - p)) and its inverse, as fixed sequences of float32 operations.

They rank positions, so all backends must find the same bits: each operation below is rounded on its own (no fused
multiply-add, no library logarithm), and csrc/freedave/log_odds.h states the same sequences for C++ and CUDA.
"""

from __future__ import annotations

import torch

LN2_HIGH = 0.693359375  # 10 bits: its product with an exponent is exact
LN2_LOW = -2.12194440e-4
LOG2_E = 1.44269502162933349609375
# 1.5 * 2^23: a float32 of this size has no bits behind the point, so adding it rounds to the nearest integer.
ROUNDER = 12582912.0
SQRT_HALF = 0x3F3504F3  # its bits
LEAST = 2.0**-126  # the smallest normal number
MOST = 1.0 - 2.0**-25  # what a confidence of 1 counts as: halfway to the next smaller one
FURTHEST = 87.0  # exp of it, and its inverse, are normal numbers

# Taylor's: log((1 + s) / (1 - s)) = 2 s + s^3 (2/3 + 2/5 s^2 + ...), exp(r) = 1 + r + r^2 (1/2 + r/6 + ...).
LOG = (2 / 3, 2 / 5, 2 / 7, 2 / 9)
EXP = (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040)


def log_odds(confidence: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of float32 `p`, between -87.4 and 17.4: error at most 4e-6, absolute or relative.

    Outside of [2^-126, 1) `p` counts as the nearest number that has finite log-odds; a NaN gives what 2^-126 gives.
    """
    p = torch.where(confidence >= LEAST, confidence, LEAST)
    # 1 - 2^-25 is no float32: p / (1 - p) is 2^25 there.
    odds = torch.where(p < 1.0, p / (1.0 - p), 1.0 / (1.0 - MOST))
    bits = odds.view(torch.int32)
    exponent = (bits - SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0  # odds = (1 + f) 2^exponent, f in [-0.3, 0.42)
    s = f / (f + 2.0)
    z = s * s
    series = torch.full_like(z, LOG[-1])
    for coefficient in LOG[-2::-1]:
        series = series * z + coefficient
    low = exponent.float() * LN2_LOW
    return exponent.float() * LN2_HIGH + ((s + s) + ((s * z) * series + low))


def sigmoid(log_odds: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of float32 `x`: error at most 2.5 units in the last place between -87 and 87, constant beyond.

    Near 1 it is rounded from what is missing, as the confidences of predict_tokens are: what ties there has to tie here, and
    nothing else, since many positions are that certain. 1 + exp(-x) would round away the last digits before 1.
    """
    x = (-log_odds.abs()).clamp(-FURTHEST)
    exponent = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - exponent * LN2_HIGH) - exponent * LN2_LOW
    series = torch.full_like(r, EXP[-1])
    for coefficient in EXP[-2::-1]:
        series = series * r + coefficient
    exp = ((r * r) * series + r) + 1.0
    power = ((exponent.int() + 127) << 23).view(torch.float32)
    smaller = exp * power / (exp * power + 1.0)
    return torch.where(log_odds > 0.0, 1.0 - smaller, smaller)
