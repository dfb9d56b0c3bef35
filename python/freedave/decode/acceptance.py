"""How likely drafts are right: learnt from the forwards that run anyway, over all sequences, newer ones counting more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

MOST_DRAFTS = 16

_MEMORY = 35.0
_LONG_MEMORY = 1500.0  # chains, for what is expected where little was seen of late
_PRIOR_RUNS, _PRIOR = 1.5, 0.7
_PRIOR_LEFT = 4.0
_HALF_COMPANY = 5.0  # measured: of 4, 8 and 16 drafts, 17, 31 and 40 in a hundred served later, and up to 33, 52 and 56
_LARGEST = 1e9  # weights grow, so that what is old need not be touched; they start anew here


class Chain(NamedTuple):
    """What came of a sequence's drafts in a forward: of `drafts`, the first `right` were right.

    `steps` static steps were committed. Where drafts are pooled they may be more than `right`, for what was forwarded before.
    """

    drafts: int
    right: int
    steps: int


class _Chains:
    """How chains of drafts ended; chains that are `times` newer count e times as much."""

    def __init__(self, times: float) -> None:
        self._growth = math.exp(1 / times)
        self._weight = 1.0
        self._broke = [0.0] * MOST_DRAFTS
        self._complete = [0.0] * MOST_DRAFTS

    def grow(self) -> None:
        """What comes now counts more than what came before."""
        self._weight *= self._growth
        if self._weight > _LARGEST:
            self.fade(1 / self._weight)
            self._weight = 1.0

    def fade(self, share: float) -> None:
        """What was seen so far counts less."""
        self._broke = [each * share for each in self._broke]
        self._complete = [each * share for each in self._complete]

    def add(self, drafts: int, right: int) -> None:
        ends = self._broke if right < drafts else self._complete
        ends[right - 1] += self._weight

    def held(self) -> list[tuple[float, float]]:
        """`[j]`: of how many chains draft j was right and another one came, and of how many of those that was right, too."""
        beyond, found = 0.0, []
        for j in reversed(range(MOST_DRAFTS - 1)):
            beyond += self._complete[j + 1]
            found.append(((beyond + self._broke[j]) / self._weight, beyond / self._weight))
            beyond += self._broke[j]
        return found[::-1]


class Acceptance:
    """How likely chains of drafts go on, and how often drafts that came to nothing serve later on.

    Where no chain came so far of late, it is expected to go on as usual, and where none ever did, as it did a draft earlier.
    """

    def __init__(self) -> None:
        self._late, self._ever = _Chains(_MEMORY), _Chains(_LONG_MEMORY)
        self._left = self._served = 0.0

    def learn(self, chains: Sequence[Chain]) -> None:
        """What came of a forward's sequences."""
        late, ever = self._late, self._ever
        late.grow()
        for drafts, right, steps in chains:
            if drafts > 1:
                late.add(drafts, right)
                ever.grow()
                ever.add(drafts, right)
                left = (drafts - right) * _company(drafts)
                self._left += left - self._left / _LONG_MEMORY
                self._served -= self._served / _LONG_MEMORY
            self._served += steps - right

    def doubt(self) -> None:
        """Something has changed, so that what was seen until now counts less."""
        self._late.fade(0.5)

    def reached(self, deviations: float = 0.0) -> list[float]:
        """`[j]`: the probability that a chain's draft j, from 0, is right; with `deviations`, how high it may be."""
        likely, product, found = _PRIOR, 1.0, [1.0]
        for (tried, held), (usually_tried, usually_held) in zip(self._late.held(), self._ever.held(), strict=True):
            usual = (usually_held + _PRIOR_RUNS * likely) / (usually_tried + _PRIOR_RUNS)
            runs = tried + _PRIOR_RUNS
            likely = most = (held + _PRIOR_RUNS * usual) / runs
            if deviations:
                most = min(likely + deviations * math.sqrt(max(likely * (1 - likely), 0.1 / runs) / runs), 1.0)
            product *= most
            found.append(product)
        return found

    def useful(self, reached: Sequence[float]) -> list[float]:
        """`[j]`: how many static steps draft j is expected to bring, in its own forward or in a later one.

        Each static step goes through one state that was forwarded, so drafts and steps balance.
        """
        later = self._served / (self._left + _PRIOR_LEFT)
        before, right, useful = 0.0, 0.0, []
        for n, each in enumerate(reached, 1):
            right += each
            brought = right + (n - right) * min(later * _company(n), 1.0)
            useful.append(brought - before)
            before = brought
        return useful


def _company(drafts: int) -> float:
    """How likely one of so many drafts that its own forward's chain did not reach is right, and spares a forward, in a later
    one, against one of a great many: the more of them are forwarded, the more often a later chain goes through one."""
    return (drafts - 1) / (drafts - 1 + _HALF_COMPANY)


def sums(values: Sequence[float]) -> list[float]:
    """`[n]`: of the first n."""
    return list(itertools.accumulate(values, initial=0.0))
