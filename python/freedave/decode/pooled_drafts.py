"""How many pooled drafts are wanted: `DraftChooser` asks, numbers in, a number out.

A single forward would not tell, as what is shown and forwarded in one pays in others. So a number of drafts is wanted for
some forwards, and what they brought is held against what was foretold of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

THRIFT = 1.01
"""What time is worth more than it brings now: of choices that are nearly alike, the cheaper one."""

TRIED_FOR = 8
"""For how many forwards another number of drafts is tried."""

_TRIED_SHARE, _TRIED_MOST = 0.006, 3.0  # the share of the time that this may cost, and at once, in forwards
# After how many forwards what a number of drafts brings shows, from how many chains that tells much, and how much better
# it may be where nothing was seen.
_UNSETTLED, _FEW_CHAINS, _HOPE = 2, 20, 0.15
_MEMORY, _LONG_MEMORY = 120, 1000  # forwards with as many drafts, and with others


@dataclass
class _Came:
    """What came of forwards for which so many drafts were wanted, newer ones counting more."""

    steps: float = 0.0
    foretold: float = 0.0
    """The steps that their time was expected to bring."""
    chains: float = 0.0

    def add(self, steps: float, foretold: float, chains: float) -> None:
        self.fade(1 / _MEMORY)
        self.steps += steps
        self.foretold += foretold
        self.chains += chains

    def fade(self, share: float) -> None:
        self.steps -= share * self.steps
        self.foretold -= share * self.foretold
        self.chains -= share * self.chains


@dataclass
class PooledDrafts:
    """For about as many sequences, and drafts of one kind."""

    _came: dict[int, _Came] = field(default_factory=dict)
    """By how many drafts were wanted."""
    _wanted: int = 0
    _unsettled: int = 0
    """For how many forwards what comes still has to do with how many drafts were wanted before."""
    _lack: float = 0.0
    """The share of wanted drafts that a forward lacks for each that is wanted: answers begin with one, and end."""
    _allowance: float = 0.0
    """Seconds that trying another number may cost now."""

    def foretold(
        self,
        levels: Iterable[int],
        count: int,
        work: float,
        shown: Callable[[int], float],
        brought: Sequence[float],
        seconds: Callable[[float], float],
    ) -> dict[int, float]:
        """Steps a second where every forward of `count` sequences has so many drafts.

        Args:
            work: of a forward with one draft each. shown: of one sequence, on what its first draft shows for so many.
            brought: `[n]`, steps that n drafts of a sequence bring. seconds: of a forward, by its work.
        """
        rates = {}
        for level in levels:
            drafts = max(level * (1 - self._lack * level), 1.0)
            whole = int(drafts)
            steps = brought[whole] + (drafts - whole) * (brought[min(whole + 1, len(brought) - 1)] - brought[whole])
            rates[level] = count * steps / seconds(work * drafts + count * shown(level))
        return rates

    def likely(self, foretold: Mapping[int, float]) -> dict[int, float]:
        """The same, as far as what was foretold came true."""
        return {level: rate * self._came_true(level) for level, rate in foretold.items()}

    def _came_true(self, level: int) -> float:
        """The share of what was foretold that so many drafts bring; where little was seen of them, that all bring."""
        usual = sum(each.steps for each in self._came.values()) + 1.0
        usual /= sum(each.foretold for each in self._came.values()) + 1.0
        here = self._came.get(level)
        if here is None or not here.foretold:
            return usual
        return usual + (here.steps / here.foretold - usual) * here.chains / (here.chains + _FEW_CHAINS)

    def choose(
        self, likely: Mapping[int, float], hopes: Mapping[int, float], seconds: Mapping[int, float]
    ) -> tuple[int, bool]:
        """How many are wanted, and whether that is a trial, which lasts for `TRIED_FOR` forwards of so many `seconds`."""
        best = self._best(likely)
        tried, most, cost = best, likely[best], 0.0
        for level, rate in likely.items():
            here = self._came.get(level)
            known = math.sqrt(1 + (here.chains if here else 0.0) / _FEW_CHAINS)
            hope = rate + max(hopes[level] - rate, _HOPE * rate) / known
            loss = TRIED_FOR * seconds[level] * max(1 - rate / likely[best], 0.0)
            if hope > most and level != best and loss <= self._allowance:
                tried, most, cost = level, hope, loss
        self._allowance -= cost
        return tried, tried != best

    def _best(self, likely: Mapping[int, float]) -> int:
        """What was wanted until now, where another number is hardly better."""
        best = max(likely, key=likely.__getitem__)
        if likely[best] <= THRIFT * likely[1]:
            return 1
        before = self._wanted
        return before if before > 1 and likely.get(before, 0.0) * THRIFT**2 >= likely[best] else best

    def learn(self, wanted: int, steps: float, foretold: float, chains: int, *, settled: bool) -> None:
        """What a forward brought, and was expected to. Where not `settled`, the first forwards of all, it says nothing."""
        if wanted != self._wanted:
            self._wanted, self._unsettled = wanted, _UNSETTLED
        for each in self._came.values():
            each.fade(1 / _LONG_MEMORY)
        if self._unsettled > 0 or not settled:
            self._unsettled = max(self._unsettled - 1, 0)
        else:
            self._came.setdefault(wanted, _Came()).add(steps, foretold, chains)

    def earn(self, seconds: float) -> None:
        """A forward that took so long allows for trials."""
        self._allowance = min(self._allowance + _TRIED_SHARE * seconds, _TRIED_MOST * seconds)

    def had(self, drafts: float, wanted: int) -> None:
        """So many drafts, on average over the sequences, were there for a forward that wanted more than one."""
        self._lack += ((1 - drafts / wanted) / wanted - self._lack) / _MEMORY
