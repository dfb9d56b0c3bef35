"""merge_predictions: predictions of the states that partial_predictions has made of parts of the vocabulary."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import MEASURES, STATE_FIELDS
from freedave_kernels.dispatch import dispatched
from freedave_kernels.ops.predict_tokens import expect_drawn_measure

OP = "merge_predictions"


@overload
def merge_predictions(
    states: torch.Tensor,
    input_ids: torch.Tensor,
    *,
    measure: str = "prob",
    temperature: float | torch.Tensor = 0.0,
    scored: Literal[False] = False,
    rank_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def merge_predictions(
    states: torch.Tensor,
    input_ids: torch.Tensor,
    *,
    measure: str = "prob",
    temperature: float | torch.Tensor = 0.0,
    scored: Literal[True],
    rank_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def merge_predictions(
    states: torch.Tensor,
    input_ids: torch.Tensor,
    *,
    measure: str = "prob",
    temperature: float | torch.Tensor = 0.0,
    scored: bool = False,
    rank_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    """What `predict_tokens` would have returned for the whole vocabulary, from the states of its parts.

    Args:
        states: `[*, L, C, 6]` float64, C at least 1: the results of `partial_predictions` for all parts, side by side in the
            order of their tokens (`torch.cat(parts, -2)`); with its `scored_ids` or forbidden tokens there are more than 6
            fields. The last dimension contiguous, any other strides.
        input_ids: `[*, L]` int64 or int32 (copied).
        measure, temperature: those that the states were made with. (Of a tensor, the values are not looked at.)
        scored: whether to return the log-probabilities of the `scored_ids` that the states were made with.
        rank_dtype: the confidence is rounded to float16 or bfloat16, where it is the dtype of logits that `predict_tokens`
            would round to with `rank_dtype="logits"`.

    Returns:
        `token_ids [*, L]` int64 and `confidence [*, L]` float32; with `scored` also `log_probs [*, L]` float32, as
        `predict_tokens` returns them. Positions of whose logits the states know nothing, or which had a NaN or +inf, return
        their input id, confidence -inf and log-probability NaN.

    Guarantees: equal logits go to the lower token id; confidence within 1e-6 relative of float64; a row's result is bitwise
    the same whatever the batch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.
    """
    input_ids = arguments.as_int64(input_ids)
    arguments.expect_bool(OP, "scored", scored)
    if rank_dtype not in arguments.FLOAT_DTYPES:
        names = ", ".join(map(str, arguments.FLOAT_DTYPES))
        raise ValueError(f"{OP}: rank_dtype must be one of {names}, got {rank_dtype!r}")
    if scored:
        arguments.expect_tensor(OP, "states", states, [torch.float64], min_dims=3)
        if states.shape[-1] == STATE_FIELDS:
            raise ValueError(
                f"{OP}: scored needs states of partial_predictions(..., scored_ids=...), which have more than "
                f"{STATE_FIELDS} fields, got shape {tuple(states.shape)}"
            )
    if not isinstance(temperature, torch.Tensor):
        arguments.expect_temperature(OP, temperature)
    drawn = isinstance(temperature, torch.Tensor) or temperature > 0
    token_ids, confidence, log_probs = _call(states, input_ids, measure, drawn)
    if rank_dtype != torch.float32:
        confidence = confidence.to(rank_dtype).float()
    return (token_ids, confidence, log_probs) if scored else (token_ids, confidence)


def check(states: Any, input_ids: Any, measure: Any, drawn: Any) -> None:
    arguments.expect_tensor(OP, "states", states, [torch.float64], min_dims=3)
    if states.shape[-1] < STATE_FIELDS or states.shape[-2] == 0:
        raise ValueError(f"{OP}: states must have shape [*, L, C, {STATE_FIELDS} or more], got {tuple(states.shape)}")
    if states.stride(-1) != 1:
        raise ValueError(f"{OP}: the last dimension of states must be contiguous, got strides {states.stride()}")
    arguments.expect_tensor(OP, "input_ids", input_ids, [torch.int64])
    arguments.expect_shape(OP, "input_ids", input_ids, states.shape[:-2], "states without their last two dimensions")
    arguments.expect_choice(OP, "measure", measure, MEASURES)
    if drawn:
        expect_drawn_measure(OP, measure)
    arguments.expect_same_device(OP, states, "states", input_ids=input_ids)


def fake(
    states: torch.Tensor, input_ids: torch.Tensor, measure: str = "prob", drawn: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    confidence = states.new_empty(input_ids.shape, dtype=torch.float32)
    log_probs = torch.empty_like(confidence) if states.shape[-1] > STATE_FIELDS else confidence.new_empty(0)
    return input_ids.new_empty(input_ids.shape), confidence, log_probs


_call = dispatched(OP, check, fake)
