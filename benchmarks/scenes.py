"""Inputs as a decoder in full flight sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import freedave_kernels as fk

MASK = 7


@dataclass(frozen=True)
class DraftScene:
    """Drafts that were built from one prediction and forwarded, and predictions that agree with them up to a point."""

    drafts: torch.Tensor
    token_ids: torch.Tensor
    confidence: torch.Tensor
    num_drafts: torch.Tensor

    def batches(self, batch: int) -> Iterator[DraftScene]:
        """The sequences in batches, over and over: a decoder never sees the same ones twice, and a branch predictor that
        does learns a small batch by heart.
        """
        parts = (self.drafts.split(batch), self.token_ids.split(batch), self.confidence.split(batch))
        return itertools.cycle([DraftScene(*part) for part in zip(*parts, self.num_drafts.split(batch), strict=True)])


def drafts(batch: int, count: int, length: int, device: torch.device | str = "cpu") -> DraftScene:
    """Half of the window masked; the predictions bear out the first half of the chain and rank at random after it."""
    state = torch.randint(1000, 2000, (batch, length))
    state[:, torch.randperm(length)[: (length + 1) // 2]] = MASK
    tokens = torch.randint(1000, 2000, (batch, length))
    confidence = torch.rand(batch, length)
    built, num_drafts = fk.build_drafts(state, tokens, confidence, MASK, count)
    token_ids = tokens[:, None].repeat(1, count, 1)
    certainty = confidence[:, None].repeat(1, count, 1)
    certainty[:, count // 2 :] = torch.rand(batch, count - count // 2, length)
    return DraftScene(*(tensor.to(device) for tensor in (built, token_ids, certainty, num_drafts)))


def logits(
    rows: int, masked: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` positions in drafts of 32, `masked` of them masked."""
    input_ids = torch.randint(1000, 2000, (rows,))
    input_ids[torch.randperm(rows)[:masked]] = MASK
    length = min(rows, 32)
    values = torch.randn(rows // length, length, vocab, device=device).to(dtype)
    return values, input_ids.view(-1, length).to(device)
