"""pooled_step: what `draft_step` calls where drafts are pooled. No state is forwarded twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import POOL_FIELDS, POOLED_DRAFTINGS, RecordLayout
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
    - The next drafts go on from the committed state: from a known one as it predicts; else by the newest predictions, their
      log-odds moved by what filling a position did to the others when it was last seen. States that are not known become
      drafts. "pooled" takes the first K, "pipelined" those most likely to be met, later blocks among them.

    Drafts are computed through their current block at least; what is predicted beyond `computed_length` is not looked at.
    From call to call the window may go over complete blocks of the committed state; where `window_start` goes back, or by C
    or more, its slot is emptied. What a pool knows holds for one context before the window: where a cache is refreshed,
    `forget`. Column `c` is of the positions `i` with `i % C == c`, of which a window of at most C positions holds one.
    """

    states: torch.Tensor
    """`[S, P, C]` int64: token ids, the mask where open."""
    token_ids: torch.Tensor
    """`[S, P, C]` int64: the predictions at each state."""
    confidence: torch.Tensor
    """`[S, P, C]` float32: how sure they are; -inf where nothing was predicted."""
    computed: torch.Tensor
    """`[S, P]` int64: the position before which the predictions are known."""
    age: torch.Tensor
    """`[S, P]` int64: larger is newer; 0 is no state."""
    start: torch.Tensor
    """`[S]` int64: `window_start` of the last call."""
    effects: torch.Tensor
    """`[S, C, C]` float32: how filling a position moved the log-odds of the others, as last measured."""

    def __post_init__(self) -> None:
        arguments.expect_tensor("DraftPool", "states", self.states, [torch.int64])
        arguments.expect_dims("DraftPool", "states", self.states, "S, P, C")
        slots, entries, columns = self.states.shape
        if entries < 1 or columns < 1:
            raise ValueError(
                f"DraftPool: states must hold a state and a column at least, got shape {tuple(self.states.shape)}"
            )
        for name, dtype, shape, meaning in (
            ("token_ids", torch.int64, (slots, entries, columns), "like states"),
            ("confidence", torch.float32, (slots, entries, columns), "like states"),
            ("computed", torch.int64, (slots, entries), "one a state"),
            ("age", torch.int64, (slots, entries), "one a state"),
            ("start", torch.int64, (slots,), "one a slot"),
            ("effects", torch.float32, (slots, columns, columns), "S, C, C"),
        ):
            arguments.expect_tensor("DraftPool", name, getattr(self, name), [dtype])
            arguments.expect_shape("DraftPool", name, getattr(self, name), shape, meaning)
        for name, tensor in zip(POOL_FIELDS, self.tensors, strict=True):
            if not tensor.is_contiguous():
                raise ValueError(f"DraftPool: {name} must be contiguous, got strides {tuple(tensor.stride())}")
            arguments.expect_same_device("DraftPool", self.states, "states", **{name: tensor})

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in their order."""
        return (
            self.states, self.token_ids, self.confidence, self.computed, self.age, self.start, self.effects,
        )  # fmt: skip

    def clear(self, slot: int) -> None:
        """Empties a slot for another sequence."""
        for tensor in (self.age, self.start, self.effects):
            tensor[slot].zero_()


def draft_pool(slots: int, states: int, length: int, device: torch.device | str | None = None) -> DraftPool:
    """An empty pool for `slots` sequences, `states` each, in windows of at most `length` positions.

    Some 16 states serve "pooled", and 48 "pipelined"; when there are more, the oldest go.

    Raises:
        TypeError, ValueError: a size that is no int, or below 1 (`slots`: below 0).
    """
    for name, value, minimum in (("slots", slots, 0), ("states", states, 1), ("length", length, 1)):
        arguments.expect_int("draft_pool", name, value, minimum=minimum)
    rows = (slots, states, length)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return DraftPool(
        states=zeros(*rows),
        token_ids=zeros(*rows),
        confidence=zeros(*rows, dtype=torch.float32),
        computed=zeros(slots, states),
        age=zeros(slots, states),
        start=zeros(slots),
        effects=zeros(slots, length, length, dtype=torch.float32),
    )


def check(
    drafts: Any,
    token_ids: Any,
    confidence: Any,
    num_drafts: Any,
    pool_states: Any,
    pool_token_ids: Any,
    pool_confidence: Any,
    pool_computed: Any,
    pool_age: Any,
    pool_start: Any,
    pool_effects: Any,
    mask_token_id: Any,
    draft_steps: Any,
    tokens_per_step: Any,
    threshold: Any,
    order: Any,
    block_length: Any,
    drafting: Any,
    eos_token_id: Any,
    step: Any,
    answer_start: Any,
    window_start: Any,
    computed_length: Any,
    slots: Any,
    forget: Any,
) -> None:
    arguments.expect_drafted(OP, drafts, token_ids, confidence, num_drafts, draft_steps, step, answer_start)
    arguments.expect_static_step(OP, mask_token_id, tokens_per_step, threshold, order, block_length, eos_token_id)
    arguments.expect_choice(OP, "drafting", drafting, POOLED_DRAFTINGS)
    _check_room(drafts, pool_states, slots)
    batch, count, _ = drafts.shape
    for name, value, dtypes, shape, meaning in (
        ("window_start", window_start, (torch.int64,), (batch,), "one position a sequence"),
        ("computed_length", computed_length, (torch.int64,), (batch, count), "one length a draft"),
        ("slots", slots, arguments.INTEGER_DTYPES, (batch,), "one slot a sequence"),
        ("forget", forget, (torch.bool,), (batch,), "one a sequence"),
    ):
        if value is not None:
            arguments.expect_tensor(OP, name, value, dtypes)
            arguments.expect_shape(OP, name, value, shape, meaning)
    others = {"window_start": window_start, "computed_length": computed_length, "slots": slots, "forget": forget}
    arguments.expect_same_device(OP, drafts, "drafts", **others)


def _check_room(drafts: torch.Tensor, states: torch.Tensor, slots: Any) -> None:
    """Whether there is room in a pool that has been checked when it was made."""
    count, _, columns = states.shape
    batch, _, length = drafts.shape
    if columns < length:
        raise ValueError(f"{OP}: pool must be for windows of {length} positions at least, got {columns}")
    if count != batch if slots is None else count < min(batch, 1):
        raise ValueError(f"{OP}: pool must have a slot for each of {batch} sequences, got {count}")
    arguments.expect_same_device(OP, drafts, "drafts", pool=states)


def fake(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    pool_states: torch.Tensor,
    pool_token_ids: torch.Tensor,
    pool_confidence: torch.Tensor,
    pool_computed: torch.Tensor,
    pool_age: torch.Tensor,
    pool_start: torch.Tensor,
    pool_effects: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int = 1,
    threshold: float | None = None,
    order: str = "confidence",
    block_length: int | None = None,
    drafting: str = "pooled",
    eos_token_id: int | None = None,
    step: torch.Tensor | None = None,
    answer_start: torch.Tensor | None = None,
    window_start: torch.Tensor | None = None,
    computed_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    forget: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, _, length = drafts.shape
    return drafts.new_empty((batch, RecordLayout.of(length, draft_steps).width))


pooled_step = dispatched("pooled_step", check, fake)
