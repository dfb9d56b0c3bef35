"""keep: the keys and values of accepted drafts go to where they are stored, for all layers at once."""

from __future__ import annotations

from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.dispatch import dispatched

OP = "keep"


def keep(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
) -> None:
    """Copies, in place, the first `count[b]` window positions of draft `accepted[b]` to stored positions `start[b]` onwards.

    Args:
        window_key, window_value: `[N, B, K, L, G, D]` float16, bfloat16 or float32, of N layers.
        accepted, start, count: `[B]` int64 or int32. Where `count` is 0, none of the other numbers is looked at.
        stored_key, stored_value: `[N, S, C, G, D]`, written in place; they share no memory with the windows. Of these four
            the last dimension is contiguous, all other strides are free.
        slots: `[B]` int64 or int32, the slot of each row, no two the same; None: row b's is slot b, and S is B.

    Guarantees: one launch on a GPU, and no host synchronisation there. What would fall outside `[0, C)` is not written, nor
    is anything for a row whose draft or slot is not there.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is written.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.
    """
    _call(window_key, window_value, accepted, start, count, stored_key, stored_value, slots)


def check(
    window_key: Any,
    window_value: Any,
    accepted: Any,
    start: Any,
    count: Any,
    stored_key: Any,
    stored_value: Any,
    slots: Any,
) -> None:
    arguments.expect_tensor(OP, "window_key", window_key, arguments.FLOAT_DTYPES)
    arguments.expect_dims(OP, "window_key", window_key, "N, B, K, L, G, D")
    others = {"window_value": window_value, "stored_key": stored_key, "stored_value": stored_value}
    for name, tensor in others.items():
        arguments.expect_tensor(OP, name, tensor, [window_key.dtype])
    layers, batch, _, _, groups, size = window_key.shape
    arguments.expect_shape(OP, "window_value", window_value, window_key.shape, "like window_key")
    arguments.expect_dims(OP, "stored_key", stored_key, "N, S, C, G, D")
    arguments.expect_shape(
        OP, "stored_key", stored_key, (layers, *stored_key.shape[1:3], groups, size), "N, S, C, G, D, as window_key"
    )
    arguments.expect_shape(OP, "stored_value", stored_value, stored_key.shape, "like stored_key")
    for name, tensor in {"window_key": window_key, **others}.items():
        if tensor.stride(-1) != 1 and size > 1:
            raise ValueError(
                f"{OP}: the last dimension of {name} must be contiguous, got strides {tuple(tensor.stride())}"
            )
    if slots is None and stored_key.shape[1] != batch:
        raise ValueError(
            f"{OP}: stored_key must have one slot for each of {batch} rows where slots is None, got {stored_key.shape[1]}"
        )
    per_row = {"accepted": accepted, "start": start, "count": count}
    for name, tensor in (per_row if slots is None else per_row | {"slots": slots}).items():
        arguments.expect_tensor(OP, name, tensor, arguments.INTEGER_DTYPES)
        arguments.expect_shape(OP, name, tensor, (batch,), "B of window_key")
    arguments.expect_same_device(OP, window_key, "window_key", **others, **per_row, slots=slots)


def fake(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    return None


_call = dispatched(OP, check, fake)
