"""Cache policies: which tokens a forward computes for the drafts of a sequence, and what it leaves in the cache.

A policy is part of the definition of static decoding wherever it is an approximation ("prefix", "dual"); the drafts of
FreeDave are computed exactly as static decoding would compute them.

What "prefix" and "dual" compute, for full attention (worked out from decodes of the public implementations):

- A block begins with a *refresh*: one forward of the whole sequence, with the block and all after it masked. Its
  predictions commit the block's first static step; its keys and values are stored.
- All further steps of the block compute the block alone ("dual"), or everything from the block's start on ("prefix"), and
  attend to the stored keys and values of everything else.
- With shifted logits (Dream), the refresh commits the block's *first position*, whatever its confidence: the row that
  predicts it lies before the block and is not computed again until the next refresh. We let that position rank first and
  keep all other rules, so `tokens_per_step` and `threshold` commit further positions in the same step. With shifted logits
  and block-causal attention (Fast-dLLM v2) a block's first position ranks first as well, whatever the cache: the row that
  predicts it does not see its block, so that nothing which is committed there can change the prediction.

A refresh proves drafts as well: those of the new block ride along and attend, layer by layer, to the keys and values that the
refresh has just stored. What they are drafted from are predictions of the next block by the last forwards of the block
before; with "dual" these compute the next block as well, once drafts can reach it, as queries that the block does not see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Protocol

import torch

from freedave.decode.outlook import Outlook, outlook
from freedave.decode.planned_sequence import PlannedSequence
from freedave.decode.sequence import RANKS_FIRST
from freedave.decode.settings import Settings
from freedave.forward.cache import KeyValueCache
from freedave.forward.packed_forward import ForwardBuilder
from freedave.forward.segments import Segments, plan_segments


class CachePolicy(Protocol):
    """How the drafts of one sequence are computed."""

    def prompt_tokens(self, sequence: PlannedSequence) -> int:
        """How many tokens the next forward computes only to store them: those of a prompt that the drafts attend to."""

    def predicts(self, sequence: PlannedSequence) -> bool:
        """Whether the next forward predicts the drafts; if not, it is one of those that only store a part of the prompt."""

    def plan_chunk(self, sequence: PlannedSequence, builder: ForwardBuilder) -> None:
        """Adds that part of the prompt to the next forward."""

    def plan(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        """Adds the sequence's runs and predictions to the next forward."""

    def outlook(self, sequence: PlannedSequence, head_share: float) -> Outlook:
        """What the next forward would compute, for any number of the drafts in hand; its prompt apart."""

    def rank(self, sequence: PlannedSequence, confidence: torch.Tensor) -> None:
        """Changes the confidences `[J, L]` of a sequence in place, where the policy decides what is committed first."""

    def kept(self, accepted: int, count: int) -> list[int]:
        """Retained tokens of the last forward whose keys and values are those of the window's first `count` positions."""


def masked_positions(state: list[int], mask_token_id: int, end: int) -> list[int]:
    """Positions below `end` that are masked."""
    return [i for i, token in enumerate(state[:end]) if token == mask_token_id]


def rank_blocks_first(confidence: torch.Tensor, block_length: int) -> None:
    """Lets the first position of every block of windows `[..., L]` rank first in it, where it is predicted; in place."""
    firsts = confidence[..., ::block_length]
    firsts.masked_fill_(firsts > float("-inf"), RANKS_FIRST)


def _outlook(sequence: PlannedSequence, first: int, whole: int | None, most_behind: int, head_share: float) -> Outlook:
    """`first` and `whole` as in `Outlook`; complete blocks at the window's start are added to `first` where blocks count."""
    block, mask, state = sequence.block_length, sequence.mask_token_id, sequence.drafts[0]
    if mask in state:
        begin = state.index(mask) // block * block
        now = state[begin : begin + block].count(mask)
        behind = state.count(mask) - now + len(sequence.tokens) - sequence.start - len(state)
    else:
        begin, behind = len(state), len(sequence.tokens) - sequence.start - len(state)
        now = min(behind, block)
        behind -= now
    drafts = len(sequence.drafts)
    if drafts > 1 and mask not in sequence.drafts[-1] and not behind:
        drafts -= 1  # it is complete, and not forwarded
    if sequence.one_block:  # nor are those that are complete in their block
        drafts = min(drafts, math.ceil(now / sequence.tokens_per_step))
    return outlook(
        drafts,
        now,
        min(behind, most_behind),
        block,
        sequence.tokens_per_step,
        first if whole is not None else begin,
        whole,
        head_share,
        sequence.more_blocks,
    )


class ExactCache:
    """Block-causal attention: only the segments of the window are computed, and finished blocks are stored.

    The prompt's complete blocks are stored by the first forward that predicts, or, where they are more than
    `blocks_per_chunk`, in chunks of that many, one a forward, and only the last chunk by the forward that predicts. Where a
    chunk ends depends on the prompt alone, so that its keys and values do not depend on what else is decoded.

    With shifted logits, a block's first position is predicted by the last row of the block before, and committed first. That
    row is always computed: a window moves to the next block only with a forward in which the block was complete, and what
    that forward predicted of the next block's first position is committed with it.
    """

    def __init__(self, block_length: int, mask_token_id: int, blocks_per_chunk: int | None, logits_shift: bool) -> None:
        self._size = block_length
        self._mask = mask_token_id
        self._shift = int(logits_shift)
        self._chunk = None if blocks_per_chunk is None else blocks_per_chunk * block_length
        self._segments = Segments([], [], [], [])
        self._first_token: list[int] = []
        self._stored = 0

    def prompt_tokens(self, sequence: PlannedSequence) -> int:
        missing = self._whole_blocks(sequence) - self._stored
        return missing if self._chunk is None else min(missing, self._chunk)

    def predicts(self, sequence: PlannedSequence) -> bool:
        return self._stored + self.prompt_tokens(sequence) == self._whole_blocks(sequence)

    def _whole_blocks(self, sequence: PlannedSequence) -> int:
        """The prompt's tokens in complete blocks."""
        return sequence.prompt_length // self._size * self._size

    def plan_chunk(self, sequence: PlannedSequence, builder: ForwardBuilder) -> None:
        self._plan_prompt(sequence, self.prompt_tokens(sequence), [], builder)

    def plan(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        count = self.prompt_tokens(sequence)
        if count:  # the forward that stores the prompt's last blocks predicts, too
            state = sequence.states[0]
            begin = self._plan_prompt(sequence, count, state, builder)
            masked = masked_positions(state, self._mask, len(state))
            builder.predict(batch_index, 0, masked, [begin + count + i - self._shift for i in masked])
        else:
            self._plan_segments(sequence, batch_index, builder)

    def _plan_prompt(self, sequence: PlannedSequence, count: int, behind: list[int], builder: ForwardBuilder) -> int:
        """The prompt's next `count` tokens, which are stored, and what comes behind them; returns the first token."""
        first, end = self._stored, self._stored + count
        tokens = sequence.tokens[first:end] + behind
        begin = builder.add([tokens], first, block_length=self._size)
        builder.attend(begin, 1, len(tokens), sequence.slot, [(0, first)])
        builder.store(begin, count, sequence.slot, first)
        self._stored = end
        return begin

    def _plan_segments(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        size = self._size
        assert not self._shift or sequence.states[0][0] != self._mask  # see the class
        self._segments = segments = plan_segments(sequence.states, sequence.reach_of, size, self._mask)
        # Segments of the same block have chains of the same length: they are placed side by side, as one group.
        order = sorted(range(len(segments.block)), key=segments.block.__getitem__)
        whole, rest = divmod(sequence.length, size)
        place = [0] * len(order)
        builder.retain_from(builder.tokens)
        self._plan_blocks(sequence, batch_index, builder, [s for s in order if segments.block[s] < whole], size, place)
        if rest:  # the sequence's last block, where the model's positions end within it
            short = [s for s in order if segments.block[s] == whole]
            self._plan_blocks(sequence, batch_index, builder, short, rest, place)
        self._first_token = [token - builder.retained for token in place]

    def _plan_blocks(
        self,
        sequence: PlannedSequence,
        batch_index: int,
        builder: ForwardBuilder,
        members: list[int],
        length: int,
        place: list[int],
    ) -> None:
        """Adds segments of one length, in order of their blocks; notes in `place` where each one begins."""
        if not members:
            return
        segments, size, first = self._segments, self._size, builder.tokens
        for n, s in enumerate(members):
            place[s] = first + n * length
        for block, group in itertools.groupby(members, key=segments.block.__getitem__):
            alike, begin = list(group), block * size
            keys = None
            if block:  # the segments before the last one of a chain are whole blocks, the last one has `length`
                keys = [
                    key
                    for s in alike
                    for c in segments.chain[s]
                    for key in range(place[c], place[c] + (length if c == s else size))
                ]
            runs = [sequence.states[segments.draft[s]][begin : begin + length] for s in alike]
            builder.add(runs, sequence.start + begin, keys=keys)
        first_places = [(segments.draft[s], segments.block[s] * size) for s in members]
        rows_before = None
        if self._shift:
            # Nothing is before the window's first block, whose first position is committed already.
            chains = [segments.chain[s] for s in members]
            rows_before = [place[chain[-2]] + size - 1 if len(chain) > 1 else place[chain[-1]] for chain in chains]
        builder.predict_masked(batch_index, first, first_places, length, self._mask, rows_before)
        builder.attend(first, len(members), length, sequence.slot, [(0, sequence.start)])

    def outlook(self, sequence: PlannedSequence, head_share: float) -> Outlook:
        return _outlook(sequence, 0, None, sequence.furthest, head_share)

    def rank(self, sequence: PlannedSequence, confidence: torch.Tensor) -> None:
        if self._shift:
            rank_blocks_first(confidence, self._size)

    def kept(self, accepted: int, count: int) -> list[int]:
        segments = self._segments.of_draft[accepted][: count // self._size] if count else []
        return [self._first_token[s] + i for s in segments for i in range(self._size)]


class _WholeSequences:
    """A policy that computes whole sequences: their prompts cannot be computed ahead of them."""

    def prompt_tokens(self, sequence: PlannedSequence) -> int:
        return 0

    def predicts(self, sequence: PlannedSequence) -> bool:
        return True

    def plan_chunk(self, sequence: PlannedSequence, builder: ForwardBuilder) -> None:
        raise AssertionError("every forward predicts")


class NoCache(_WholeSequences):
    """The whole sequence in every forward: exact for any attention."""

    def __init__(self, block_length: int | None, mask_token_id: int, logits_shift: bool) -> None:
        self._block_length = block_length
        self._mask = mask_token_id
        self._shift = int(logits_shift)

    def plan(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        start, end = sequence.start, sequence.start + sequence.length
        before, after = sequence.tokens[:start], sequence.tokens[end:]
        for drafts in builder.divide(range(len(sequence.states)), len(sequence.tokens)):
            runs = [before + sequence.states[j] + after for j in drafts]
            begin = builder.add(runs, 0, block_length=self._block_length)
            for n, j in enumerate(drafts):
                masked = masked_positions(sequence.states[j], self._mask, sequence.reach_of[j])
                row = begin + n * len(sequence.tokens)
                builder.predict(batch_index, j, masked, [row + max(start + i - self._shift, 0) for i in masked])

    def outlook(self, sequence: PlannedSequence, head_share: float) -> Outlook:
        length = len(sequence.tokens)
        return _outlook(sequence, length, length, sequence.furthest, head_share)

    def rank(self, sequence: PlannedSequence, confidence: torch.Tensor) -> None:
        if self._shift and self._block_length is not None:
            rank_blocks_first(confidence, self._block_length)

    def kept(self, accepted: int, count: int) -> list[int]:
        return []


class BlockRefresh(_WholeSequences):
    """Full attention with "prefix" or "dual": see the module's docstring."""

    def __init__(self, block_length: int, mask_token_id: int, logits_shift: bool, *, dual: bool) -> None:
        self._size = block_length
        self._mask = mask_token_id
        self._shift = int(logits_shift)
        self._dual = dual

    def plan(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        drafts = range(len(sequence.states))
        if sequence.refresh:
            self._plan_refresh(sequence, batch_index, builder)
            drafts = drafts[1:]
        if drafts:
            # "dual" computes the window alone: the block, and the next one where a draft can reach it.
            length = sequence.length if self._dual else len(sequence.tokens) - sequence.start
            for group in builder.divide(drafts, length):
                self._plan_drafts(sequence, batch_index, builder, group)

    def _plan_drafts(
        self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder, drafts: Collection[int]
    ) -> None:
        start, stop = sequence.start, len(sequence.tokens)
        after = sequence.tokens[start + sequence.length :]
        end = min(start + self._size, stop) if self._dual else stop
        length = end - start
        begin = builder.add([(sequence.states[j] + after)[:length] for j in drafts], start)
        builder.attend(begin, len(drafts), length, sequence.slot, [(0, start), (end, stop)])
        for n, j in enumerate(drafts):
            # With shifted logits, a run's last row predicts the position behind it. No row predicts its first position,
            # which the refresh has committed.
            masked = masked_positions(sequence.states[j], self._mask, min(sequence.reach_of[j], length + self._shift))
            builder.predict(batch_index, j, masked, [begin + n * length + i - self._shift for i in masked])
        if self._dual:
            runs = {j: begin + n * length for n, j in enumerate(drafts)}
            self._plan_next_block(sequence, batch_index, builder, runs)

    def _plan_next_block(
        self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder, runs: dict[int, int]
    ) -> None:
        """Predicts the next block for drafts that can reach it; their blocks, from token `runs[j]` on, do not see it."""
        size, stop = self._size, len(sequence.tokens)
        begin, end = sequence.start + size, min(sequence.start + 2 * size, stop)
        length = end - begin
        drafts = [j for j in runs if sequence.reach_of[j] > size]
        if not drafts:
            return
        first = builder.tokens
        keys: list[int] = []
        for n, j in enumerate(drafts):
            own = first + n * length
            keys += [*range(runs[j], runs[j] + size), *range(own, own + length)]
            masked = range(size + self._shift, size + length)
            builder.predict(batch_index, j, masked, [own + i - size - self._shift for i in masked])
        builder.add([sequence.tokens[begin:end]] * len(drafts), begin, keys=keys)
        builder.attend(first, len(drafts), length, sequence.slot, [(0, sequence.start), (end, stop)])

    def _plan_refresh(self, sequence: PlannedSequence, batch_index: int, builder: ForwardBuilder) -> None:
        start, stop, state = sequence.start, len(sequence.tokens), sequence.states[0]
        end = min(start + self._size, stop)
        builder.make_room(stop)
        begin = builder.add([sequence.tokens[:start] + state + sequence.tokens[start + len(state) :]], 0)
        builder.store(begin, start, sequence.slot, 0)
        if self._dual:
            builder.store(begin + end, stop - end, sequence.slot, end)
        masked = masked_positions(state, self._mask, sequence.reach_of[0])
        builder.predict(batch_index, 0, masked, [begin + max(start + i - self._shift, 0) for i in masked])

    def outlook(self, sequence: PlannedSequence, head_share: float) -> Outlook:
        whole = len(sequence.tokens) if sequence.refresh else 0
        each = self._size if self._dual else len(sequence.tokens) - sequence.start
        return _outlook(sequence, whole or each, each, self._size, head_share)

    def rank(self, sequence: PlannedSequence, confidence: torch.Tensor) -> None:
        if self._shift:
            rank_blocks_first(confidence, self._size)

    def kept(self, accepted: int, count: int) -> list[int]:
        return []


def policy_for(settings: Settings, mask_token_id: int, *, block_causal: bool, logits_shift: bool) -> CachePolicy:
    """The policy of one sequence."""
    cache, block_length = settings.cache, settings.block_length
    if cache == "exact":
        return ExactCache(block_length, mask_token_id, settings.blocks_per_chunk, logits_shift)
    if cache == "none":
        return NoCache(block_length if block_causal else None, mask_token_id, logits_shift)
    return BlockRefresh(block_length, mask_token_id, logits_shift, dual=cache == "dual")


def new_cache(cache: str, slots: int, capacity: int) -> KeyValueCache | None:
    """The buffers that a policy needs for `slots` sequences of up to `capacity` positions."""
    return None if cache == "none" else KeyValueCache(slots, capacity)
