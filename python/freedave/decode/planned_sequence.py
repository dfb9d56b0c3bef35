"""A sequence whose forwards are planned on the host, which therefore knows its drafts."""

from __future__ import annotations

from freedave.decode.sequence import NUM_DRAFTS, Sequence
from freedave.decode.settings import MORE_BLOCKS, Settings


class PlannedSequence(Sequence):
    """`drafts` are those in hand, as they were made. `open_window` decides how many of them are forwarded, and how far ahead:
    `states` are the drafts to be forwarded, each over the whole window; `reach_of[j]` says how many positions of draft j
    have to be predicted: its next drafts cannot depend on those behind. Behind the current block drafts may have to do with
    `furthest` positions; the first of several pooled drafts shows `more_blocks` (None: drafts are not pooled).

    The window is `start ... start + length - 1`: the current block and those further blocks that the drafts, or the drafts
    made from any of them, can reach. Policies of full attention ("prefix" and "dual") prove one block a cache, so their
    windows end with the next block, and only drafts with something left to fill in the current one are forwarded.

    Where drafts are pooled, a window may begin with complete blocks. The step that finished them went through states of
    earlier forwards, so that their keys and values are computed with the next drafts, all of which begin with these blocks.
    """

    def __init__(
        self, index: int, slot: int, prompt: list[int], settings: Settings, mask_token_id: int, key: int = 0
    ) -> None:
        super().__init__(index, slot, prompt, settings, mask_token_id, key)
        # The first forward has one "draft": the state with nothing generated, which is right by definition.
        self.drafts = [self.tokens[self.start : self.start + settings.block_length]]
        self.states: list[list[int]] = []
        self.reach_of: list[int] = []
        self.block_length = settings.block_length
        self.tokens_per_step = settings.tokens_per_step
        self.mask_token_id = mask_token_id
        pooled = settings.pooled and not self.one_block
        self.more_blocks = MORE_BLOCKS[settings.drafting] if pooled else None
        steps = (2 * settings.draft_steps + settings.lookahead_steps) * settings.tokens_per_step
        self.furthest = steps + 6 * settings.block_length

    @property
    def length(self) -> int:
        """Positions of the window."""
        return len(self.states[0])

    def advance(self, drafts: list[list[int]], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """Commits what a forward proved and moves the window; returns the positions that were committed.

        `drafts` are the next drafts over the window, `record` holds the counters of `draft_step`.
        """
        length = self.length
        committed = drafts[0][:length]
        new = self.commit(committed, record, step_map, forward)
        if not self.finished:
            passed = self.passed(committed, record)
            self.refresh = passed > 0
            self.start += passed
            self.drafts = [draft[passed:length] for draft in drafts[: max(record[NUM_DRAFTS], 1)]]
        return new

    def open_window(self, count: int, lookahead: int, shown: int) -> None:
        """The window from `start` for the first `count` drafts in hand, as long as their next `lookahead` steps need.

        Where drafts are pooled, and `shown` is more than 1, it is as long as so many drafts can make use of.
        """
        size, drafts = self._settings.block_length, self.drafts[:count]
        fresh = [self._mask] * (len(self.tokens) - self.start - len(drafts[0]))
        if self.one_block:
            del fresh[max(2 * size - len(drafts[0]), 0) :]
        states = [draft + fresh for draft in drafts]
        reach = [self.reach(state, lookahead) for state in states]
        length = reach[-1]  # drafts are nested, so the last one reaches furthest
        if self._settings.pooled and shown > 1 and not self.one_block:
            # Draft 0 says what to expect wherever a walk may lead, and shows it the whole window.
            length = reach[0] = max(self._pooled_length(states[0], shown), length)
        # A draft without masks predicts nothing, so it is not forwarded.
        open_until = size if self.one_block else length
        self.states = [state[:length] for state in states if self._mask in state[:open_until]]
        self.reach_of = [min(end, length) for end in reach[: len(self.states)]]

    def _pooled_length(self, state: list[int], count: int) -> int:
        """The length of a window in which up to `count` pooled drafts go on from `state`, to which it is open."""
        settings, size = self._settings, self._settings.block_length
        complete = state.index(self._mask) // size * size
        reached = self.reach(state, 2 * count) + (MORE_BLOCKS[settings.drafting] - 1) * size
        return min(reached, complete + settings.drafted_length(count), len(state))
