"""One sequence between two forwards, on the host: what is final, where the window stands and where the answer ends.

Executors add what they know of its drafts (`planned_sequence.py`, `device_sequence.py`).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from freedave.decode.output import NonFiniteLogitsError
from freedave.decode.settings import Settings
from freedave_kernels.contract import COUNTERS

ACCEPTED, STEPS, PREFIX_LENGTH, NON_FINITE, NUM_DRAFTS = (
    COUNTERS.index(name) for name in ("accepted", "steps", "prefix_length", "non_finite", "num_drafts")
)

T = TypeVar("T")

# The confidence of a position that has to rank first: with shifted logits a block's first one is committed by its refresh.
RANKS_FIRST = torch.finfo(torch.float32).max


class Sequence:
    """A sequence that is being decoded, on the host: a few hundred integers.

    `tokens`, `step_map` and `forward_map` cover the prompt and every block that will be decoded. The window begins at `start`
    with the block that is decoded now. `refresh` says that it has moved to a block of which nothing is committed.

    An answer ends behind its first end token or stop sequence, once the block in which it stands is finished, or at `end`.
    `answer_end` is that position as far as it is known: what is committed behind it is no part of the answer, though the rest
    of its block still depends on it. Nothing in the prompt ends an answer. `error` says why a sequence was given up. `key` is
    what its noise follows from, where tokens are drawn with a `temperature` above 0. `log_probs` covers the same positions,
    NaN where nothing is committed or nobody asked. `least_confidence`: the threshold, as confidences are measured.
    `pooled_end`: the end token behind which pooled drafts need not go.
    """

    def __init__(
        self, index: int, slot: int, prompt: list[int], settings: Settings, mask_token_id: int, key: int = 0
    ) -> None:
        self.index = index
        self.key = key
        self.temperature = settings.temperature
        self.slot = slot
        self.prompt_length = len(prompt)
        self.end = len(prompt) + settings.max_new_tokens
        self.total = settings.max_new_tokens
        self._settings = settings
        self._mask = mask_token_id
        self.one_block = settings.one_block
        self.pooled_end = settings.pooled_end
        self.least_confidence = settings.least_confidence

        missing = settings.sequence_length(len(prompt)) - len(prompt)
        self.tokens = prompt + [mask_token_id] * missing
        self.step_map = [-1] * len(self.tokens)
        self.forward_map = [-1] * len(self.tokens)
        self.log_probs = [math.nan] * len(self.tokens)
        self.steps_taken = 0
        self.accepted_lengths: list[int] = []
        self.finished = False
        self.error: NonFiniteLogitsError | None = None
        self.answer_end = self.end
        self._unchecked = settings.first_block(len(prompt))

        self.start = settings.first_block(len(prompt))
        self.refresh = True

    @property
    def committed(self) -> int:
        """How many positions of the answer are committed."""
        steps = self.step_map[self.prompt_length : self.answer_end]
        return len(steps) - steps.count(-1)

    @property
    def final(self) -> int:
        """How many tokens the answer begins with that are final: up to the first position that is not committed.

        An end token or a stop sequence that is found later stands behind them.
        """
        steps = self.step_map[self.prompt_length : self.answer_end]
        return steps.index(-1) if -1 in steps else len(steps)

    def generated(self, values: list[T]) -> list[T]:
        """The part of `tokens`, `step_map`, `forward_map` or `log_probs` that belongs to the answer."""
        return values[self.prompt_length : self.end]

    def note(self, first: int, positions: list[int], log_probs: list[float]) -> None:
        """Keeps the log-probabilities, of a window that began at `first`, of positions that were committed."""
        for position in positions:
            self.log_probs[position] = log_probs[position - first]

    def commit(self, committed: list[int], record: list[int], step_map: list[int], forward: int) -> list[int]:
        """Writes what a forward proved of the window, the next draft 0, and ends the sequence where it ends.

        What follows the end of an answer is filled with the first end token (where there is none, the mask token), as if it
        had never been computed: the rest of a block, and blocks that drafts ran ahead into but static decoding never starts.

        `record` holds the counters of `draft_step`. Returns the positions that were committed.
        """
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

    def fail(self, position: int, forward: int) -> None:
        """Gives the sequence up, because the logits of a window's `position` were not finite; nothing more is committed."""
        self.error = NonFiniteLogitsError(
            f"sequence {self.index}: the logits of position {self.start + position} are not finite (forward {forward}); "
            "check the weights and the dtype of the model",
            [self.index],
        )
        self.accepted_lengths.append(0)
        self.finished = True

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
        self.log_probs[self.answer_end :] = [math.nan] * rest

    def passed(self, committed: list[int], record: list[int]) -> int:
        """Positions at the window's start that need no further forward.

        With an exact cache, the accepted draft's complete blocks, whose keys and values the last forward computed. "prefix"
        and "dual" compute a block anew once it is complete.
        """
        if not self.one_block:
            return min(record[PREFIX_LENGTH], len(committed))
        if self._mask not in committed:
            return len(committed)
        return committed.index(self._mask) // self._settings.block_length * self._settings.block_length

    def reach(self, state: list[int], most_steps: int) -> int:
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
