"""What a sequence's next forward would compute, and how many drafts there would be for the one after it, for any number of
drafts and any lookahead: in numbers alone, without planning each of these forwards.

Drafts fill blocks one after the other, so both depend only on how many positions are open, and where.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from freedave.decode.acceptance import sums


class Expected(NamedTuple):
    """`reached[j]`: how likely draft j of a chain is right. `useful[j]`: how many static steps it brings. `worth[n]`: of
    having n drafts, in steps; more are worth what the last entry says."""

    reached: list[float]
    useful: list[float]
    worth: list[float]


class AnyOutlook(Protocol):
    """What choosing needs to know of a sequence; equal ones are alike. See `Outlook`."""

    @property
    def drafts(self) -> int: ...
    @property
    def pooled(self) -> bool: ...
    @property
    def usual_work(self) -> float: ...
    def usually_shown(self, shown: int) -> float: ...
    def forwarded(self, drafts: int) -> int: ...
    def work(self, drafts: int, lookahead: int, shown: int) -> float: ...
    def gains(self, levels: Sequence[int], lookahead: int, shown: int, expected: Expected) -> list[float]: ...


class Outlook:
    """Of one sequence with `drafts` drafts in hand, the first of which has `open_now` masked positions in its current block
    and `open_behind` in blocks behind.

    Work is counted in tokens; a share `head_share` of the work on a token is only done for those that are predicted.

    Args:
        block_length: positions of a block. steps: positions that a static step fills.
        first: tokens that the first draft has beside those of its open blocks. whole: tokens that each further draft has,
            however little of it is new; None: only the blocks that differ from those of the draft before.
        more_blocks: where drafts are pooled, the first one shows what twice as many steps as drafts are `shown` reach, and so
            many blocks more. None: they are not pooled.
    """

    def __init__(
        self,
        drafts: int,
        open_now: int,
        open_behind: int,
        block_length: int,
        steps: int,
        first: int,
        whole: int | None,
        head_share: float,
        more_blocks: int | None = None,
    ) -> None:
        self.drafts = drafts
        self._now = open_now
        self._total = open_now + open_behind
        self._size = block_length
        self._steps = steps
        self._first = first
        self._whole = whole
        self._head = head_share
        self._more = more_blocks
        self._works: dict[int, list[float]] = {}
        self._follows: dict[int, list[int]] = {}

    @property
    def pooled(self) -> bool:
        """Whether the first draft shows more than its own reach."""
        return self._more is not None

    def forwarded(self, drafts: int) -> int:
        """How many drafts a forward has that may have so many."""
        return min(drafts, self.drafts)

    @property
    def usual_work(self) -> float:
        """Of a draft among many."""
        tokens = self._size if self._whole is None else self._whole
        return tokens * (1 - self._head) + self._head * (self._size + 1) / 2

    def usually_shown(self, shown: int) -> float:
        """Work on what the first draft shows beyond the reach of a draft of its own, on average over where blocks end."""
        if self._more is None or shown == 1:
            return 0.0
        # The n-th position to be filled lies (n - 1) / block_length blocks on, on average.
        positions = min((2 * shown - 1) * self._steps + (self._more - 1) * self._size, self._total)
        return positions * (self._head if self._whole is not None else 1.0)

    def work(self, drafts: int, lookahead: int, shown: int) -> float:
        """Of a forward of so many drafts, or of all in hand, whose first one shows what `shown` drafts can reach."""
        works = self._works.get(lookahead)
        if works is None:
            works = self._works[lookahead] = self._all_works(lookahead)
        return works[min(drafts, self.drafts) - 1] + (self._shown(shown, lookahead) if shown > 1 else 0.0)

    def _shown(self, shown: int, lookahead: int) -> float:
        """Work on what the first draft shows beyond its own reach."""
        if self._more is None:
            return 0.0
        reach, last = self._block(lookahead * self._steps), self._last_shown(shown)
        if last <= reach:
            return 0.0
        rows = self._open(last) - self._open(reach)
        tokens = 0 if self._whole is not None else (last - reach) * self._size
        return tokens * (1 - self._head) + rows * self._head

    def _last_shown(self, shown: int) -> int:
        """The block in which what is shown ends."""
        last = self._block(2 * shown * self._steps) + (self._more or 1) - 1
        return min(last, self._block(self._total))

    def follows(self, lookahead: int, shown: int) -> list[int]:
        """`[j]`: how many drafts can be made once draft j was the last that was right."""
        pooled = self._more is not None and shown > 1
        key = -shown if pooled else lookahead
        follows = self._follows.get(key)
        if follows is None:
            until = self._open(self._last_shown(shown)) if pooled else None
            follows = self._follows[key] = [self._following(j, lookahead, until) for j in range(self.drafts)]
        return follows

    def gains(self, levels: Sequence[int], lookahead: int, shown: int, expected: Expected) -> list[float]:
        """Steps that a forward is expected to bring for each number of drafts, in ascending order, with what the drafts that
        it leaves are worth.
        """
        follows, (reached, useful, worth) = self.follows(lookahead, shown), expected
        most = len(worth) - 1
        brought = left = then = 0.0
        likely, done = 1.0, 0
        gains: list[float] = []
        for level in levels:
            end = min(level, self.drafts)
            for j in range(done, end):
                left += then * (likely - reached[j])
                likely = reached[j]
                then = worth[min(follows[j], most)]
                brought += useful[j]
            done = end
            gains.append(brought + left + likely * then)
        return gains

    def _block(self, position: int) -> int:
        """In which block, from the current one, the n-th position to be filled lies, from 1."""
        position = min(position, self._total)
        return 0 if position <= self._now else (position - self._now - 1) // self._size + 1

    def _open(self, block: int) -> int:
        """Positions open in the first draft up to the end of a block."""
        return min(self._now + block * self._size, self._total)

    def _following(self, draft: int, lookahead: int, until: int | None) -> int:
        filled = draft * self._steps
        if until is None:
            until = self._open(self._block(filled + lookahead * self._steps))
        return max(math.ceil((until - filled) / self._steps), 1)

    def _all_works(self, lookahead: int) -> list[float]:
        works, total = [], 0.0
        for draft in range(self.drafts):
            filled = draft * self._steps
            last = self._block(filled + lookahead * self._steps)
            rows = max(self._open(last) - filled, 0)
            if self._whole is not None:
                tokens = self._whole if draft else self._first
            else:
                tokens = (last - self._block(filled) + 1) * self._size + (0 if draft else self._first)
            total += tokens * (1 - self._head) + rows * self._head
            works.append(total)
        return works


class ShapeOutlook(NamedTuple):
    """The same of a sequence with `in_hand` drafts in a step of fixed shape, which computes all drafts of its shape.

    `tokens`: by number of drafts, those of the shape, divided by the sequences; None: there is no such shape, nor is it worth
    making one. A shape of one draft makes no others for the next step.
    """

    in_hand: int
    tokens: tuple[tuple[int, float | None], ...]

    @property
    def drafts(self) -> int:
        """Those of the largest shape: where fewer are in hand, it makes more."""
        return self.tokens[-1][0]

    def forwarded(self, drafts: int) -> int:
        return min(drafts, self.in_hand)

    @property
    def pooled(self) -> bool:
        """Whether the first draft shows more than its own reach; what that costs is in the shape."""
        return False

    def usually_shown(self, shown: int) -> float:
        return 0.0

    @property
    def usual_work(self) -> float:
        return min(each / drafts for drafts, each in self.tokens if each is not None)

    def work(self, drafts: int, lookahead: int, shown: int) -> float:
        smallest = next((each for most, each in self.tokens if most >= drafts and each is not None), None)
        return smallest or max(each for _, each in self.tokens if each is not None)

    def gains(self, levels: Sequence[int], lookahead: int, shown: int, expected: Expected) -> list[float]:
        possible = {drafts for drafts, each in self.tokens if each is not None}
        brought = sums(expected.useful)
        gain = [brought[self.forwarded(level)] + (expected.worth[-1] if level > 1 else 0.0) for level in levels]
        return [each if level in possible else -math.inf for level, each in zip(levels, gain, strict=True)]


@functools.lru_cache(maxsize=8192)
def outlook(
    drafts: int,
    open_now: int,
    open_behind: int,
    block_length: int,
    steps: int,
    first: int,
    whole: int | None,
    head_share: float,
    more_blocks: int | None = None,
) -> Outlook:
    """An `Outlook`; equal ones are one object, so that a batch computes them once."""
    return Outlook(drafts, open_now, open_behind, block_length, steps, first, whole, head_share, more_blocks)
