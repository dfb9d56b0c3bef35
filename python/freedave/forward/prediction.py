"""Predictions from a forward's features, with the logits of a part of the vocabulary at a time.

Eight drafts have eight times the logits of static decoding, and a vocabulary is a hundred times as long as a hidden state.
All logits at once would be most of the memory that a decode needs. So the features are multiplied with a slice of the
projection's weights, `partial_predictions` reduces these logits to a few numbers a row while they are in cache, and the
next slice follows. `merge_predictions` makes the predictions of all slices' numbers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from freedave.forward.shards import ShardedHead
from freedave_kernels import TOKENS_PER_STATE, logit_floor, merge_predictions, partial_predictions, predict_tokens

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# Rows that are projected together. With so many, a product's arithmetic takes longer than reading the weights.
ROWS = 512

# Bytes of a slice's logits; a slice has at least 4,096 tokens. On a CPU they should stay in the cache; a GPU needs more
# work a launch.
SLICE_BYTES, SLICE_BYTES_ELSEWHERE = 2**22, 2**24

# On a GPU, logits of up to so many bytes are made in one product: its memory is large, and every slice is one more launch.
ONE_PRODUCT_BYTES = 2**28

# Where the vocabulary is not divided, more rows than ROWS are projected together if their logits take no more than this.
WHOLE_BYTES = 2**23

# What the noise of a row follows from, as ops name it.
NOISE = ("seed", "positions", "temperature")


class Predictor:
    """Predicts rows of features, with confidences of a measure. `projection_seconds` adds up what making their logits took,
    which is the model's part.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        measure: str = "prob",
        truncation: Mapping[str, Any] | None = None,
    ) -> None:
        """`truncation`: what `logit_floor` takes, where tokens are not drawn from the whole vocabulary."""
        self.projection_seconds = 0.0
        self._lm = lm
        self._sharded = lm.ranks is not None
        self._measure = measure
        self._truncation = truncation or {}
        long = lm.vocab_size is not None and lm.vocab_size > TOKENS_PER_STATE
        # A floor is known when all logits of a row are.
        self._in_parts = lm.has_plain_head and (long or self._sharded) and not self._truncation
        self._suppressed = torch.tensor([lm.mask_token_id], device=lm.device)

    def __call__(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        noise: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and confidences `[R]` of `features [R, *]` (`DiffusionLM.packed_features`); the mask is never predicted.

        Rows whose `input_ids [R]` are not the mask are not predicted, as `predict_tokens` leaves them. Where tokens are
        drawn, `noise` are the seed and the position of each row, `[R]` int64 both, and its temperature, `[R]` float32 (0: its
        likeliest token). Results are the same bits however the rows are divided, as far as their logits are.
        """
        large = features.is_cpu or self._sharded or self._logits_bytes(features) > ONE_PRODUCT_BYTES
        in_parts = self._in_parts and large
        projection = self._lm.projection if in_parts else None
        if projection is None:
            rows, predict = self._rows_at_once(features), self._whole
        else:
            rows, predict = ROWS, functools.partial(self._in_slices, projection)
        given = (features, input_ids, *(noise or ()))
        if len(features) <= rows:
            return predict(*given)
        parts = [predict(*part) for part in zip(*(each.split(rows) for each in given), strict=True)]
        return torch.cat([token_ids for token_ids, _ in parts]), torch.cat([confidence for _, confidence in parts])

    def _rows_at_once(self, features: torch.Tensor) -> int:
        vocab = self._lm.vocab_size
        if not self._lm.has_plain_head or vocab is None:
            return max(1, len(features))  # the features are the logits
        most = WHOLE_BYTES if features.is_cpu else ONE_PRODUCT_BYTES
        return max(ROWS, most // (vocab * features.element_size()))

    def _logits_bytes(self, features: torch.Tensor) -> int:
        return len(features) * (self._lm.vocab_size or 0) * features.element_size()

    def _whole(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        *noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        began = time.perf_counter()
        logits = self._lm.project(features)
        self.projection_seconds += time.perf_counter() - began
        drawing: dict[str, Any] = dict(zip(NOISE, noise, strict=False))
        if self._truncation:
            drawing["floor"] = logit_floor(
                logits,
                temperature=drawing["temperature"],
                mask_index=input_ids == self._lm.mask_token_id,
                suppress_tokens=self._suppressed,
                **self._truncation,
            )
        return predict_tokens(
            logits,
            input_ids,
            self._lm.mask_token_id,
            measure=self._measure,
            suppress_tokens=self._suppressed,
            **drawing,
        )

    def _in_slices(
        self,
        projection: torch.nn.Linear,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        *noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = projection.weight, projection.bias
        begin = projection.first if isinstance(projection, ShardedHead) else 0
        most = SLICE_BYTES if features.is_cpu else SLICE_BYTES_ELSEWHERE
        state_bytes = max(1, len(features)) * features.element_size() * TOKENS_PER_STATE
        tokens = TOKENS_PER_STATE * max(1, most // state_bytes)
        states = []
        drawing: dict[str, Any] = dict(zip(NOISE, noise, strict=False))
        for first in range(0, len(weight), tokens):
            began = time.perf_counter()
            logits = F.linear(
                features, weight[first : first + tokens], None if bias is None else bias[first : first + tokens]
            )
            self.projection_seconds += time.perf_counter() - began
            states.append(
                partial_predictions(
                    logits,
                    input_ids,
                    self._lm.mask_token_id,
                    first_token_id=begin + first,
                    measure=self._measure,
                    suppress_tokens=self._suppressed,
                    **drawing,
                )
            )
            del logits  # frees them before the next slice's are made
        found = states[0] if len(states) == 1 else torch.cat(states, -2)
        if isinstance(projection, ShardedHead):
            found = projection.all_states(found)
        return merge_predictions(found, input_ids, measure=self._measure, temperature=drawing.get("temperature", 0.0))
