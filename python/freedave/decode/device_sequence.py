"""A sequence whose drafts stay on the device: the host knows what is committed, and how many drafts there are."""

from __future__ import annotations

import math

from freedave.decode.sequence import NUM_DRAFTS, Sequence
from freedave.decode.settings import MORE_BLOCKS, Settings


class DeviceSequence(Sequence):
    """`num_drafts`: how many drafts its next forward may have. `forwarded`: how many the step under way has.
    `stored`: positions of the prompt whose keys and values are stored.
    `waits`: its next forward is for this sequence alone, with a part of the prompt or with the whole sequence; until then it
    takes no part in the steps of all slots.
    """

    def __init__(
        self, index: int, slot: int, prompt: list[int], settings: Settings, mask_token_id: int, key: int = 0
    ) -> None:
        super().__init__(index, slot, prompt, settings, mask_token_id, key)
        self.num_drafts = self.forwarded = 1
        self.stored = 0
        self.waits = settings.cache != "none"

    def advance(self, committed: list[int], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """Commits the next draft 0 and moves the window, as the device has done; returns the positions that were committed.

        `record` holds the counters of `draft_step`.
        """
        committed = committed[: len(self.tokens) - self.start]  # a window may be longer than what is left
        new = self.commit(committed, record, step_map, forward)
        if not self.finished:
            passed = self.passed(committed, record)
            self.refresh = passed > 0
            self.waits = self.one_block and self.refresh
            self.start += passed
            self.num_drafts = max(record[NUM_DRAFTS], 1)
        return new

    @property
    def committed_ahead(self) -> int:
        """How many positions from the window's start on hold all that is committed, in whole blocks: through the first one
        that is not complete."""
        return self.reach(self.tokens[self.start :], 1)

    def reach_ahead(self, draft_steps: int) -> int:
        """How many positions from the window's start on up to `draft_steps` drafts, and the drafts made from any of them, can
        get to."""
        state = self.tokens[self.start :]
        ahead = min(self._settings.lookahead_steps, draft_steps)
        if self._settings.pooled:
            return self._reach_pooled(state, draft_steps + ahead)
        steps = min(self.num_drafts, draft_steps) - 1 + ahead
        blocks = 0 if self._settings.threshold is None else 1  # any draft's own first step may fill a block
        return min(self.reach(state, steps) + blocks * self._settings.block_length, len(state))

    def _reach_pooled(self, state: list[int], steps: int) -> int:
        """The same where drafts are pooled: what `Settings.drafted_length` allows from this state, in whole blocks.

        A window may be too short for what a draft has filled, or for all that the pool knows. Then it shows another draft, or
        ends with a state that was not forwarded yet; both cost a forward at most.
        """
        settings, size = self._settings, self._settings.block_length
        # Steps that begin within a block end one block further than steps from its start, so that is one of "more blocks".
        reached = math.ceil(self.reach(state, steps) / size)
        return (reached + MORE_BLOCKS[settings.drafting] - 1) * size
