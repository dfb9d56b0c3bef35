"""Which shape a step of the graph executor has. There are few shapes, as each is compiled and captured; where a smaller one
saves time, a step has the smallest that holds what the drafts can reach.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.settings import Settings

# A forward of up to so many tokens takes a GPU little longer than one of a few tokens (H100, 8B: 7.5 against 6.3 ms). Below
# this, another shape with a smaller window saves no time.
_FLAT_TOKENS = 256

# A prompt's part of up to so many tokens is filled up to a power of two, so that its forward is one of a few that come again.
# The arithmetic of a longer one takes longer than its launches: it is as long as it is, and its shape is not kept.
_SHORTEST_PROMPT, _LONGEST_PROMPT = 64, 512


@dataclass(frozen=True)
class Shape:
    """What is fixed in a step: `rows` sequences with K `drafts` each; `forward`, F tokens a draft; `window`, the L
    positions that are predicted. `one`: the step is for a single slot, which the host names. `whole`: the F tokens begin
    where the state's `begin` says, not at the start of the window.
    """

    rows: int
    drafts: int
    forward: int
    window: int
    one: bool = False
    whole: bool = False

    @property
    def tokens(self) -> int:
        """That the model computes."""
        return self.rows * self.drafts * self.forward

    @property
    def static(self) -> bool:
        """Whether the step is static decoding's, which makes no drafts for the next one."""
        return self.drafts == 1 and not self.one

    def __str__(self) -> str:
        kind = "a first forward" if self.one else "step"
        return f"{kind}: {self.rows} x {self.drafts} drafts x {self.forward} tokens, window {self.window}"


@dataclass(frozen=True)
class Shapes:
    """The shapes of decodes with these settings, of `slots` sequences of up to `capacity` positions."""

    settings: Settings
    slots: int
    capacity: int

    @functools.cached_property
    def longest_window(self) -> int:
        """In positions."""
        return self._longest_window(self.settings.draft_steps)

    def _longest_window(self, draft_steps: int) -> int:
        """That of steps with so many drafts."""
        return self.settings.block_length * (
            1 if self.settings.one_block else window_blocks(self.settings, draft_steps)
        )

    def together(self, sequences: list[DeviceSequence], draft_steps: int) -> Shape:
        """One forward for all slots, of which these sequences have drafts, up to `draft_steps` each."""
        settings, longest = self.settings, self._longest_window(draft_steps)
        if settings.choose_drafts and not settings.one_block:
            # A step with more drafts may have committed positions that so few do not reach.
            committed = max(sequence.committed_ahead for sequence in sequences)
            longest = min(max(longest, committed), self.longest_window)
        window = longest
        if not settings.one_block and self.slots * draft_steps * longest > _FLAT_TOKENS:
            window = max(min(sequence.reach_ahead(draft_steps), longest) for sequence in sequences)
            if settings.choose_drafts:  # so that there are few windows for each number of drafts
                blocks = math.ceil(window / settings.block_length)
                window = min(settings.block_length << (blocks - 1).bit_length(), longest)
        forward = window
        if settings.cache == "none":
            forward = self._bucket(max(len(sequence.tokens) for sequence in sequences))
        elif settings.cache == "prefix":
            forward = self._bucket(max(len(sequence.tokens) - sequence.start for sequence in sequences))
        return Shape(self.slots, draft_steps, forward, window, whole=settings.cache == "none")

    def own(self, sequence: DeviceSequence) -> Shape:
        """A sequence's own forward: its prompt, or all of it, and the window's first predictions."""
        window = self.longest_window
        if self.settings.cache == "exact":
            prompt = sequence.start - sequence.stored
            if prompt <= _LONGEST_PROMPT:
                prompt = self._bucket(prompt, _SHORTEST_PROMPT)
            forward = prompt + window
        else:
            forward = self._bucket(len(sequence.tokens))
        return Shape(1, 1, forward, window, one=True, whole=True)

    def carries_prompt(self, shape: Shape) -> bool:
        """Whether it is a sequence's first forward, not that of a later block."""
        return shape.one and self.settings.cache == "exact"

    def comes_again(self, shape: Shape) -> bool:
        """Whether another sequence may need it."""
        return not self.carries_prompt(shape) or shape.forward - shape.window <= _LONGEST_PROMPT

    def _bucket(self, length: int, least: int = 16) -> int:
        """A power of two, so that there are few shapes; no more than a slot has."""
        return min(max(least, 1 << (length - 1).bit_length()), self.capacity)


def window_blocks(settings: Settings, draft_steps: int) -> int:
    """Blocks that so many drafts, and the drafts made from any of them, can reach when one position of the first is left; no
    more than an answer has. Pooled drafts go on as far as the window does: as far as the planned executor's.
    """
    steps = draft_steps + min(settings.lookahead_steps, draft_steps)
    if settings.pooled:
        reached = settings.drafted_length(draft_steps) // settings.block_length
    elif settings.threshold is None:
        reached = 1 + math.ceil((steps * settings.tokens_per_step - 1) / settings.block_length)
    else:  # the first step may fill a block, each further one a position
        reached = 2 + math.ceil(steps / settings.block_length)
    # With blocks aligned at position 0, all but the last position of the first block may belong to the prompt.
    before = settings.block_length - 1 if settings.aligned_at_zero else 0
    return min(reached, math.ceil((before + settings.max_new_tokens) / settings.block_length))
