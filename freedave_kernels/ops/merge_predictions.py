"""merge_predictions: predictions of the states that partial_predictions has made of parts of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import MEASURES, STATE_FIELDS
from freedave_kernels.dispatch import dispatched
from freedave_kernels.ops.predict_tokens import expect_drawn_measure

OP = "merge_predictions"


def merge_predictions(
    states: torch.Tensor, input_ids: torch.Tensor, *, measure: str = "prob", temperature: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `predict_tokens` would have returned for the whole vocabulary, from the states of its parts.

    Args:
        states: `[*, L, C, 6]` float64, C at least 1: the results of `partial_predictions` for all parts, side by side in the
            order of their tokens (`torch.cat(parts, -2)`); the last dimension contiguous, any other strides.
        input_ids: `[*, L]` int64.
        measure, temperature: those that the states were made with.

    Returns:
        `token_ids [*, L]` int64 and `confidence [*, L]` float32. Positions of whose logits the states know nothing, or which
        had a NaN or +inf, return their input id and confidence -inf.

    Guarantees: equal logits go to the lower token id; confidence within 1e-6 relative of float64; a row's result is bitwise
    the same whatever the batch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.
    """
    return _call(states, input_ids, measure, temperature)


def check(states: Any, input_ids: Any, measure: Any, temperature: Any) -> None:
    arguments.expect_tensor(OP, "states", states, [torch.float64], min_dims=3)
    if states.shape[-1] != STATE_FIELDS or states.shape[-2] == 0:
        raise ValueError(f"{OP}: states must have shape [*, L, C, {STATE_FIELDS}], got {tuple(states.shape)}")
    if states.stride(-1) != 1:
        raise ValueError(f"{OP}: the last dimension of states must be contiguous, got strides {states.stride()}")
    arguments.expect_tensor(OP, "input_ids", input_ids, [torch.int64])
    arguments.expect_shape(OP, "input_ids", input_ids, states.shape[:-2], "states without their last two dimensions")
    arguments.expect_choice(OP, "measure", measure, MEASURES)
    arguments.expect_temperature(OP, temperature)
    if temperature > 0:
        expect_drawn_measure(OP, measure)
    arguments.expect_same_device(OP, states, "states", input_ids=input_ids)


def fake(
    states: torch.Tensor, input_ids: torch.Tensor, measure: str = "prob", temperature: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = input_ids.shape
    return input_ids.new_empty(shape), states.new_empty(shape, dtype=torch.float32)


_call = dispatched(OP, check, fake)
