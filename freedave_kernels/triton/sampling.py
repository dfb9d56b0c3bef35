"""The noise of tokens that are drawn, as freedave_kernels/reference/sampling.py states it: the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from freedave_kernels.reference import sampling

LN2_HIGH, LN2_LOW = tl.constexpr(sampling.LN2_HIGH), tl.constexpr(sampling.LN2_LOW)
SQRT_HALF = tl.constexpr(sampling.SQRT_HALF)
LOG_0, LOG_1, LOG_2, LOG_3 = map(tl.constexpr, sampling.LOG)
ROUNDS = tl.constexpr(sampling.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = map(tl.constexpr, sampling.MULTIPLIERS)
WEYL_0, WEYL_1 = map(tl.constexpr, sampling.WEYL)
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
def words_of(quad, seed, position):
    """The four words of a quad's tokens, in their order: Philox-4x32-10. A product's halves come of one instruction, which
    those of `tl.philox` do not.
    """
    multiplier_0, multiplier_1 = tl.full([], MULTIPLIER_0, tl.uint64), tl.full([], MULTIPLIER_1, tl.uint64)
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = quad.to(tl.uint32)
    second = tl.zeros_like(first) + position.to(tl.uint32)
    third = tl.zeros_like(first) + (position >> 32).to(tl.uint32)
    fourth = tl.zeros_like(first)
    for _ in tl.static_range(ROUNDS):
        a = first.to(tl.uint64) * multiplier_0
        b = third.to(tl.uint64) * multiplier_1
        first, second = (b >> 32).to(tl.uint32) ^ second ^ key_0, b.to(tl.uint32)
        third, fourth = (a >> 32).to(tl.uint32) ^ fourth ^ key_1, a.to(tl.uint32)
        key_0 += tl.full([], WEYL_0, tl.uint32)
        key_1 += tl.full([], WEYL_1, tl.uint32)
    return first, second, third, fourth


@triton.jit
def word_of(token, seed, position):
    """The word of each of some tokens."""
    first, second, third, fourth = words_of(token // 4, seed, position)
    return tl.where(token % 4 < 2, tl.where(token % 2 == 0, first, second), tl.where(token % 2 == 0, third, fourth))
