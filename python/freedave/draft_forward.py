"""The forward over drafts: one model call that predicts every masked position of every draft, with its cache policy.

A policy is two calls: `predict(drafts, start)` forwards the drafts of a window that begins at position `start`, and
`keep(draft, count)` makes the first `count` positions of that window part of the prefix, as the accepted draft saw them.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import torch

from freedave.attention import block_causal_mask
from freedave.cache import PrefixCache
from freedave.models.diffusion_lm import DiffusionLM
from freedave_kernels import predict_tokens


class DraftForward(Protocol):
    def logits(self, drafts: torch.Tensor, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Forwards `drafts [J, L]`; the logits `[R, V]` of their flattened positions `rows [R]`."""

    def keep(self, draft: int, count: int) -> None:
        """The first `count` positions of the last window are final, and row `draft` is what they are."""


class CachedForward:
    """Block-causal attention with the exact cache: only the window is computed, and each position stored once."""

    def __init__(self, lm: DiffusionLM, sequence: torch.Tensor, block_length: int) -> None:
        self._lm = lm
        self._sequence = sequence
        self._block_length = block_length
        self._cache = PrefixCache(capacity=sequence.shape[0])

    def logits(self, drafts: torch.Tensor, start: int, rows: torch.Tensor) -> torch.Tensor:
        # The first forward carries the prompt's complete blocks along, so that no forward is spent on them alone.
        first = self._cache.length
        prompt = start - first
        if prompt:
            drafts = torch.cat([self._sequence[first:start].expand(drafts.shape[0], -1), drafts], dim=1)
            rows = rows + prompt  # of one draft only: the first forward has no others
        end = first + drafts.shape[1]
        logits = self._lm.logits(
            drafts,
            rows,
            position_ids=torch.arange(first, end, device=drafts.device)[None],
            attention_mask=block_causal_mask(first, end, self._block_length, drafts.device),
            cache=self._cache,
        )
        self._cache.extend(0, prompt)
        return logits

    def keep(self, draft: int, count: int) -> None:
        self._cache.extend(draft, count)


class UncachedForward:
    """The whole sequence in every forward: exact for any attention, and what full attention needs to be exact."""

    def __init__(self, lm: DiffusionLM, sequence: torch.Tensor, block_length: int | None) -> None:
        self._lm = lm
        self._sequence = sequence
        self._mask = None
        if block_length is not None:
            self._mask = block_causal_mask(0, sequence.shape[0], block_length, sequence.device)

    def logits(self, drafts: torch.Tensor, start: int, rows: torch.Tensor) -> torch.Tensor:
        count, length = drafts.shape
        sequences = self._sequence.repeat(count, 1)
        sequences[:, start : start + length] = drafts
        position = rows % length + start
        if self._lm.logits_shift:
            position = (position - 1).clamp(min=0)
        rows = rows // length * sequences.shape[1] + position
        return self._lm.logits(sequences, rows, attention_mask=self._mask)

    def keep(self, draft: int, count: int) -> None:
        pass  # nothing is stored: the decoder's sequence holds what is final


class DraftPrediction(NamedTuple):
    """`token_ids [K, L]` int64 and `confidence [K, L]` float32 at each draft, and the wall time of the model's forward."""

    token_ids: torch.Tensor
    confidence: torch.Tensor
    forward_seconds: float


def predict_drafts(
    forward: DraftForward,
    drafts: torch.Tensor,
    start: int,
    forwarded: int,
    mask_token_id: int,
    suppress_tokens: torch.Tensor,
) -> DraftPrediction:
    """Predicts the masked positions of the first `forwarded` of `drafts [K, L]`.

    The vocabulary projection runs on those positions only. All others return their own id and confidence -inf, like the
    positions that `predict_tokens` does not read.
    """
    flat = drafts.flatten()
    rows = (flat[: forwarded * drafts.shape[1]] == mask_token_id).nonzero().squeeze(1)
    began = time.perf_counter()
    logits = forward.logits(drafts[:forwarded], start, rows)
    seconds = time.perf_counter() - began
    predicted, certainty = predict_tokens(logits, flat[rows], mask_token_id, suppress_tokens=suppress_tokens)
    token_ids = flat.index_copy(0, rows, predicted)
    confidence = certainty.new_full(flat.shape, float("-inf")).index_copy_(0, rows, certainty)
    return DraftPrediction(token_ids.view_as(drafts), confidence.view_as(drafts), seconds)
