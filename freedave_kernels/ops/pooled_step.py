"""pooled_step: what `draft_step` calls where drafts are pooled. No state is forwarded twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import POOLED_DRAFTINGS, PoolLayout, RecordLayout
from freedave_kernels.dispatch import dispatched

OP = "draft_step"  # what a user has called


@dataclass(frozen=True, eq=False)
class DraftPool:
    """The states that were forwarded and may be met again, and what they have told: a slot a sequence, written in place.

    With `draft_step(..., drafting="pooled" | "pipelined", pool=pool)` no state is forwarded twice:
    - Verification goes on through every state whose predictions are known, an input draft or a state of the pool. So `steps`
      may exceed J. `accepted` is the last input draft on the way, and `prefix_length` is of that; `token_ids`, `confidence`
      and `non_finite` are of the last known state. What is complete beyond `prefix_length` was not forwarded in this call.
    - Then the pool holds the newest states that decoding may still come through, those of this call among them.
    - The next drafts go on from the committed state: from a known one as it predicts; else each position as predicted at the
      known state nearest (in Hamming distance, ties to the oldest) that has a prediction there. States that are not known
      become drafts. "pooled" takes the first K, "pipelined" those most likely to be met, later blocks among them: confidences
      count as probabilities for that, within 0 and 1.

    Drafts are computed through their current block at least; what is predicted beyond `computed_length` is not looked at.
    From call to call the window may go over complete blocks of the committed state; where `window_start` goes back, or by C
    or more, its slot is emptied. What a pool knows holds for one context before the window: where a cache is refreshed,
    `forget`. Column `c` is of the positions `i` with `i % C == c`, of which a window of at most C positions holds one.
    """

    memory: torch.Tensor
    """`[S, W]` int64: all that is below, side by side, float32 numbers two in the place of an integer."""
    num_states: int
    """P."""
    length: int
    """C."""

    def __post_init__(self) -> None:
        op = "DraftPool"
        arguments.expect_int(op, "num_states", self.num_states, minimum=1)
        arguments.expect_int(op, "length", self.length, minimum=1)
        arguments.expect_tensor(op, "memory", self.memory, [torch.int64])
        arguments.expect_dims(op, "memory", self.memory, "S, W")
        shape = (self.memory.shape[0], self.layout.width)
        arguments.expect_shape(op, "memory", self.memory, shape, "S, W of so many states and positions")
        if not self.memory.is_contiguous():
            raise ValueError(f"{op}: memory must be contiguous, got strides {tuple(self.memory.stride())}")

    @property
    def layout(self) -> PoolLayout:
        """Where things stand in a row of `memory`."""
        return PoolLayout.of(self.num_states, self.length)

    @property
    def states(self) -> torch.Tensor:
        """`[S, P, C]` int64: token ids, the mask where open."""
        return self.memory[:, self.layout.states].unflatten(1, (self.num_states, self.length))

    @property
    def token_ids(self) -> torch.Tensor:
        """`[S, P, C]` int64: the predictions at each state."""
        return self.memory[:, self.layout.token_ids].unflatten(1, (self.num_states, self.length))

    @property
    def confidence(self) -> torch.Tensor:
        """`[S, P, C]` float32: how sure they are; -inf where nothing was predicted."""
        floats = self.memory[:, self.layout.confidence].view(torch.float32)
        return floats[:, : self.num_states * self.length].unflatten(1, (self.num_states, self.length))

    @property
    def computed(self) -> torch.Tensor:
        """`[S, P]` int64: the position before which the predictions are known."""
        return self.memory[:, self.layout.computed]

    @property
    def age(self) -> torch.Tensor:
        """`[S, P]` int64: larger is newer; 0 is no state."""
        return self.memory[:, self.layout.age]

    @property
    def start(self) -> torch.Tensor:
        """`[S]` int64: `window_start` of the last call."""
        return self.memory[:, self.layout.start.start]

    def clear(self, slot: int) -> None:
        """Empties a slot for another sequence."""
        self.memory[slot].zero_()


def draft_pool(slots: int, states: int, length: int, device: torch.device | str | None = None) -> DraftPool:
    """An empty pool for `slots` sequences, `states` each, in windows of at most `length` positions.

    Some 16 states serve "pooled" with 8 drafts, 48 "pipelined" and 16 drafts; when there are more, the oldest go.

    Raises:
        TypeError, ValueError: a size that is no int, or below 1 (`slots`: below 0).
    """
    for name, value, minimum in (("slots", slots, 0), ("states", states, 1), ("length", length, 1)):
        arguments.expect_int("draft_pool", name, value, minimum=minimum)
    width = PoolLayout.of(states, length).width
    return DraftPool(torch.zeros(slots, width, dtype=torch.int64, device=device), states, length)


def check(
    drafts: Any,
    token_ids: Any,
    confidence: Any,
    num_drafts: Any,
    pool: Any,
    pool_states: Any,
    pool_length: Any,
    mask_token_id: Any,
    draft_steps: Any,
    tokens_per_step: Any,
    tokens_each: Any,
    threshold: Any,
    threshold_each: Any,
    rule: Any,
    order: Any,
    block_length: Any,
    drafting: Any,
    eos_token_id: Any,
    eos_each: Any,
    step: Any,
    answer_start: Any,
    window_start: Any,
    computed_length: Any,
    slots: Any,
    forget: Any,
) -> None:
    arguments.expect_drafted(OP, drafts, token_ids, confidence, num_drafts, draft_steps, step, answer_start)
    arguments.expect_static_step(
        OP, "drafts", drafts, mask_token_id, tokens_per_step, tokens_each, threshold, threshold_each, rule, order,
        block_length, eos_token_id, eos_each,
    )  # fmt: skip
    arguments.expect_choice(OP, "drafting", drafting, POOLED_DRAFTINGS)
    # The pool itself has been checked when it was made.
    batch, count, length = drafts.shape
    if pool_length < length:
        raise ValueError(f"{OP}: pool must be for windows of {length} positions at least, got {pool_length}")
    room = pool.shape[0]
    if room != batch if slots is None else room < min(batch, 1):
        raise ValueError(f"{OP}: pool must have a slot for each of {batch} sequences, got {room}")
    if window_start is not None:
        arguments.expect_tensor(OP, "window_start", window_start, [torch.int64])
        arguments.expect_shape(OP, "window_start", window_start, (batch,), "one position a sequence")
    if computed_length is not None:
        arguments.expect_tensor(OP, "computed_length", computed_length, [torch.int64])
        arguments.expect_shape(OP, "computed_length", computed_length, (batch, count), "one length a draft")
    if slots is not None:
        arguments.expect_tensor(OP, "slots", slots, arguments.INTEGER_DTYPES)
        arguments.expect_shape(OP, "slots", slots, (batch,), "one slot a sequence")
    if forget is not None:
        arguments.expect_tensor(OP, "forget", forget, [torch.bool])
        arguments.expect_shape(OP, "forget", forget, (batch,), "one a sequence")
    others = {"window_start": window_start, "computed_length": computed_length, "slots": slots, "forget": forget}
    arguments.expect_same_device(OP, drafts, "drafts", pool=pool, **others)


def fake(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    pool: torch.Tensor,
    pool_states: int,
    pool_length: int,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int = 1,
    tokens_per_step_per_row: torch.Tensor | None = None,
    threshold: float | None = None,
    threshold_per_row: torch.Tensor | None = None,
    rule: str = "threshold",
    order: str = "confidence",
    block_length: int | None = None,
    drafting: str = "pooled",
    eos_token_id: int | None = None,
    eos_token_id_per_row: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    answer_start: torch.Tensor | None = None,
    window_start: torch.Tensor | None = None,
    computed_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    forget: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, _, length = drafts.shape
    return drafts.new_empty((batch, RecordLayout.of(length, draft_steps).width))


def window(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    pool: torch.Tensor,
    pool_states: int,
    pool_length: int,
    mask_token_id: int,
    draft_steps: int,
    *rest: Any,
) -> tuple[int, int, int]:
    return pool_length, max(drafts.shape[1], draft_steps), pool_states


pooled_step = dispatched("pooled_step", check, fake, window)
