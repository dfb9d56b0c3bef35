"""partial_predictions: what predict_tokens finds out in a part of the vocabulary, to be merged with the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import STATE_FIELDS, TOKENS_PER_STATE
from freedave_kernels.dispatch import dispatched
from freedave_kernels.ops.predict_tokens import as_tensor, check_logits, check_scored, temperature_seed_positions
from freedave_kernels.single_logits import forbidden_logits, scored_logits

OP = "partial_predictions"

TOKEN_IDS = 2**53  # below that, float64 holds them exactly


def partial_predictions(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    *,
    first_token_id: int = 0,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: Sequence[int] | torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    suppress: str = "exclude",
    scored_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Looks at a part of the vocabulary: a slice of a projection whose logits never exist all at once, or one shard where
    tensor parallelism has divided it. `merge_predictions` makes predictions of the states of all parts::

        states = [
            fk.partial_predictions(hidden @ part.T, input_ids, mask_token_id, first_token_id=first)
            for first, part in ...  # weight [V, H] by slices of rows
        ]
        token_ids, confidence = fk.merge_predictions(torch.cat(states, -2), input_ids)

    Args:
        logits: `[*, L, V]` float16, bfloat16 or float32, of tokens `first_token_id` to `first_token_id + V - 1`; the last
            dimension contiguous, any leading strides.
        input_ids, mask_token_id, mask_index, measure, logits_shift, temperature, seed, positions, floor, suppress: as
            `predict_tokens` takes them.
        first_token_id: the token of the first logit, at least 0; ids must lie below 2^53. A multiple of 4 with a temperature.
        suppress_tokens: ids of the whole vocabulary, as `predict_tokens` takes them. All parts must be given the same list.
        scored_ids: `[*, L]` int64 or int32, ids of the whole vocabulary, the same for all parts: tokens whose
            log-probabilities `merge_predictions(..., scored=True)` will return.

    Returns:
        `[*, L, C, 6]` float64, C = ceil(V / 4096): for each 4,096 neighbouring logits (`TOKENS_PER_STATE`) of each masked
        position
        - the largest logit, -inf if there is none,
        - for the margin, the second largest, equal ones counted twice,
        - the lowest token whose logit is the largest, -1 if there is none,
        - for the entropy, how many logits equal the largest; for the log-odds, 1 if there is one; else 0,
        - the sum of exp(x - max), without what is counted in the field before; NaN or inf if a logit was NaN or +inf,
        - for the entropy, the sum of (x - max) exp(x - max).
        With a temperature logits are those divided by it; the token is the one with the largest noisy logit, which stands in
        the second field, and its logit in the last. (Where a position's temperature is 0, there is no noise.)
        Positions that are not masked are not read: their states say that there is nothing.

        With `scored_ids`, or forbidden tokens (`suppress="forbid"`), single logits follow, `[*, L, C, 7 + S]`: that of the
        scored token (NaN where none is asked for) and those of the S forbidden ones, in the first state of the part that
        they belong to; -inf everywhere else, for what is not in the softmax, and for a token's repetitions.

    Guarantees: those of `predict_tokens`. Parts that begin at multiples of 4,096 give the states that the whole vocabulary
    gives, bit for bit, so it does not matter how it was divided.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: the online softmax (arXiv:1805.02867), its state as a result, as split attention does it (arXiv:2309.17453).
    """
    suppressed = as_tensor(OP, suppress_tokens, logits, TOKEN_IDS)
    input_ids, scored_ids = arguments.as_int64(input_ids), arguments.as_int64(scored_ids)
    drawing = temperature_seed_positions(OP, input_ids, temperature, seed, positions)
    rest = (measure, suppressed, logits_shift, *drawing, floor)
    states = _call(logits, input_ids, mask_token_id, first_token_id, mask_index, *rest)
    check_scored(OP, logits, input_ids, scored_ids, suppress)
    forbidden = suppressed if suppress == "forbid" else None
    if scored_ids is None and forbidden is None:
        return states
    of_row = (logits_shift, drawing[0], floor, first_token_id)
    scored = None if scored_ids is None else scored_logits(logits, scored_ids, suppressed, suppress, *of_row)
    return _beside(states, scored, None if forbidden is None else forbidden_logits(logits, forbidden, *of_row))


def _beside(states: torch.Tensor, scored: torch.Tensor | None, forbidden: torch.Tensor | None) -> torch.Tensor:
    """The states with the single logits of their part, `scored [*, L]` and `forbidden [*, L, S]`, in the first of them."""
    singles = [states.new_full((*states.shape[:-2], 1), math.nan) if scored is None else scored[..., None].double()]
    if forbidden is not None:
        singles.append(forbidden.double())
    others = (0, 0, 0, states.shape[-2] - 1)
    return torch.cat(
        [states, torch.nn.functional.pad(torch.cat(singles, -1)[..., None, :], others, value=-math.inf)], -1
    )


def check(logits: Any, input_ids: Any, mask_token_id: Any, first_token_id: Any, *rest: Any) -> None:
    check_logits(OP, logits, input_ids, mask_token_id, *rest)
    temperature = rest[-4]
    arguments.expect_int(OP, "first_token_id", first_token_id, minimum=0)
    if first_token_id + logits.shape[-1] > TOKEN_IDS:
        raise ValueError(f"{OP}: token ids must lie below 2^53, got first_token_id {first_token_id}")
    if temperature is not None and first_token_id % 4:
        raise ValueError(f"{OP}: with a temperature first_token_id must be a multiple of 4, got {first_token_id}")


def fake(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    mask_token_id: int,
    first_token_id: int = 0,
    mask_index: torch.Tensor | None = None,
    measure: str = "prob",
    suppress_tokens: torch.Tensor | None = None,
    logits_shift: bool = False,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
) -> torch.Tensor:
    states = -(-logits.shape[-1] // TOKENS_PER_STATE)
    return logits.new_empty((*input_ids.shape, states, STATE_FIELDS), dtype=torch.float64)


_call = dispatched(OP, check, fake)
