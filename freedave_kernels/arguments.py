"""Argument errors in the user's terms: which argument of which op, what was expected, what came.

Everything here reads metadata only (dtype, shape, device), never a tensor's values, so a check cannot synchronise.
The native library checks the same conditions tersely, for calls of ``torch.ops.freedave.*``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from freedave_kernels.contract import ORDERS, RULES

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGER_DTYPES = (torch.int32, torch.int64)

T = TypeVar("T")


def for_all_or_each(value: T | torch.Tensor, for_all: T) -> tuple[T, torch.Tensor | None]:
    """A setting as ops take it: the number for all rows, and the tensor with one a row, where that was given instead."""
    return (for_all, value) if isinstance(value, torch.Tensor) else (value, None)


def as_int64(ids: T) -> T | torch.Tensor:
    """Ids as kernels take them: an int32 tensor is copied. (What is no tensor, or of another dtype, is refused later.)"""
    return ids.long() if isinstance(ids, torch.Tensor) and ids.dtype == torch.int32 else ids


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def expect_tensor(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype], min_dims: int = 0) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a {_names(dtypes)} tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {_names(dtypes)}, got {_names([value.dtype])}")
    if value.dim() < min_dims:
        raise ValueError(f"{op}: {name} must have at least {min_dims} dimensions, got shape {tuple(value.shape)}")


def expect_shape(op: str, name: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)} ({meaning}), got {tuple(value.shape)}")


def expect_dims(op: str, name: str, value: torch.Tensor, dims: str) -> None:
    """`dims` spells the dimensions, as in "B, K, L"."""
    if value.dim() != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape [{dims}], got {tuple(value.shape)}")


def expect_same_device(op: str, first: torch.Tensor, first_name: str, **others: torch.Tensor | None) -> None:
    device = first.device
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {first_name}, got {value.device}")


def expect_int(op: str, name: str, value: Any, minimum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")


def expect_positive(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def expect_temperature(op: str, value: Any) -> None:
    """0, or a number whose inverse is a float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: temperature must be a float, got {type(value).__name__}")
    if value != 0 and not 1e-30 <= value <= 1e30:
        raise ValueError(f"{op}: temperature must be 0 or between 1e-30 and 1e30, got {value}")


def expect_logits(op: str, logits: Any, min_dims: int = 2) -> None:
    """`[*, V]`, of which the vocabulary is contiguous."""
    expect_tensor(op, "logits", logits, FLOAT_DTYPES, min_dims=min_dims)
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits must have a vocabulary of at least 1, got shape {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{op}: the vocabulary dimension of logits must be contiguous, got strides {logits.stride()}")


def expect_truncation(op: str, top_k: Any, top_p: Any, min_p: Any) -> None:
    """What truncates sampling; None: nothing does."""
    if top_k is not None:
        expect_int(op, "top_k", top_k, minimum=1)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            expect_share(op, name, value)


def expect_share(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    if not 0 < value <= 1:
        raise ValueError(f"{op}: {name} must be above 0 and at most 1, got {value}")


def expect_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a str, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def expect_threshold(op: str, value: Any, each: torch.Tensor | None = None, shape: tuple[int, ...] = ()) -> None:
    """One for all, or one `each` over `shape`."""
    if each is not None:
        expect_tensor(op, "threshold", each, [torch.float32, torch.float64])
        expect_shape(op, "threshold", each, shape, "one threshold a row")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: threshold must be a float, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"{op}: threshold must be a number, got nan")


def expect_rule(op: str, rule: Any, threshold: Any, each: torch.Tensor | None) -> None:
    """What a threshold bounds; it says nothing where there is none."""
    expect_choice(op, "rule", rule, RULES)
    if rule != "threshold" and threshold is None and each is None:
        raise ValueError(f"{op}: rule={rule!r} needs a threshold, its number; got None")


def expect_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def expect_order(op: str, order: Any, block_length: Any) -> None:
    expect_choice(op, "order", order, ORDERS)
    if block_length is not None:
        expect_int(op, "block_length", block_length, minimum=1)


def expect_static_step(
    op: str,
    name: str,
    states: torch.Tensor,
    mask_token_id: Any,
    tokens_per_step: Any,
    tokens_each: torch.Tensor | None,
    threshold: Any,
    threshold_each: torch.Tensor | None,
    rule: Any,
    order: Any,
    block_length: Any,
    eos_token_id: Any = None,
    eos_each: torch.Tensor | None = None,
) -> None:
    """The settings of static decoding; sequences are the first dimension of `states`, the argument `name`."""
    shape = states.shape[:1]
    expect_int(op, "mask_token_id", mask_token_id)
    expect_int(op, "tokens_per_step", tokens_per_step, minimum=1)
    expect_threshold(op, threshold, threshold_each, shape)
    expect_rule(op, rule, threshold, threshold_each)
    expect_order(op, order, block_length)
    if eos_token_id is not None:
        expect_int(op, "eos_token_id", eos_token_id)
    for setting, each in (("tokens_per_step", tokens_each), ("eos_token_id", eos_each)):
        if each is not None:
            expect_tensor(op, setting, each, INTEGER_DTYPES)
            expect_shape(op, setting, each, shape, "one a sequence")
    expect_same_device(op, states, name, tokens_per_step=tokens_each, threshold=threshold_each, eos_token_id=eos_each)


def expect_drafted(
    op: str,
    drafts: Any,
    token_ids: Any,
    confidence: Any,
    num_drafts: Any,
    draft_steps: Any,
    step: Any,
    answer_start: Any,
) -> None:
    """Drafts `[B, J, L]` that were forwarded, the predictions at each, and what goes on from them."""
    expect_tensor(op, "drafts", drafts, [torch.int64])
    expect_dims(op, "drafts", drafts, "B, J, L")
    if 0 in drafts.shape[1:]:
        raise ValueError(f"{op}: drafts must hold a draft and a position at least, got shape {tuple(drafts.shape)}")
    expect_tensor(op, "token_ids", token_ids, [torch.int64])
    expect_shape(op, "token_ids", token_ids, drafts.shape, "like drafts")
    expect_tensor(op, "confidence", confidence, [torch.float32])
    expect_shape(op, "confidence", confidence, drafts.shape, "like drafts")
    expect_tensor(op, "num_drafts", num_drafts, INTEGER_DTYPES)
    expect_shape(op, "num_drafts", num_drafts, drafts.shape[:1], "one count a sequence")
    expect_int(op, "draft_steps", draft_steps, minimum=1)
    if step is not None:
        expect_tensor(op, "step", step, [torch.int64])
        expect_shape(op, "step", step, drafts.shape[:1], "one step a sequence")
    if answer_start is not None:
        expect_tensor(op, "answer_start", answer_start, [torch.int64])
        expect_shape(op, "answer_start", answer_start, drafts.shape[:1], "one position a sequence")
    others = {"token_ids": token_ids, "confidence": confidence, "num_drafts": num_drafts}
    expect_same_device(op, drafts, "drafts", **others, step=step, answer_start=answer_start)
