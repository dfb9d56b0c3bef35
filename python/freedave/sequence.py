"""One sequence between two forwards: what is final, and the drafts of the window that the next forward covers."""

from __future__ import annotations

import math

from freedave.settings import Settings
from freedave_kernels.ops.draft_step import COUNTERS

ACCEPTED, STEPS, PREFIX_LENGTH, NON_FINITE, NUM_DRAFTS = (
    COUNTERS.index(name) for name in ("accepted", "steps", "prefix_length", "non_finite", "num_drafts")
)


class Sequence:
    """A sequence that is being decoded, on the host: a few hundred integers.

    `tokens`, `step_map` and `forward_map` cover the prompt and every block that will be decoded. The window is
    `start ... start + length - 1`: the current block and those further blocks that the drafts, or the drafts made from any
    of them, can reach. `states` are the drafts to be forwarded, `reach[j]` how many positions of draft j its own next
    drafts can depend on. `refresh` says that the window has moved to a block of which nothing is committed.

    An answer ends behind its first end token or stop sequence, once the block in which it stands is finished, or at `end`.
    `answer_end` is that position as far as it is known: what is committed behind it is no part of the answer, though the rest
    of its block still depends on it. Nothing in the prompt ends an answer.

    Policies of full attention (`settings.cache` "prefix" and "dual") prove one block a cache, so their windows end with
    the next block, and only drafts with something left to fill in the current one are forwarded.
    """

    def __init__(self, index: int, slot: int, prompt: list[int], settings: Settings, mask_token_id: int) -> None:
        self.index = index
        self.slot = slot
        self.prompt_length = len(prompt)
        self.end = len(prompt) + settings.max_new_tokens
        self.total = settings.max_new_tokens
        self._settings = settings
        self._mask = mask_token_id
        self._one_block = settings.cache in ("prefix", "dual")

        missing = settings.sequence_length(len(prompt)) - len(prompt)
        self.tokens = prompt + [mask_token_id] * missing
        self.step_map = [-1] * len(self.tokens)
        self.forward_map = [-1] * len(self.tokens)
        self.steps_taken = 0
        self.accepted_lengths: list[int] = []
        self.finished = False
        self.answer_end = self.end
        self._unchecked = settings.first_block(len(prompt))

        # The first forward has one "draft": the state with nothing generated, which is right by definition.
        self.start = settings.first_block(len(prompt))
        self.refresh = True
        self.num_drafts = 1
        self._open_window([self.tokens[self.start : self.start + settings.block_length]])

    @property
    def length(self) -> int:
        """Positions of the window."""
        return len(self.states[0])

    @property
    def committed(self) -> int:
        """How many positions of the answer are committed."""
        steps = self.step_map[self.prompt_length : self.answer_end]
        return len(steps) - steps.count(-1)

    def generated(self, values: list[int]) -> list[int]:
        """The part of `tokens`, `step_map` or `forward_map` that belongs to the answer."""
        return values[self.prompt_length : self.end]

    def advance(self, drafts: list[list[int]], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """Commits what a forward proved and moves the window; returns the positions that were committed.

        What follows the end of an answer is filled with the first end token (where there is none, the mask token), as if it
        had never been computed: the rest of a block, and blocks that drafts ran ahead into but static decoding never starts.

        `drafts` are the next drafts over the window, `record` holds the counters of `draft_step`.
        """
        length = self.length
        committed = drafts[0][:length]
        new = self.commit(committed, record, step_map, forward)
        if not self.finished:
            passed = self._passed(committed, record)
            self.refresh = passed > 0
            self.start += passed
            self._open_window([draft[passed:length] for draft in drafts[: max(record[NUM_DRAFTS], 1)]])
        return new

    def commit_on_device(self, committed: list[int], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """As `advance`, where the drafts stay on the device: the window moves, and what the next drafts are is not known."""
        committed = committed[
            : len(self.tokens) - self.start
        ]  # a window of a fixed length may be longer than what is left
        new = self.commit(committed, record, step_map, forward)
        if not self.finished:
            passed = self._passed(committed, record)
            self.refresh = self._one_block and passed > 0
            self.start += passed
            self.num_drafts = max(record[NUM_DRAFTS], 1)
        return new

    def reach_ahead(self) -> int:
        """How many positions from the window's start on the drafts, and the drafts made from any of them, can get to."""
        state = self.tokens[self.start :]
        steps = self.num_drafts - 1 + self._settings.lookahead_steps
        blocks = 0 if self._settings.threshold is None else 1  # any draft's own first step may fill a block
        return min(self._reach(state, steps) + blocks * self._settings.block_length, len(state))

    def _passed(self, committed: list[int], record: list[int]) -> int:
        return min(self._complete(committed) if self._one_block else record[PREFIX_LENGTH], len(committed))

    def commit(self, committed: list[int], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """Writes what a forward proved of the window, and ends the sequence where it ends."""
        start, length = self.start, len(committed)
        new = [start + i for i, step in enumerate(step_map[:length]) if step >= 0]
        self.tokens[start : start + length] = committed
        for position in new:
            self.step_map[position] = step_map[position - start]
            self.forward_map[position] = forward
        self.accepted_lengths.append(record[STEPS])
        self.steps_taken += record[STEPS]

        self.finished = self._is_finished()
        if self.finished:
            self._fill_rest()
        return [position for position in new if position < self.answer_end]

    def _is_finished(self) -> bool:
        """Whether nothing is left to decode; finds `answer_end`, and looks at each finished block once."""
        while self._unchecked < self.end:
            begin, end = self._unchecked, min(self._unchecked + self._settings.block_length, self.end)
            complete = self._mask not in self.tokens[begin:end]
            found = self._end_between(max(begin, self.prompt_length), end)
            if found is not None:
                self.answer_end = found
                return complete
            if not complete:
                return False
            self._unchecked = end
        return True

    def _end_between(self, begin: int, end: int) -> int | None:
        """One after the first end token, or the last token of the first stop sequence, among positions `begin ... end - 1`.

        A stop sequence may have begun in an earlier block, but not in the prompt.
        """
        for position in range(begin, end):
            if self.tokens[position] in self._settings.eos_token_ids:
                return position + 1
            for stop in self._settings.stop_sequences:
                first = position + 1 - len(stop)
                if first >= self.prompt_length and tuple(self.tokens[first : position + 1]) == stop:
                    return position + 1
        return None

    def _fill_rest(self) -> None:
        """Leaves nothing of what was decoded behind the end of the answer."""
        rest = len(self.tokens) - self.answer_end
        self.tokens[self.answer_end :] = [(*self._settings.eos_token_ids, self._mask)[0]] * rest
        self.step_map[self.answer_end :] = [-1] * rest
        self.forward_map[self.answer_end :] = [-1] * rest

    def _complete(self, state: list[int]) -> int:
        """Positions in the leading complete blocks of a window's state."""
        if self._mask not in state:
            return len(state)
        return state.index(self._mask) // self._settings.block_length * self._settings.block_length

    def _open_window(self, drafts: list[list[int]]) -> None:
        """The window from `start` for active `drafts`, as long as their next drafts need."""
        size = self._settings.block_length
        fresh = [self._mask] * (len(self.tokens) - self.start - len(drafts[0]))
        if self._one_block:
            del fresh[max(2 * size - len(drafts[0]), 0) :]
        states = [draft + fresh for draft in drafts]
        reach = [self._reach(state, self._settings.lookahead_steps) for state in states]
        length = reach[-1]  # the last draft is the furthest
        # A finished draft predicts nothing.
        open_until = size if self._one_block else length
        self.states = [state[:length] for state in states if self._mask in state[:open_until]]
        self.reach = [min(end, length) for end in reach[: len(self.states)]]

    def _reach(self, state: list[int], most_steps: int) -> int:
        """How far `most_steps` static steps from `state` can get: to the end of the block that the last of them fills."""
        settings = self._settings
        length, steps = 0, 0
        while length < len(state) and steps < most_steps:
            in_block = state[length : length + settings.block_length].count(self._mask)
            length = min(length + settings.block_length, len(state))
            if settings.threshold is None:
                steps += math.ceil(in_block / settings.tokens_per_step)
            else:  # the first step may fill a whole block, each further one fills one position
                steps += in_block if steps else min(in_block, 1)
        return length
