"""What a sequence's next forward would compute, and how many drafts there would be for the one after it, for any number of
drafts and any lookahead: in numbers alone, without planning each of these forwards.

Drafts fill blocks one after the other, so both depend only on how many positions are open, and where.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence


class Outlook:
    """Of one sequence with `drafts` drafts in hand, the first of which has `open_now` masked positions in its current block
    and `open_behind` in blocks behind.

    Work is counted in tokens; a share `head_share` of the work on a token is only done for those that are predicted.

    Args:
        block_length: positions of a block. steps: positions that a static step fills.
        first: tokens that the first draft has beside those of its open blocks. whole: tokens that each further draft has,
            however little of it is new; None: only the blocks that differ from those of the draft before.
        more_blocks: where drafts are pooled, the first one shows what twice as many steps as there are drafts reach, and so
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
    def usual_work(self) -> float:
        """Of a draft among many."""
        tokens = self._size if self._whole is None else self._whole
        return tokens * (1 - self._head) + self._head * (self._size + 1) / 2

    def work(self, drafts: int, lookahead: int) -> float:
        """Of a forward of so many drafts, or of all in hand."""
        works = self._works.get(lookahead)
        if works is None:
            works = self._works[lookahead] = self._all_works(lookahead)
        drafts = min(drafts, self.drafts)
        return works[drafts - 1] + (self._shown(drafts, lookahead) if self._more is not None and drafts > 1 else 0.0)

    def _shown(self, drafts: int, lookahead: int) -> float:
        """Work on what the first draft shows beyond its own reach."""
        reach = self._block(lookahead * self._steps)
        last = min(self._block(2 * drafts * self._steps) + (self._more or 1) - 1, self._block(self._total))
        if last <= reach:
            return 0.0
        rows = self._open(last) - self._open(reach)
        tokens = 0 if self._whole is not None else (last - reach) * self._size
        return tokens * (1 - self._head) + rows * self._head

    def follows(self, lookahead: int) -> list[int]:
        """`[j]`: how many drafts can be made of the predictions of draft j."""
        follows = self._follows.get(lookahead)
        if follows is None:
            follows = self._follows[lookahead] = [self._following(j, lookahead) for j in range(self.drafts)]
        return follows

    def gain(self, drafts: int, lookahead: int, reached: Sequence[float], worth: Sequence[float]) -> float:
        """Steps that a forward is expected to commit, and what the drafts that it leaves are worth.

        `reached[j]`: how likely draft j is right. `worth[n]`: of having n drafts; more are worth what the last entry says.
        """
        count, most, follows = min(drafts, self.drafts), len(worth) - 1, self.follows(lookahead)
        gain = 0.0
        for j in range(count):
            ends = reached[j] - (reached[j + 1] if j + 1 < count else 0.0)
            gain += reached[j] + ends * worth[min(follows[j], most)]
        return gain

    def _block(self, position: int) -> int:
        """In which block, from the current one, the n-th position to be filled lies, from 1."""
        position = min(position, self._total)
        return 0 if position <= self._now else (position - self._now - 1) // self._size + 1

    def _open(self, block: int) -> int:
        """Positions open in the first draft up to the end of a block."""
        return min(self._now + block * self._size, self._total)

    def _following(self, draft: int, lookahead: int) -> int:
        filled = draft * self._steps
        if self._more is None:
            left = self._open(self._block(filled + lookahead * self._steps)) - filled
        else:
            left = self._total - filled
        return max(math.ceil(left / self._steps), 1)

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
