"""draft_step: everything between two forwards after predict_tokens, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from freedave_kernels import arguments
from freedave_kernels.contract import COUNTERS, DRAFTINGS, MATCHES, POOLED_DRAFTINGS, RecordLayout
from freedave_kernels.dispatch import dispatched
from freedave_kernels.ops.pooled_step import DraftPool, pooled_step

OP = "draft_step"


@dataclass(frozen=True, eq=False)
class DraftStep:
    """What `draft_step` returns. The *committed* state is `drafts[:, 0]`: everything unmasked there is final.

    All that is found out about a sequence lies side by side in `record`, so that one tensor is made, and one read tells a
    decoder everything; all properties are views of it.
    """

    record: torch.Tensor
    """`[B, 11 + (2 + K) L + ceil(L / 2)]` int64: `counters`, `token_ids`, `step_map`, `drafts`, and `confidence`, whose
    numbers, and a 0 behind them where L is odd, stand two in the place of an integer."""
    draft_steps: int
    """K."""

    @property
    def length(self) -> int:
        """L."""
        return 2 * (self.record.shape[-1] - len(COUNTERS)) // (2 * self.draft_steps + 5)

    @property
    def layout(self) -> RecordLayout:
        """Where things stand in a row of `record`, for those who read it on the host."""
        return RecordLayout.of(self.length, self.draft_steps)

    @property
    def drafts(self) -> torch.Tensor:
        """`[B, K, L]` int64: the next drafts; draft 0 is right by construction."""
        return self.record[:, self.layout.drafts].unflatten(1, (self.draft_steps, self.length))

    @property
    def confidence(self) -> torch.Tensor:
        """`[B, L]` float32: the accepted draft's confidences, carried over; -inf where it predicted the mask itself."""
        return self.record[:, self.layout.confidence].view(torch.float32)[:, : self.length]

    @property
    def counters(self) -> torch.Tensor:
        """`[B, 11]`: the numbers below and `num_drafts`, in the order of `COUNTERS`."""
        return self.record[:, self.layout.counters]

    @property
    def token_ids(self) -> torch.Tensor:
        """`[B, L]`: the accepted draft's predictions, carried over."""
        return self.record[:, self.layout.token_ids]

    @property
    def step_map(self) -> torch.Tensor:
        """`[B, L]`: the static step that committed each position in this call; -1 for all other positions."""
        return self.record[:, self.layout.step_map]

    @property
    def num_drafts(self) -> torch.Tensor:
        """`[B]`: how many drafts are active (0: nothing was left to fill, and every draft is the committed state)."""
        return self.record[:, 9]

    @property
    def accepted(self) -> torch.Tensor:
        """`[B]`: index of the accepted input draft."""
        return self.record[:, 0]

    @property
    def steps(self) -> torch.Tensor:
        """`[B]`: static steps taken by this call; each has committed a token. 0 in a sequence that is not `finished`: nothing
        can be ranked, nor could it be after another forward of the same state; `non_finite` says where."""
        return self.record[:, 1]

    @property
    def tokens_committed(self) -> torch.Tensor:
        """`[B]`: positions committed by this call."""
        return self.record[:, 2]

    @property
    def masked_in_block(self) -> torch.Tensor:
        """`[B]`: masked positions left in the committed state's current block."""
        return self.record[:, 3]

    @property
    def masked_in_window(self) -> torch.Tensor:
        """`[B]`: masked positions left in the committed state."""
        return self.record[:, 4]

    @property
    def prefix_length(self) -> torch.Tensor:
        """`[B]`: positions in the leading complete blocks of the *accepted draft*: how far the window may slide, because the
        forward that just ran saw these blocks complete and its keys and values of them are final."""
        return self.record[:, 5]

    @property
    def forward_drafts(self) -> torch.Tensor:
        """`[B]`: leading active next drafts that still have a masked position, so need a forward."""
        return self.record[:, 6]

    @property
    def finished(self) -> torch.Tensor:
        """`[B]`: 1 when nothing is masked in the window, or the sequence has ended."""
        return self.record[:, 7]

    @property
    def non_finite(self) -> torch.Tensor:
        """`[B]`: first masked position of the accepted draft's current block without a prediction (confidence -inf or NaN, or
        the mask itself predicted), else -1."""
        return self.record[:, 8]

    @property
    def ended(self) -> torch.Tensor:
        """`[B]`: 1 when a leading complete block of the committed state contains `eos_token_id`, from `answer_start` on."""
        return self.record[:, 10]


def draft_step(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    *,
    tokens_per_step: int | torch.Tensor = 1,
    threshold: float | torch.Tensor | None = None,
    rule: str = "threshold",
    order: str = "confidence",
    block_length: int | None = None,
    drafting: str = "recycled",
    match: str = "exact",
    eos_token_id: int | torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    answer_start: torch.Tensor | None = None,
    pool: DraftPool | None = None,
    window_start: torch.Tensor | None = None,
    computed_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    forget: torch.Tensor | None = None,
) -> DraftStep:
    """Verifies drafts against their predictions, commits the last right one and builds the next drafts.

    Args:
        drafts: `[B, J, L]` int64, the forwarded drafts (int32 ids are copied, as `token_ids`); draft 0 is right anyway.
        token_ids: `[B, J, L]` int64 and confidence: `[B, J, L]` float32, the predictions at each draft, as
            `predict_tokens` returns them. Where the mask itself is predicted, nothing is (as if the confidence were -inf): no
            step fills a position with the mask. `predict_tokens(..., suppress_tokens=[mask_token_id])` never predicts it.
        num_drafts: `[B]` int32 or int64, how many drafts are active.
        mask_token_id: marks masked positions. draft_steps: K, the number of drafts to build; with 1, this is static decoding.
        tokens_per_step, threshold, rule, order, block_length: the static step, as in `build_drafts`.
        drafting: how the next drafts are made. "nested": from the accepted draft's predictions alone (`build_drafts`).
            "recycled": draft 0 so; each further draft fills the position ranked first by the predictions of the input
            draft nearest (in Hamming distance, ties to the lowest index) to the draft built last. Positions that this
            nearest draft has filled already take the accepted draft's predictions. "pooled" and "pipelined":
            the states that come next, of those that were not forwarded yet; the first K, or the K most likely to be met.
        match: as in `verify_drafts`.
        eos_token_id: a finished block that contains it ends its sequence; an int, or int32/int64 `[B]` (negative: none).
        step: `[B]` int64, static steps taken so far (None: 0); only offsets `step_map`.
        answer_start: `[B]` int64, the window position at which each sequence's answer begins (None: 0). What is before it is
            prompt, where `eos_token_id` ends nothing. It may lie before the window (negative) or beyond it.

    Of "pooled" and "pipelined" only, which need `pool` and take no `match` but "exact"; see `DraftPool`:
        pool: what is known of states that were forwarded, written in place.
        window_start: `[B]` int64, the position of each window's first element (None: 0).
        computed_length: `[B, J]` int64, how many leading positions of each draft were computed (None: all of them).
        slots: `[B]` int64 or int32, each sequence's slot of `pool`, no two the same; None: sequence b has slot b.
        forget: `[B]` bool, whether the slot's states are out of date (None: no).

    Returns:
        `DraftStep`. But with a pool result for result equal to composing the other ops, which a test checks.

    Guarantees: every call commits at least one static step where anything can be ranked, and at most J without a pool; what
    is committed is what static decoding (`draft_steps=1`) commits, whatever the drafts. Where nothing can be ranked (not
    finite logits, or the mask itself predicted, wherever the current block is open), `steps` is 0 and every further call with
    the same logits would say the same: a loop must stop there, with an error. No host synchronisation.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        BackendUnavailableError: the backend cannot serve the call: not available here, another device, beyond its limits.

    Source: FreeDave (free draft-and-verification); every drafting but "nested" is this project's own.
    """
    drafts, token_ids = map(arguments.as_int64, (drafts, token_ids))
    rules = (*arguments.for_all_or_each(tokens_per_step, 1), *arguments.for_all_or_each(threshold, None), rule, order)
    ends, of_pools = arguments.for_all_or_each(eos_token_id, None), (window_start, computed_length, slots, forget)
    if drafting in POOLED_DRAFTINGS:
        record = pooled_step(
            drafts, token_ids, confidence, num_drafts, *_parts_of(pool, drafting, match), mask_token_id, draft_steps,
            *rules, block_length, drafting, *ends, step, answer_start, *of_pools,
        )  # fmt: skip
        return DraftStep(record, draft_steps)
    if pool is not None or any(given is not None for given in of_pools):
        raise _of_pools_only(drafting, pool, *of_pools)
    call = (drafts, token_ids, confidence, num_drafts, mask_token_id, draft_steps, *rules, block_length)
    return DraftStep(_call(*call, drafting, match, *ends, step, answer_start), draft_steps)


def _of_pools_only(drafting: Any, *given: Any) -> ValueError:
    names = ("pool", "window_start", "computed_length", "slots", "forget")
    name = next(name for name, value in zip(names, given, strict=True) if value is not None)
    return ValueError(f"{OP}: {name} is for drafting={' or '.join(map(repr, POOLED_DRAFTINGS))}, got {drafting!r}")


def _parts_of(pool: Any, drafting: str, match: Any) -> tuple[torch.Tensor, int, int]:
    if match != "exact":
        arguments.expect_choice(OP, "match", match, MATCHES)
        raise ValueError(f"{OP}: match must be 'exact' with drafting={drafting!r}, got {match!r}")
    if not isinstance(pool, DraftPool):
        raise TypeError(
            f"{OP}: pool must be a DraftPool with drafting={drafting!r} (draft_pool makes one), got {type(pool).__name__}"
        )
    return pool.memory, pool.num_states, pool.length


def check(
    drafts: Any,
    token_ids: Any,
    confidence: Any,
    num_drafts: Any,
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
    match: Any,
    eos_token_id: Any,
    eos_each: Any,
    step: Any,
    answer_start: Any,
) -> None:
    arguments.expect_drafted(OP, drafts, token_ids, confidence, num_drafts, draft_steps, step, answer_start)
    arguments.expect_static_step(
        OP, "drafts", drafts, mask_token_id, tokens_per_step, tokens_each, threshold, threshold_each, rule, order,
        block_length, eos_token_id, eos_each,
    )  # fmt: skip
    arguments.expect_choice(OP, "drafting", drafting, (*DRAFTINGS, *POOLED_DRAFTINGS))
    arguments.expect_choice(OP, "match", match, MATCHES)


def fake(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int = 1,
    tokens_per_step_per_row: torch.Tensor | None = None,
    threshold: float | None = None,
    threshold_per_row: torch.Tensor | None = None,
    rule: str = "threshold",
    order: str = "confidence",
    block_length: int | None = None,
    drafting: str = "recycled",
    match: str = "exact",
    eos_token_id: int | None = None,
    eos_token_id_per_row: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    answer_start: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, _, length = drafts.shape
    return drafts.new_empty((batch, RecordLayout.of(length, draft_steps).width))


def window(drafts: torch.Tensor, *rest: Any) -> tuple[int, int]:
    return drafts.shape[2], max(drafts.shape[1], rest[4])


_call = dispatched(OP, check, fake, window)
