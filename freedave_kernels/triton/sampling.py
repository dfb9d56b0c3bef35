"""The noise of tokens that are drawn, as freedave_kernels/reference/sampling.py states it: the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from freedave_kernels.reference import sampling

LN2_HIGH, LN2_LOW = tl.constexpr(sampling.LN2_HIGH), tl.constexpr(sampling.LN2_LOW)
SQRT_HALF = tl.constexpr(sampling.SQRT_HALF)
LOG_0, LOG_1, LOG_2, LOG_3 = map(tl.constexpr, sampling.LOG)
ROUNDS = tl.constexpr(sampling.ROUNDS)
STEP = tl.constexpr(2.0**-24)
MOST = tl.constexpr(1 - 2.0**-24)


@triton.jit
def exponent_of(x):
    return (x.to(tl.int32, bitcast=True) - SQRT_HALF) >> 23


@triton.jit
def fraction_of(x, exponent):
    return (x.to(tl.int32, bitcast=True) - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def log_of(fraction, exponent):
    s = tl.div_rn(fraction, fraction + 2.0)
    z = s * s
    series = z * LOG_3 + LOG_2
    series = series * z + LOG_1
    series = series * z + LOG_0
    scale = exponent.to(tl.float32)
    return scale * LN2_HIGH + ((s + s) + ((s * z) * series + scale * LN2_LOW))


@triton.jit
def noise_of(word):
    w = tl.minimum(((word >> 8).to(tl.float32) + 0.5) * STEP, MOST)
    u = 1.0 - w
    exponent = exponent_of(u)
    exponential = -log_of(tl.where(exponent == 0, -w, fraction_of(u, exponent)), exponent)
    exponent = exponent_of(exponential)
    return -log_of(fraction_of(exponential, exponent), exponent)


@triton.jit
def token_noise(seed, position, first_quad, lane, GROUP: tl.constexpr):
    """float32 `[LANES, GROUP]`: of each lane's tokens, four of which have one counter."""
    QUADS: tl.constexpr = GROUP // 4
    quad = (first_quad + lane[:, None] * QUADS + tl.arange(0, QUADS)[None, :]).to(tl.uint32)
    low = tl.zeros_like(quad) + (position & 0xFFFFFFFF).to(tl.uint32)
    high = tl.zeros_like(quad) + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, quad, low, high, tl.zeros_like(quad), ROUNDS)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return noise_of(tl.reshape(words, [lane.shape[0], GROUP]))
