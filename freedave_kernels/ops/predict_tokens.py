"""predict_tokens: the arg max token of every masked position, and how sure the model is of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import DRAWN_MEASURES, MEASURES, RANK_DTYPES, SUPPRESSIONS
from freedave_kernels.dispatch import dispatched

OP = "predict_tokens"


@overload
def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    *,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: Sequence[int] | torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    suppress: str = "exclude",
    rank_dtype: str = "float32",
    scored_ids: None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    *,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: Sequence[int] | torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    suppress: str = "exclude",
    rank_dtype: str = "float32",
    scored_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def predict_tokens(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    *,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: Sequence[int] | torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    suppress: str = "exclude",
    rank_dtype: str = "float32",
    scored_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Predicts every masked position: its arg max token and the model's confidence in it.

    Args:
        logits: `[*, L, V]` float16, bfloat16 or float32; the last dimension contiguous, any leading strides.
        input_ids: `[*, L]` int64, or int32 as all ids (copied: give int64 where a graph is captured). Positions equal to
            `mask_token_id` are masked.
        mask_token_id: may lie outside the vocabulary of the logits.
        mask_index: `[*, L]` bool, overrides `input_ids == mask_token_id`.
        measure: "prob", the softmax probability of the chosen token; "margin", its distance to the probability of the
            second best; "neg_entropy", sum p log p; "log_odds", log(p / (1 - p)) of the chosen token's probability.
        suppress_tokens: ids (a sequence, or an int64 or int32 tensor `[S]`) that can never be chosen; a tensor's ids outside
            the vocabulary are ignored.
        logits_shift: position i reads row i-1 and position 0 row 0 (Dream). No shifted copy is made.
        temperature: above 0, the token is drawn from softmax(logits / temperature), whose confidence is then meant ("prob",
            "log_odds"): arg max of logits / temperature + noise, where the noise follows from `seed`, the position and the
            token alone. So a draw can be repeated, whatever is drawn beside it. 0 or 1e-30 to 1e30, rounded to float32; or a
            float32 tensor `[*, L]` (its values are not checked), one a position: where it is not above 0, nothing is drawn.
        seed: an int, or int64 `[*, L]`: 64 bits for each position, one value a sequence as a rule. Needed with a temperature.
        positions: `[*, L]` int64, positions in their sequences (None: 0 to L - 1).
        floor: `[*, L]` float32, of each position (`logit_floor` finds it): tokens whose logit is below are not drawn and
            leave the softmax, as suppressed ones do, so that confidence is the probability among those that stay. It needs a
            temperature, by which it is not divided. With -inf or NaN nothing leaves.
        suppress: "exclude": suppressed tokens leave the softmax, and their logits are not looked at; "forbid": they are in
            it and take their share of the probability. Their logits then break a row as any other's do. Each row reads them
            one by one, so they should be few.
        rank_dtype: "logits" rounds the confidence to the dtype of the logits, as a softmax in that dtype would have it:
            for decoders that rank by such, where many confidences are equal. "float32" rounds nothing more.
        scored_ids: `[*, L]` int64 or int32, tokens whose log-probabilities are wanted as well, one a position.

    Returns:
        `token_ids [*, L]` int64 and `confidence [*, L]` float32; with `scored_ids` also `log_probs [*, L]` float32, in the
        softmax that the confidence is meant in: after the temperature and the floor, and without suppressed tokens where
        they are excluded. -inf for what is not in it, or not in the vocabulary; NaN where the id is negative, the position
        is not masked, or the row has no prediction. Within 1e-6 of float64, relative or absolute.

        Positions that are not masked are not read: they return
        their input id and confidence -inf. So does a masked position whose row has a NaN, a +inf, or nothing above -inf.

        A float32 cannot say how near to 1 a probability above 1 - 3e-8 is: "prob" and "margin" of rows that confident are all
        1.0, and the lowest position comes first in any ranking, where code that computes in float64, such as LLaDA's own,
        still tells them apart. "log_odds" ranks as that code does, and further: it is worked out from the mass of all other
        tokens, up to 64.0 (1 - p below 2e-28), which also stands for rows in which nothing else has a probability.
        "neg_entropy" goes to 0, where a float32 is finest.

    Guarantees: equal logits go to the lower token id; float32 accumulation, confidence within 1e-6 relative of float64
    (log-odds near 0: within 1e-6); a row's result is bitwise the same whatever the batch, the number of threads or of SMs;
    logits are read once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: confidence-ranked unmasking of LLaDA (arXiv:2502.09992) and Dream (arXiv:2508.15487).
    """
    suppressed = as_tensor(OP, suppress_tokens, logits)
    input_ids, scored_ids = arguments.as_int64(input_ids), arguments.as_int64(scored_ids)
    drawing = temperature_seed_positions(OP, input_ids, temperature, seed, positions)
    arguments.expect_choice(OP, "rank_dtype", rank_dtype, RANK_DTYPES)
    rest = (mask_index, measure, suppressed, logits_shift, *drawing, floor, scored_ids, suppress)
    token_ids, confidence, log_probs = _call(logits, input_ids, mask_token_id, *rest)
    if rank_dtype == "logits" and logits.dtype != torch.float32:
        confidence = confidence.to(logits.dtype).float()
    return (token_ids, confidence) if scored_ids is None else (token_ids, confidence, log_probs)


def temperature_seed_positions(
    op: str, input_ids: Any, temperature: Any, seed: Any, positions: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As kernels take them: tensors like `input_ids` where tokens may be drawn, else nothing."""
    if not isinstance(temperature, torch.Tensor):
        arguments.expect_temperature(op, temperature)
        if temperature == 0:
            return None, None, None
    if seed is None:
        raise ValueError(f"{op}: seed must be an int or an int64 tensor with a temperature, got None")
    arguments.expect_tensor(op, "input_ids", input_ids, [torch.int64])
    if not isinstance(seed, torch.Tensor):
        arguments.expect_int(op, "seed", seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"{op}: seed must have at most 64 bits, got {seed}")
        signed = seed - 2**64 if seed >= 2**63 else seed
        seed = torch.full((), signed, dtype=torch.int64, device=input_ids.device).expand(input_ids.shape)
    if positions is None:
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device).expand(input_ids.shape)
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=input_ids.device).expand(input_ids.shape)
    return temperature, seed, positions


def as_tensor(
    op: str, suppress_tokens: Any, logits: Any, vocab: int | None = None, min_dims: int = 2
) -> torch.Tensor | None:
    """`suppress_tokens` on the device of the logits, its ids below `vocab` (None: the number of logits)."""
    if suppress_tokens is None or isinstance(suppress_tokens, torch.Tensor):
        return arguments.as_int64(suppress_tokens)
    if not isinstance(suppress_tokens, Sequence) or isinstance(suppress_tokens, str):
        kind = type(suppress_tokens).__name__
        raise TypeError(f"{op}: suppress_tokens must be a sequence of ints or an int64 tensor, got {kind}")
    arguments.expect_logits(op, logits, min_dims)
    return _token_tensor(op, tuple(suppress_tokens), vocab or logits.shape[-1], logits.device)


@functools.lru_cache(maxsize=64)
def _token_tensor(op: str, token_ids: tuple[int, ...], vocab: int, device: torch.device) -> torch.Tensor:
    """A list of ids as a tensor, copied to the device once: a decoder passes the same list every step."""
    for token_id in token_ids:
        arguments.expect_int(op, "suppress_tokens", token_id)
        if not 0 <= token_id < vocab:
            raise ValueError(f"{op}: suppress_tokens must lie in [0, {vocab}) (the vocabulary), got {token_id}")
    return torch.tensor(token_ids, dtype=torch.int64, device=device)


def check(logits: Any, input_ids: Any, *rest: Any) -> None:
    *rest_of_scan, scored_ids, suppress = rest
    check_logits(OP, logits, input_ids, *rest_of_scan)
    check_scored(OP, logits, input_ids, scored_ids, suppress)


def check_scored(op: str, logits: torch.Tensor, input_ids: torch.Tensor, scored_ids: Any, suppress: Any) -> None:
    arguments.expect_choice(op, "suppress", suppress, SUPPRESSIONS)
    if scored_ids is not None:
        arguments.expect_tensor(op, "scored_ids", scored_ids, [torch.int64])
        arguments.expect_shape(op, "scored_ids", scored_ids, input_ids.shape, "like input_ids")
        arguments.expect_same_device(op, logits, "logits", scored_ids=scored_ids)


def check_logits(
    op: str,
    logits: Any,
    input_ids: Any,
    mask_token_id: Any,
    mask_index: Any,
    measure: Any,
    suppress_tokens: Any,
    logits_shift: Any,
    temperature: Any,
    seed: Any,
    positions: Any,
    floor: Any,
) -> None:
    arguments.expect_logits(op, logits)
    arguments.expect_tensor(op, "input_ids", input_ids, [torch.int64])
    arguments.expect_shape(op, "input_ids", input_ids, logits.shape[:-1], "logits without the vocabulary")
    arguments.expect_int(op, "mask_token_id", mask_token_id)
    if mask_index is not None:
        arguments.expect_tensor(op, "mask_index", mask_index, [torch.bool])
        arguments.expect_shape(op, "mask_index", mask_index, input_ids.shape, "like input_ids")
    arguments.expect_choice(op, "measure", measure, MEASURES)
    if suppress_tokens is not None:
        arguments.expect_tensor(op, "suppress_tokens", suppress_tokens, [torch.int64])
        arguments.expect_dims(op, "suppress_tokens", suppress_tokens, "S")
    arguments.expect_bool(op, "logits_shift", logits_shift)
    others = {"input_ids": input_ids, "mask_index": mask_index, "suppress_tokens": suppress_tokens}
    if temperature is not None:
        expect_drawn_measure(op, measure)
        arguments.expect_tensor(op, "temperature", temperature, [torch.float32])
        arguments.expect_shape(op, "temperature", temperature, input_ids.shape, "like input_ids")
        others["temperature"] = temperature
        for name, value in (("seed", seed), ("positions", positions)):
            arguments.expect_tensor(op, name, value, [torch.int64])
            arguments.expect_shape(op, name, value, input_ids.shape, "like input_ids")
            others[name] = value
    if floor is not None:
        arguments.expect_tensor(op, "floor", floor, [torch.float32])
        arguments.expect_shape(op, "floor", floor, input_ids.shape, "like input_ids")
        if temperature is None:
            raise ValueError(f"{op}: floor needs a temperature above 0: without one the largest logit is chosen")
        others["floor"] = floor
    arguments.expect_same_device(op, logits, "logits", **others)


def expect_drawn_measure(op: str, measure: str) -> None:
    if measure not in DRAWN_MEASURES:
        raise ValueError(f"{op}: with a temperature measure must be 'prob' or 'log_odds', got {measure!r}")


def fake(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    scored_ids: torch.Tensor | None = None,
    suppress: str = "exclude",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new = logits.new_empty(input_ids.shape, dtype=torch.float32)
    return (
        input_ids.new_empty(input_ids.shape),
        new,
        torch.empty_like(new) if scored_ids is not None else new.new_empty(0),
    )


_call = dispatched(OP, check, fake)
