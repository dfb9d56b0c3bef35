"""Inputs as a decoder in full flight sees them."""

from __future__ import annotations

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

    def parts(self, batch: int) -> Iterator[DraftScene]:
        """The sequences in batches."""
        parts = (self.drafts.split(batch), self.token_ids.split(batch), self.confidence.split(batch))
        for part in zip(*parts, self.num_drafts.split(batch), strict=True):
            yield DraftScene(*part)


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


def rows_of_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[rows, V]`, normal; made a few rows at a time, so that 16-bit logits never exist in 32."""
    values = torch.empty(rows, vocab, dtype=dtype, device=device)
    for part in values.split(64):
        part.copy_(torch.randn(part.shape, device=device))
    return values


def peaked_rows(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, V]` as a language model's: one logit in a thousand within 12 of the largest, the others spread below."""
    values = torch.randn(rows, vocab) * 3
    large = torch.rand(rows, vocab).topk(max(1, vocab // 1000)).indices
    return values.scatter(1, large, torch.rand(large.shape) * 12 + 13).to(dtype)


def masked_ids(rows: int, masked: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[*, 32]` (or `[1, rows]` for fewer) token ids; those of rows `masked` are masked."""
    input_ids = torch.randint(1000, 2000, (rows,))
    input_ids[masked] = MASK
    return input_ids.view(-1, min(rows, 32)).to(device)


def logits(
    rows: int, masked: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` positions in drafts of 32, `masked` of them masked."""
    input_ids = masked_ids(rows, torch.randperm(rows)[:masked], device)
    return rows_of_logits(rows, vocab, dtype, device).view(*input_ids.shape, vocab), input_ids
