"""The forward over drafts: one model call that predicts the masked positions of every draft, with its cache policy.

A policy is two calls: `logits(...)` forwards the drafts of a window, and `keep(draft, count)` says that the first `count`
positions of that window are final, as row `draft` saw them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from freedave.attention import block_causal_mask
from freedave.cache import PrefixCache
from freedave.models.diffusion_lm import DiffusionLM
from freedave.segments import Segments, plan_segments
from freedave_kernels import predict_tokens


@dataclass(frozen=True)
class DraftWindow:
    """Nested drafts of the positions `start ... start + L - 1`, on the device and on the host.

    `drafts [K, L]`; the first `len(states)` of them are to be forwarded, and `states` holds their token ids. `reach[j]` is
    how many positions of draft j its own next drafts can depend on; what is masked beyond is not predicted.
    """

    drafts: torch.Tensor
    start: int
    states: list[list[int]]
    reach: list[int]


class Masked(NamedTuple):
    """Logits `[R, V]` of masked positions, and where these stand in the flattened drafts `[R]`."""

    logits: torch.Tensor
    position: torch.Tensor


class DraftForward(Protocol):
    computed: int
    """Positions that the last forward computed."""

    def logits(self, window: DraftWindow) -> Masked:
        """Forwards the drafts of the window."""

    def keep(self, draft: int, count: int) -> None:
        """The first `count` positions of the last window are final, and row `draft` is what they are."""


class CachedForward:
    """Block-causal attention with the exact cache: only the segments of the window are computed."""

    def __init__(self, lm: DiffusionLM, sequence: torch.Tensor, block_length: int) -> None:
        self.computed = 0
        self._lm = lm
        self._sequence = sequence
        self._block_length = block_length
        self._cache = PrefixCache(capacity=sequence.shape[0])
        self._segments = Segments([], [], [], [])

    def logits(self, window: DraftWindow) -> Masked:
        if self._cache.length < window.start:
            return self._first(window)
        device = window.drafts.device
        size = self._block_length
        self._segments = plan_segments(window.states, window.reach, size, self._lm.mask_token_id)
        blocks = window.drafts.shape[1] // size
        rows = torch.tensor(self._segments.draft, device=device) * blocks + torch.tensor(
            self._segments.block, device=device
        )
        input_ids = window.drafts.view(-1, size)[rows]
        position = rows[:, None] * size + torch.arange(size, device=device)  # in the flattened drafts
        masked = (input_ids == self._lm.mask_token_id).flatten().nonzero().squeeze(1)
        self.computed = input_ids.numel()
        logits = self._lm.logits(
            input_ids,
            masked,
            position_ids=position % window.drafts.shape[1] + window.start,
            attention_mask=self._cache.attend(self._segments, size, device),
            cache=self._cache,
        )
        return Masked(logits, position.flatten()[masked])

    def _first(self, window: DraftWindow) -> Masked:
        """The first forward carries the prompt's complete blocks along, so that no forward is spent on them alone."""
        input_ids = torch.cat([self._sequence[: window.start], window.drafts[0]])[None]
        position = (window.drafts[0] == self._lm.mask_token_id).nonzero().squeeze(1)
        self.computed = input_ids.numel()
        self._cache.prefill(window.start)
        logits = self._lm.logits(
            input_ids,
            position + window.start,
            position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
            attention_mask=block_causal_mask(input_ids.shape[1], self._block_length, input_ids.device),
            cache=self._cache,
        )
        self._cache.length = window.start
        return Masked(logits, position)

    def keep(self, draft: int, count: int) -> None:
        if count:
            self._cache.keep(self._segments.of_draft[draft][: count // self._block_length])


class UncachedForward:
    """The whole sequence in every forward: exact for any attention, and what full attention needs to be exact."""

    def __init__(self, lm: DiffusionLM, sequence: torch.Tensor, block_length: int | None) -> None:
        self.computed = 0
        self._lm = lm
        self._sequence = sequence  # the decoder's own: it holds what is final
        self._mask = None
        if block_length is not None:
            self._mask = block_causal_mask(sequence.shape[0], block_length, sequence.device)

    def logits(self, window: DraftWindow) -> Masked:
        drafts = window.drafts[: len(window.states)]
        count, length = drafts.shape
        sequences = self._sequence.repeat(count, 1)
        sequences[:, window.start : window.start + length] = drafts
        reach = torch.tensor(window.reach, device=drafts.device)[:, None]
        wanted = (drafts == self._lm.mask_token_id) & (torch.arange(length, device=drafts.device) < reach)
        draft, position = wanted.nonzero(as_tuple=True)
        source = position + window.start
        if self._lm.logits_shift:
            source = (source - 1).clamp(min=0)
        self.computed = sequences.numel()
        logits = self._lm.logits(sequences, draft * sequences.shape[1] + source, attention_mask=self._mask)
        return Masked(logits, draft * length + position)

    def keep(self, draft: int, count: int) -> None:
        pass


class DraftPrediction(NamedTuple):
    """`token_ids [K, L]` int64 and `confidence [K, L]` float32 at each draft, and the wall time of the model's forward."""

    token_ids: torch.Tensor
    confidence: torch.Tensor
    forward_seconds: float


def predict_drafts(
    forward: DraftForward, window: DraftWindow, mask_token_id: int, suppress_tokens: torch.Tensor
) -> DraftPrediction:
    """Predicts the masked positions of the window's drafts, within each one's reach.

    The vocabulary projection runs on those positions only. All others return their own id and confidence -inf, like the
    positions that `predict_tokens` does not read.
    """
    began = time.perf_counter()
    logits, position = forward.logits(window)
    seconds = time.perf_counter() - began
    masked_ids = torch.full_like(position, mask_token_id)
    predicted, certainty = predict_tokens(logits, masked_ids, mask_token_id, suppress_tokens=suppress_tokens)
    token_ids = window.drafts.flatten().index_copy(0, position, predicted)
    confidence = certainty.new_full(token_ids.shape, float("-inf")).index_copy_(0, position, certainty)
    return DraftPrediction(token_ids.view_as(window.drafts), confidence.view_as(window.drafts), seconds)
