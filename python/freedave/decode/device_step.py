"""What a step of the graph executor does on the device, from the forward to the next drafts: launches of fixed shapes.

A step's forward has F tokens a draft, from `begin` on; predictions, verification and drafting look at a window of L of them:

| cache | F tokens from | stored keys that they see | window |
|---|---|---|---|
| exact | the window's start | everything before it | blocks that the drafts can reach |
| none | position 0 | none | the same |
| dual | the block's start, the block alone | everything before and after it | the block |
| prefix | the block's start, to the end | everything before it | the block |

A sequence's first forward also carries its prompt, and with "dual" and "prefix" the first of each block carries the whole
sequence; these are steps of one slot, with one draft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from freedave.decode.cache_policy import rank_blocks_first
from freedave.decode.device_state import NOTHING, DeviceState
from freedave.decode.log_probs import Known, beside, committed_log_probs, remembered
from freedave.decode.noise import temperatures_of
from freedave.decode.settings import Settings
from freedave.decode.shapes import Shape
from freedave.forward.prediction import Predictor
from freedave.forward.window_attention import WindowAttention
from freedave_kernels import DraftPool, DraftStep, draft_step, keep
from freedave_kernels.contract import COUNTERS

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM


class DeviceStep:
    """One forward over the drafts of `state`, and everything up to the next drafts, with settings that are fixed."""

    def __init__(self, lm: DiffusionLM, settings: Settings, state: DeviceState) -> None:
        self.state = state
        self.predict = Predictor(lm, settings.measure, settings.truncation)
        self._lm = lm
        self._settings = settings
        self._size = settings.block_length
        self._one_block = settings.one_block
        self._drawn = settings.draws
        self._commits = settings.cache != "exact"  # later forwards read what is committed from `tokens`

    def run(self, shape: Shape, window: list[torch.Tensor]) -> torch.Tensor:
        """A step, whose own keys and values go to `window`. Reads nothing back; returns the record `[R, 11 + 3 L]`, with the
        log-probabilities behind it where they are asked for.
        """
        state = self.state
        start = state.taken(state.start, shape)
        begin = state.taken(state.begin, shape) if shape.whole else start
        number = torch.ones_like(state.row) if shape.one else state.num_drafts
        if not shape.one and shape.drafts < self._settings.draft_steps:
            number = number.clamp(max=shape.drafts)
        drafts = self._drafts(shape, start)
        known = drafts.clamp(min=0)  # where there is no position, any token will do
        inputs, positions, rows = self._inputs(shape, known, start, begin)
        features = self._forward(shape, inputs, positions, start, begin, number, rows)
        place = None  # positions of the window, [R, L]
        if self._drawn or self._commits:
            place = start[:, None] + state.columns[: shape.window]
        token_ids, confidence = self.predict(features, known.view(-1), self._noise(shape, place))
        confidence = confidence.view(drafts.shape)
        certain = confidence.clone() if self._settings.log_probs else confidence
        if self._lm.logits_shift and (self._one_block or self._lm.attention == "block_causal"):
            rank_blocks_first(confidence, self._size)
        met_before = None
        if self._settings.log_probs and state.pool is not None:
            met_before = self._remembered(state.pool, shape, start)
        step, following = self._draft(shape, drafts, token_ids.view(drafts.shape), confidence, number, start)
        record = step.record[:, : len(COUNTERS) + 3 * shape.window]
        if self._settings.log_probs:
            taken = state.taken(state.steps_taken, shape)
            given = (drafts, certain, number, self._lm.mask_token_id, taken, step, self._settings.measure, met_before)
            record = beside(record, committed_log_probs(*given))
        self._advance(shape, window, step, following, start, begin, number, place)
        return record

    def _remembered(self, pool: DraftPool, shape: Shape, start: torch.Tensor) -> Known:
        """What the pool knows before the step."""
        slots, forget = (self.state.row, self.state.anew) if shape.one else (None, None)
        return remembered(pool, slots, start, forget, self._lm.mask_token_id, shape.window)

    def _noise(self, shape: Shape, place: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        """Key, position and temperature of each row that is predicted, `[R K L]` each, where tokens are drawn: the same for
        all drafts.
        """
        if not self._drawn or place is None:
            return None
        keys, temperatures = self.state.taken(self.state.noise, shape)[..., None].unbind(1)
        each = [value.expand_as(place)[:, None].expand(-1, shape.drafts, -1) for value in (keys, place, temperatures)]
        seed, positions, bits = torch.stack(each).view(3, -1)
        return seed, positions, temperatures_of(bits)

    def _draft(
        self,
        shape: Shape,
        drafts: torch.Tensor,
        token_ids: torch.Tensor,
        confidence: torch.Tensor,
        number: torch.Tensor,
        start: torch.Tensor,
    ) -> tuple[DraftStep, torch.Tensor]:
        """What the predictions prove, and the next drafts `[R, K, L]`, with NOTHING where there is no position."""
        state, settings = self.state, self._settings
        pooling: dict[str, Any] = {}
        nothing = None
        if state.pool is not None and not shape.static:
            if not self._one_block:  # windows end elsewhere each time; a state that is met again is masked behind them
                nothing = drafts < 0
                drafts = drafts.masked_fill(nothing, self._lm.mask_token_id)
            pooling = {
                "pool": state.pool,
                "answer_start": state.taken(state.prompt_length, shape) - start,
                "eos_token_id": state.taken(state.end, shape),
                "window_start": start,
                "slots": state.row if shape.one else None,
                "forget": state.anew if shape.one else None,  # a sequence's first forward, or a refresh
            }
        step = draft_step(
            drafts,
            token_ids,
            confidence,
            number.clamp(min=1),
            self._lm.mask_token_id,
            1 if shape.static else settings.draft_steps,
            tokens_per_step=settings.tokens_per_step,
            threshold=state.taken(state.threshold, shape),
            rule=settings.step_rule,
            order=settings.order,
            block_length=settings.block_length,
            drafting="nested" if shape.static else settings.drafting,
            step=state.taken(state.steps_taken, shape),
            **pooling,
        )
        return step, step.drafts if nothing is None else step.drafts.masked_fill(nothing[:, :1], NOTHING)

    def store(self, count: int, done: int) -> None:
        """Stores the keys and values of `count` tokens of the prompt, behind `done`, of the slot that `state.row` names."""
        state = self.state
        shape = Shape(1, 1, count, 0, one=True, whole=True)
        window = state.window_buffers(shape)
        begin, one = torch.full_like(state.row, done), torch.ones_like(state.row)
        with state.lent(window):
            tokens = state.taken(state.tokens, shape)[:, done : done + count][:, None]
            positions = state.columns[done : done + count][None, None]
            self._forward(shape, tokens, positions, begin, begin, one)
            self._keep(shape, window, 0 * one, begin, count * one)
        state.put(state.begin, begin + count, shape)

    def _drafts(self, shape: Shape, start: torch.Tensor) -> torch.Tensor:
        """`[R, K, L]`: those of the slots, or what is committed of the one sequence that a step is for."""
        state = self.state
        if not shape.one:
            return state.drafts[:, : shape.drafts, : shape.window]
        columns = start[:, None] + state.columns[: shape.window]
        return state.taken(state.tokens, shape).gather(1, columns)[:, None]

    def _inputs(
        self, shape: Shape, known: torch.Tensor, start: torch.Tensor, begin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The tokens of the forward and their positions `[R, K, F]`, and its rows that predict the window `[R K L]` (None:
        all, in order). `known [R, K, L]` are the drafts, which take their places among what is committed.
        """
        state = self.state
        shift, together = int(self._lm.logits_shift), (shape.rows, shape.drafts, -1)
        alone = shape.forward == shape.window and not shape.whole
        columns = state.columns[: shape.forward if alone else shape.forward + shape.window]
        columns = begin[:, None, None] + columns.expand(*together)
        place = state.columns[: shape.window]
        if alone:
            tokens = known
        else:
            tokens = state.taken(state.tokens, shape)[:, None].expand(*together).gather(2, columns).clamp_(min=0)
            if shape.whole:
                place = (start - begin)[:, None, None] + place
                tokens.scatter_(2, place.expand(*together), known)
            else:
                tokens[..., : shape.window] = known
        positions = columns[..., : shape.forward]
        if alone and not shift:
            return tokens, positions, None
        row = (place - shift if shift else place).clamp(0, shape.forward - 1)
        runs = state.runs[: shape.rows * shape.drafts].view(*together)
        return tokens[..., : shape.forward], positions, torch.add(row, runs, alpha=shape.forward).flatten()

    def _forward(
        self,
        shape: Shape,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        start: torch.Tensor,
        begin: torch.Tensor,
        number: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What logits are made of: features `[n, *]` of the forward's rows."""
        state = self.state
        length = state.taken(state.length, shape)
        seen = length
        if self._settings.cache == "dual" and not shape.whole:  # the block, which may be cut short
            seen = torch.minimum(start + self._size, length)
        attention = WindowAttention(
            drafts=shape.drafts,
            ranges=self._ranges(shape, begin, seen, length),
            window_start=begin,
            slots=state.row if shape.one else None,
            num_drafts=number,
            window_lengths=(seen - begin).clamp(0, shape.forward),
            block_length=self._size if self._lm.attention == "block_causal" else None,
        )
        return self._lm.window_features(tokens.flatten(0, 1), positions.flatten(0, 1), rows, attention)

    def _ranges(self, shape: Shape, begin: torch.Tensor, seen: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The stored positions that a forward sees, `[R, 1 or 2, 2]`: before its own, and with "dual" behind them."""
        state = self.state
        if self._settings.cache == "none" or (self._one_block and shape.whole):
            return state.no_range[: shape.rows]
        bounds = [state.no_range[: shape.rows, 0, 0], begin]
        if self._settings.cache == "dual":
            bounds += [seen, length]
        return torch.stack(bounds, -1).view(shape.rows, -1, 2).int()

    def _advance(
        self,
        shape: Shape,
        window: list[torch.Tensor],
        step: DraftStep,
        drafts: torch.Tensor,
        start: torch.Tensor,
        begin: torch.Tensor,
        number: torch.Tensor,
        place: torch.Tensor | None,
    ) -> None:
        """Keeps the accepted draft's keys and values, slides the window and sets up the next `drafts`.

        A slot without drafts stays as it is: nothing is masked there, so that nothing is drafted, and its window does not
        move.
        """
        state, size, mask = self.state, shape.window, self._lm.mask_token_id
        length = state.taken(state.length, shape)
        committed = drafts[:, 0]
        active = number > 0
        if self._one_block:
            going = (committed == mask).any(1)  # False for slots without drafts: nothing is masked there
            passed = (active & ~going) * size
        else:
            passed = step.prefix_length * active
        if self._settings.cache == "exact":
            self._keep(shape, window, step.accepted, begin, passed + (start - begin) if shape.whole else passed)
        elif self._one_block and shape.whole:
            self._keep(shape, window, step.accepted, begin, length)
        if self._commits and place is not None:
            self._commit(shape, place, committed, active)

        if self._one_block:  # a new block waits for a forward of its own
            following = state.no_block[: shape.rows]
        else:
            columns = start[:, None] + state.columns[size : size + state.window]
            following = state.taken(state.tokens, shape).gather(1, columns)[:, None]
        built = drafts.shape[1]
        drafts = torch.cat([drafts, following.expand(-1, built, -1)], -1)
        source = passed[:, None, None] + state.columns[: state.window]
        state.put(state.drafts[:, :built], drafts.gather(2, source.expand(-1, built, -1)), shape)
        start.add_(passed)
        if not self._one_block:
            going = active & (start < length)
        # A sequence that goes on has draft 0 at least, also where nothing can be drafted from it.
        state.put(state.num_drafts, torch.clamp(step.num_drafts, min=going, max=going * state.most_drafts), shape)
        state.put(state.start, start, shape)
        state.put(state.steps_taken, state.taken(state.steps_taken, shape).add_(step.steps), shape)

    def _commit(self, shape: Shape, place: torch.Tensor, committed: torch.Tensor, active: torch.Tensor) -> None:
        """Writes the window of each active slot."""
        state = self.state
        tokens = state.taken(state.tokens, shape)
        new = torch.where(active[:, None], committed, tokens.gather(1, place))
        state.put(state.tokens, tokens.scatter_(1, place, new), shape)

    def _keep(
        self,
        shape: Shape,
        window: list[torch.Tensor],
        accepted: torch.Tensor,
        begin: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        state = self.state
        keys, values = window
        stored_keys, stored_values = state.stored
        slots = state.row if shape.one else None
        keep(keys, values, accepted, begin, count, stored_keys, stored_values, slots=slots)
