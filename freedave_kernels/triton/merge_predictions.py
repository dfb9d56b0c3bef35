"""Merges the states of each row into a token and its confidence. A program owns a few rows and sums all states of a row at
once, in an order that depends on their number alone. A few microseconds: bound by latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.contract import LARGEST_LOG_ODDS, STATE_FIELDS
from freedave_kernels.triton.launch import as_rows, ceil_div, kernel, outer_stride, power_of_two

NEVER = tl.constexpr(float("-inf"))
MOST = tl.constexpr(LARGEST_LOG_ODDS)
# Of a program: 16 rows of predict_tokens, whose states are few, or 4 of a large vocabulary in shorter chunks.
MERGED_STATES, MERGED_ROWS = 256, 16


@triton.jit
def expm1(x):
    """exp(x) - 1 in float64 without cancellation, for x <= 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))  # next term below 1e-14 of it
    return tl.where(x > -1e-3, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) in float64, for x >= 0: the rounding of 1 + x is divided out again."""
    rounded = 1.0 + x
    exact = rounded == 1.0
    return tl.where(exact, x, tl.log(rounded) * x / tl.where(exact, 1.0, rounded - 1.0))


@triton.jit
def certainty_of(logit, ties, rest, weighted, MEASURE: tl.constexpr):
    """Of a token whose logit is relative to the largest; but for the margin, which needs another token's."""
    total = ties + rest
    if MEASURE == "prob":
        return tl.exp(logit) / total
    elif MEASURE == "neg_entropy":
        return weighted / total - (tl.log(ties) + log1p(rest / ties))
    else:
        tl.static_assert(MEASURE == "log_odds", "this measure has no confidence")
        others = tl.where(logit < 0.0, total - tl.exp(logit), (ties - 1.0) + rest)
        return tl.where(others > 0.0, tl.minimum(logit - tl.log(tl.where(others > 0.0, others, 1.0)), MOST), MOST)


@triton.jit
def log_sum_of(ties, rest):
    """Of the terms relative to the largest; 0 where there are none."""
    counted = tl.where(ties > 0.0, ties, 1.0)
    return tl.where(ties > 0.0, tl.log(counted) + log1p(rest / counted), tl.log(tl.where(rest > 0.0, rest, 1.0)))


@triton.jit
def add_forbidden(place, inside, count, top, ties, rest, weighted):
    """The softmax of rows, relative to `top`, with the logits `place[0]` to `place[count - 1]` in it, relative to what is the
    largest then. Its `rest` is NaN where one of these is NaN or +inf.
    """
    reference = top
    for s in range(count):
        x = tl.load(place + s, mask=inside, other=NEVER).to(tl.float64)
        reference = tl.maximum(reference, tl.where(x < float("inf"), x, NEVER))
    known = tl.where(reference > NEVER, reference, 0.0)
    shift = tl.where(top > NEVER, top - known, 0.0)
    scale = tl.exp(shift)
    weighted = scale * (weighted + shift * (ties + rest))
    rest = scale * tl.where(shift < 0.0, ties + rest, rest)
    ties = tl.where(shift < 0.0, 0.0, ties)
    for s in range(count):
        x = tl.load(place + s, mask=inside, other=NEVER).to(tl.float64)
        below = tl.where(x > NEVER, x - known, 0.0)
        term = tl.where(x == NEVER, 0.0, tl.where(x < float("inf"), tl.exp(below), float("nan")))
        ties += tl.where(x == known, 1.0, 0.0)
        rest += tl.where(x == known, 0.0, term)
        weighted += term * below
    return reference, ties, rest, weighted


@kernel()
def merge_states(
    states,
    input_ids,
    token_ids,
    confidence,
    forbidden,
    scored,
    log_probs,
    rows: tl.int32,
    chunks: tl.int32,
    length: tl.int32,
    num_forbidden: tl.int32,
    row_outer: tl.int64,
    row_step: tl.int64,
    state_step: tl.int64,
    ids_outer: tl.int64,
    ids_step: tl.int64,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MEASURE: tl.constexpr,
    DRAWN: tl.constexpr,
    FORBIDS: tl.constexpr,
    SCORES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    outer, position = (row // length).to(tl.int64), (row % length).to(tl.int64)
    given = tl.load(input_ids + outer * ids_outer + position * ids_step, mask=inside, other=0)

    chunk = tl.arange(0, CHUNKS)[None, :]
    present = inside[:, None] & (chunk < chunks)
    state = states + (outer * row_outer + position * row_step)[:, None] + chunk * state_step
    token = tl.load(state + 2, mask=present, other=-1.0)
    known = token >= 0.0
    largest = tl.load(state, mask=present & known, other=NEVER)
    rest = tl.load(state + 4, mask=present, other=0.0)  # of chunks with nothing above -inf as well: it may be a NaN
    top = tl.max(largest, axis=1)
    leads = known & (largest == top[:, None])
    shift = tl.where(known, largest - tl.where(known, top[:, None], 0.0), 0.0)
    scale = tl.where(known, tl.exp(shift), 1.0)
    if DRAWN:  # by its noisy logit
        noisy = tl.load(state + 1, mask=present & known, other=NEVER)
        drawn = known & (noisy == tl.max(noisy, axis=1)[:, None])
        chosen = tl.min(tl.where(drawn, token, float("inf")), axis=1)
        logit = tl.load(state + 5, mask=present & known, other=0.0) - top[:, None]
        logit = tl.sum(tl.where(known & (token == chosen[:, None]), logit, 0.0), axis=1)
    else:
        chosen = tl.min(tl.where(leads, token, float("inf")), axis=1)
        logit = tl.zeros_like(top)
    ties, weighted = tl.zeros_like(top), tl.zeros_like(top)
    if MEASURE == "prob" or MEASURE == "margin":
        rest = tl.sum(scale * rest, axis=1)
    else:
        counted = tl.load(state + 3, mask=present, other=0.0)
        terms = tl.where(leads, rest, rest + counted)
        ties = tl.sum(tl.where(leads, counted, 0.0), axis=1)
        if MEASURE == "neg_entropy":
            weighted = tl.load(state + 5, mask=present, other=0.0)
            weighted = tl.sum(scale * (weighted + shift * terms), axis=1)
        rest = tl.sum(scale * terms, axis=1)
    # The softmax that a prediction is part of is relative to this.
    reference = top
    if FORBIDS:
        place = forbidden + row.to(tl.int64) * num_forbidden
        reference, ties, rest, weighted = add_forbidden(place, inside, num_forbidden, top, ties, rest, weighted)
        logit += tl.where(top > NEVER, top - reference, 0.0)
    total = ties + rest
    if MEASURE == "margin":
        second = tl.load(state + 1, mask=present & known, other=NEVER)
        second = tl.max(tl.where(token == chosen[:, None], second, largest), axis=1)
        certainty = tl.exp(logit) * -expm1(second - top) / total
    else:
        certainty = certainty_of(logit, ties, rest, weighted, MEASURE)
    usable = inside & (top > NEVER) & (top < float("inf")) & (total < float("inf"))  # NaN compares false
    token = tl.where(usable, chosen, 0.0).to(tl.int64)
    tl.store(token_ids + row, tl.where(usable, token, given), mask=inside)
    tl.store(confidence + row, tl.where(usable, certainty.to(tl.float32), NEVER), mask=inside)
    if SCORES:
        log_prob = tl.load(scored + row, mask=inside, other=0.0).to(tl.float64) - reference - log_sum_of(ties, rest)
        tl.store(log_probs + row, tl.where(usable, log_prob.to(tl.float32), float("nan")), mask=inside)


def merge_predictions(
    states: torch.Tensor, input_ids: torch.Tensor, measure: str, drawn: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scored, forbidden = None, None
    if states.shape[-1] > STATE_FIELDS:
        singles = states[..., STATE_FIELDS:].amax(-2).float()  # (keeps a NaN)
        scored, forbidden = singles[..., 0], singles[..., 1:].contiguous() if singles.shape[-1] > 1 else None
    return merge_and_score(states, input_ids, measure, drawn, forbidden, scored)


def merge_and_score(
    states: torch.Tensor,
    input_ids: torch.Tensor,
    measure: str,
    drawn: bool,
    forbidden: torch.Tensor | None,
    scored: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beside what states say: `forbidden [*, L, S]` float32, contiguous, are logits that are in the softmax and not in the
    states; `scored [*, L]` are those whose log-probabilities are the third result, which is empty without them.
    """
    token_ids = input_ids.new_empty(input_ids.shape)
    confidence = states.new_empty(input_ids.shape, dtype=torch.float32)
    log_probs = confidence.new_empty(0 if scored is None else input_ids.shape)
    rows = input_ids.numel()
    if rows == 0:
        return token_ids, confidence, log_probs
    ids = as_rows(input_ids)
    if outer_stride(states, 3) is None:
        states = states.contiguous()  # small, as everything but logits
    chunks = states.shape[-2]
    padded = power_of_two(chunks)
    merged_rows = min(MERGED_ROWS, max(1, MERGED_STATES // padded))
    outer = outer_stride(states, 3) or 0
    merge_states.launch(
        (ceil_div(rows, merged_rows), 1, 1),
        (
            states,
            ids,
            token_ids,
            confidence,
            confidence if forbidden is None else forbidden,
            confidence if scored is None else scored.contiguous(),
            log_probs,
            rows,
            chunks,
            ids.shape[-1],
            0 if forbidden is None else forbidden.shape[-1],
            outer,
            states.stride(-3),
            states.stride(-2),
            ids.stride(0),
            ids.stride(1),
        ),
        (merged_rows, padded, measure, drawn, forbidden is not None, scored is not None),
    )
    return token_ids, confidence, log_probs
