"""logit_floor: the least logit of a row that truncated sampling (top-k, top-p, min-p) leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import MOST_SUMMED_TOKENS
from freedave_kernels.dispatch import dispatched
from freedave_kernels.ops.predict_tokens import as_tensor

OP = "logit_floor"


def logit_floor(
    logits: torch.Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    mask_index: torch.Tensor | None = None,
    suppress_tokens: Sequence[int] | torch.Tensor | None = None,
) -> torch.Tensor:
    """The least logit that stays, for `predict_tokens(floor=)`: what is below it is not drawn, whatever equals it stays.

    Args:
        logits: `[*, V]` float16, bfloat16 or float32, V at most 8,388,607; the last dimension contiguous, any leading
            strides.
        top_k: at least 1: as many of the largest logits stay; None: all.
        top_p: above 0, at most 1: of what `top_k` leaves, the fewest tokens stay, the likeliest first, whose probabilities
            reach `top_p`. None and 1: all.
        min_p: above 0, at most 1: tokens with at least so large a part of the likeliest token's probability stay; None: all.
        temperature: above 0; probabilities are those of softmax(logits / temperature). A float, rounded to float32, or a
            float32 tensor `[*]`, one a row: where it is not above 0, nothing is to be drawn, and the floor is -inf.
        mask_index: `[*]` bool; rows that are False are not read. None: all are.
        suppress_tokens: ids (a sequence, or an int64 or int32 tensor `[S]`) that are no candidates, as
            `predict_tokens` takes them.

    Returns:
        `[*]` float32, the least candidate that stays, as it is in `logits` (not divided by the temperature). Candidates are
        logits above -inf that are not suppressed; the largest always stays. -inf where a row is not to be read, and where
        `predict_tokens` would predict nothing: a NaN, a +inf or no candidate.

    Guarantees: ties at the floor all stay, so that more than `top_k` may. The same bits on every backend, whatever the batch.
    `top_k` is exact. `min_p` compares float32 logits / temperature, less the largest, with the float32 log(min_p). For
    `top_p`, exp(x - max) of these is a whole number of 2^-40, by a fixed sequence of float32 operations: sums are exact, in
    any order. The result is right for a `top_p` that is off by at most 4e-6 + V 2^-40.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: transformers' logits warpers in their order: temperature, top-k, top-p (arXiv:1904.09751), min-p
    (arXiv:2407.01082).
    """
    suppressed = as_tensor(OP, suppress_tokens, logits, min_dims=1)
    return _call(logits, top_k, top_p, min_p, _of_each(logits, temperature), mask_index, suppressed)


def _of_each(logits: Any, temperature: Any) -> torch.Tensor | None:
    """A temperature of each row; None: 1."""
    if isinstance(temperature, torch.Tensor):
        return temperature
    arguments.expect_temperature(OP, temperature)
    if temperature == 0:
        raise ValueError(f"{OP}: temperature must be above 0, got 0; without one no token is drawn")
    arguments.expect_logits(OP, logits, min_dims=1)
    if temperature == 1:
        return None
    return torch.full((), temperature, dtype=torch.float32, device=logits.device).expand(logits.shape[:-1])


def check(
    logits: Any, top_k: Any, top_p: Any, min_p: Any, temperature: Any, mask_index: Any, suppress_tokens: Any
) -> None:
    arguments.expect_logits(OP, logits, min_dims=1)
    if logits.shape[-1] > MOST_SUMMED_TOKENS:
        raise ValueError(f"{OP}: logits must have at most {MOST_SUMMED_TOKENS} tokens, got {logits.shape[-1]}")
    arguments.expect_truncation(OP, top_k, top_p, min_p)
    if temperature is not None:
        arguments.expect_tensor(OP, "temperature", temperature, [torch.float32])
        arguments.expect_shape(OP, "temperature", temperature, logits.shape[:-1], "logits without the vocabulary")
    if mask_index is not None:
        arguments.expect_tensor(OP, "mask_index", mask_index, [torch.bool])
        arguments.expect_shape(OP, "mask_index", mask_index, logits.shape[:-1], "logits without the vocabulary")
    if suppress_tokens is not None:
        arguments.expect_tensor(OP, "suppress_tokens", suppress_tokens, [torch.int64])
        arguments.expect_dims(OP, "suppress_tokens", suppress_tokens, "S")
    arguments.expect_same_device(
        OP, logits, "logits", temperature=temperature, mask_index=mask_index, suppress_tokens=suppress_tokens
    )


def fake(
    logits: torch.Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: torch.Tensor | None = None,
    mask_index: torch.Tensor | None = None,
    suppress_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


_call = dispatched(OP, check, fake)
