"""What a masked-diffusion model can say about the likelihood of a text: a lower bound, by Monte Carlo.

Such a model has no chain of next-token probabilities. It bounds the log-likelihood of n tokens x from below: mask a random
subset S of size l, l uniform in 1 ... n, and weigh what the model gives the masked tokens, E[n/l sum_{i in S} log p(x_i |
the rest)]. It is the bound that LLaDA's published evaluation samples. Sizes are spread evenly instead of drawn one by one,
which is unbiased as well and varies less; where there are no more subsets than samples, they are enumerated and the bound
is exact.

With block-causal attention the model is a chain over blocks, each given the finished ones before it: the bound is the sum
of the blocks' own bounds. Positions after the text, up to the end of its last block or of the model's positions, are masked,
as they are when that block is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from freedave.forward.attention import block_causal_mask
from freedave.models.diffusion_lm import DiffusionLM


@dataclass(frozen=True)
class Noise:
    """Which of n positions are masked in each sample, `masked [S, n]` bool, and what a sample weighs, `weight [S]`."""

    masked: torch.Tensor
    weight: torch.Tensor


def noise(length: int, samples: int, seed: int) -> Noise:
    """The samples for `length` positions: every subset where these are no more than `samples`, else random ones.

    The same for equal arguments, so that answers of equal length are compared under equal noise.
    """
    if 2**length - 1 <= samples:
        subsets = [subset for size in range(1, length + 1) for subset in combinations(range(length), size)]
        masked = torch.zeros(len(subsets), length, dtype=torch.bool)
        for row, subset in enumerate(subsets):
            masked[row, list(subset)] = True
        # A subset of size l has probability 1 / (n * C(n, l)), and the sum over it weighs n / l.
        weight = torch.tensor(
            [1 / (len(subset) * math.comb(length, len(subset))) for subset in subsets], dtype=torch.float32
        )
        return Noise(masked, weight)
    generator = torch.Generator().manual_seed(seed)
    spread = (torch.arange(samples) + torch.rand(1, dtype=torch.float32, generator=generator)) / samples
    sizes = 1 + (spread * length).long().clamp(max=length - 1)
    order = torch.rand(samples, length, dtype=torch.float32, generator=generator).argsort(dim=1).argsort(dim=1)
    return Noise(order < sizes[:, None], length / sizes.float() / samples)


def log_likelihood_bound(
    lm: DiffusionLM,
    context: list[int],
    continuation: list[int],
    *,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """A lower bound, in nats, on the log-likelihood of `continuation` after `context`.

    Args:
        lm: the model.
        context, continuation: token ids; the context may be empty, and neither may hold the mask token.
        samples: noise samples for each block of a block-causal model, or for the whole continuation.
        batch_size: noise samples a forward.
        seed: of the noise.

    Raises:
        ValueError: no continuation, a mask token, or more positions than the model has.
    """
    if not continuation:
        raise ValueError("the continuation is empty: give at least one token")
    text = torch.tensor([*context, *continuation], device=lm.device)
    if bool((text == lm.mask_token_id).any()):
        raise ValueError(f"the text holds the mask token (id {lm.mask_token_id}), whose likelihood is not defined")
    if lm.max_positions is not None and len(text) > lm.max_positions:
        raise ValueError(f"the text needs {len(text)} positions, but the model has {lm.max_positions}; shorten it")
    total = 0.0
    for first, last, end in _blocks(lm, len(context), len(text)):
        state = text.new_full((end,), lm.mask_token_id)
        state[:last] = text[:last]
        sampled = noise(last - first, samples, seed)
        for masked, weight in zip(sampled.masked.split(batch_size), sampled.weight.split(batch_size), strict=True):
            total += _weighted_log_probability(lm, state, first, masked.to(lm.device), weight.to(lm.device))
    return total


def _blocks(lm: DiffusionLM, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The parts whose bounds add up: (first position, one after the last, positions that a forward covers)."""
    if lm.attention == "full":
        yield begin, end, end
        return
    assert lm.block_length is not None
    first_block = begin // lm.block_length * lm.block_length
    for block in range(first_block, end, lm.block_length):
        block_end = block + lm.block_length
        covered = block_end if lm.max_positions is None else min(block_end, lm.max_positions)
        yield max(block, begin), min(block_end, end), covered


@torch.inference_mode()
def _weighted_log_probability(
    lm: DiffusionLM, state: torch.Tensor, first: int, masked: torch.Tensor, weight: torch.Tensor
) -> float:
    """One forward over the samples `masked [S, n]` of the positions from `first`."""
    input_ids = state.expand(masked.shape[0], -1).clone()
    input_ids[:, first : first + masked.shape[1]].masked_fill_(masked, lm.mask_token_id)
    sample, position = masked.nonzero(as_tuple=True)
    position = position + first
    row = (position - 1).clamp(min=0) if lm.logits_shift else position
    mask = None
    if lm.attention == "block_causal":
        assert lm.block_length is not None
        mask = block_causal_mask(len(state), lm.block_length, lm.device)
    logits = lm.logits(input_ids, sample * len(state) + row, attention_mask=mask)
    log_probability = logits.float().log_softmax(-1).gather(1, state[position][:, None])[:, 0]
    return float((log_probability.double() * weight.double()[sample]).sum())
