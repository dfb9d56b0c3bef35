"""The noise of tokens that are drawn: Philox-4x32-10, and Gumbel noise of its words as fixed float32 operations.

It decides which token is drawn, so all backends must find the same bits; csrc/freedave/sampling.h states the same for C++ and
CUDA.
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF

LN2_HIGH = 0.693359375  # 10 bits: its product with an exponent is exact
LN2_LOW = -2.12194440e-4
SQRT_HALF = 0x3F3504F3  # its bits
LOG = (2 / 3, 2 / 5, 2 / 7, 2 / 9)  # log((1 + s) / (1 - s)) = 2 s + s^3 (2/3 + 2/5 s^2 + ...)


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four words of 32 bits, in int64, from a counter of four and a key of two (Salmon et al., 2011)."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        # A product of two words has 64 bits, which int64 holds as if it had no sign.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & LOW ^ c1 ^ key0, b & LOW, (a >> 32) & LOW ^ c3 ^ key1, a & LOW
        key0, key1 = (key0 + WEYL[0]) & LOW, (key1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def exponent_of(x: torch.Tensor) -> torch.Tensor:
    """A positive x is (1 + fraction) 2^exponent, the fraction in [-0.3, 0.42)."""
    return (x.view(torch.int32) - SQRT_HALF) >> 23


def fraction_of(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) - (exponent << 23)).view(torch.float32) - 1.0


def log_of(fraction: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """log((1 + fraction) 2^exponent). Each operation is rounded on its own: no fused multiply-add, no library logarithm."""
    s = fraction / (fraction + 2.0)
    z = s * s
    series = torch.full_like(z, LOG[-1])
    for coefficient in LOG[-2::-1]:
        series = series * z + coefficient
    low = exponent.float() * LN2_LOW
    return exponent.float() * LN2_HIGH + ((s + s) + ((s * z) * series + low))


def noise_of(word: torch.Tensor) -> torch.Tensor:
    """Gumbel noise: -log(-log u), 1 - u being the word's upper 24 bits and a half, over 2^24. Error at most 1e-6."""
    w = (((word >> 8).float() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24)
    u = 1.0 - w
    exponent = exponent_of(u)
    fraction = torch.where(exponent == 0, -w, fraction_of(u, exponent))  # near 1, u has lost digits that w has
    exponential = -log_of(fraction, exponent)
    exponent = exponent_of(exponential)
    return -log_of(fraction_of(exponential, exponent), exponent)


def token_noise(seed: torch.Tensor, positions: torch.Tensor, first_token_id: int, vocab: int) -> torch.Tensor:
    """Float32 `[*, L, V]` for tokens from `first_token_id`, a multiple of 4, on. One counter serves four of them."""
    seed, positions = seed[..., None], positions[..., None]
    quad = first_token_id // 4 + torch.arange(-(-vocab // 4), device=seed.device)
    counter = [quad & LOW, positions & LOW, (positions >> 32) & LOW, torch.zeros_like(positions)]
    words = philox(counter, [seed & LOW, (seed >> 32) & LOW])
    return noise_of(torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :vocab])
