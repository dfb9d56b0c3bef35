"""What a forward costs: its seconds against its work (tokens, roughly), learnt from forwards as they run."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Hashable
from dataclasses import dataclass

# Standard deviations, in logarithms: 0.1 is about 10 %.
_JITTER = 0.1  # of one forward among equals
_DRIFT = 0.03  # of the machine's speed from one forward to the next
_AGEING = 0.004  # of what is known of a size
_GUESSED, _BETWEEN = 0.5, 0.2  # of a size that was never run: beyond all that were, or between two of them
_OUTLIER = 3.0  # standard deviations
_FEW_RUNS, _DEAREST = 3, 0.35  # of so few forwards none counts as much dearer than expected


@dataclass
class _Size:
    """What is known of forwards of nearly one size: their mean work, the logarithm of their seconds, its variance."""

    work: float
    value: float
    variance: float
    runs: int = 0
    seconds: float = 0.0
    """exp(value)"""


_work_of = operator.attrgetter("work")


class CostCurve:
    """Seconds of a forward against its work, for one kind of forward: a line through the sizes that were run.

    Beyond them it goes on as a line. More work never takes less time. `like` is a curve whose form is borrowed where this one
    knows nothing.
    """

    def __init__(self, like: CostCurve | None = None) -> None:
        self._like = like
        self.sizes: dict[int, _Size] = {}
        self._order: list[_Size] = []
        self._works: list[float] = []
        self._values: list[float] = []

    @property
    def known(self) -> bool:
        """Whether anything is, from forwards like these or from others."""
        return bool(self.sizes) or (self._like is not None and self._like.known)

    @staticmethod
    def index(work: float) -> int:
        """Sizes that differ by less than about an eighth count as one."""
        return round(3 * math.log2(work))

    def add(self, work: float) -> _Size:
        """A size that was not run before, with the value that is expected of it."""
        known = bool(self._order) and self._order[0].work < work < self._order[-1].work
        seconds = self.seconds(work)
        size = _Size(work, math.log(seconds), (_BETWEEN if known else _GUESSED) ** 2, seconds=seconds)
        self.sizes[self.index(work)] = size
        # Means of sizes that count as one never change places with others.
        bisect.insort(self._order, size, key=_work_of)
        self._works = []
        return size

    def moved(self, size: _Size) -> None:
        """To be called when what is known of a size has changed."""
        size.seconds = math.exp(size.value)
        self._works = []

    def seconds(self, work: float) -> float:
        """What a forward is expected to take, up to the machine's drift."""
        if not self._order:
            return 1e-3 * (1 + work / 64) if self._like is None else self._like.seconds(work)
        if not self._works:
            self._trace()
        works, values = self._works, self._values
        i = bisect.bisect_left(works, work)
        if i == 0:
            return self._beyond(work, works[0], values[0], self._order[-1])
        if i == len(works):
            return self._beyond(work, works[-1], values[-1], self._order[0])
        share = (work - works[i - 1]) / (works[i] - works[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])

    def _trace(self) -> None:
        """The points of the line."""
        self._works = [size.work for size in self._order]
        self._values = list(itertools.accumulate([size.seconds for size in self._order], max))

    def _beyond(self, work: float, end: float, at_end: float, other: _Size) -> float:
        """Below the smallest size, or above the largest; `other` is at the other end."""
        if self._like is not None:
            return at_end * self._like.seconds(work) / self._like.seconds(end)
        slope = at_end / end / 2  # half of the time grows with the work, as far as anybody knows
        if max(end, other.work) > 1.5 * min(end, other.work):
            slope = (other.seconds - at_end) / (other.work - end)
            slope = min(max(slope, 0.0), at_end / end)
        return max(at_end + slope * (work - end), at_end * min(work / end, 1.0))

    def optimistic_seconds(self, work: float) -> float:
        """The least that a forward may take, as far as is known."""
        size = self.sizes.get(self.index(work))
        if size is not None:
            return self.seconds(work) * math.exp(
                -max(math.sqrt(size.variance), _GUESSED if size.runs < _FEW_RUNS else 0.0)
            )
        least = self.seconds(work)
        if self._order and work < self._order[0].work:  # nothing below may be but in proportion
            least = min(least, self._order[0].seconds * work / self._order[0].work)
        return least * math.exp(-_GUESSED)

    def hopeful_seconds(self, work: float) -> float:
        """What a forward takes if what is unknown turns out well: more work than was ever run then takes no longer."""
        if self.index(work) in self.sizes:
            return self.optimistic_seconds(work)
        hoped = self.seconds(work) * math.exp(-_GUESSED)
        return min(hoped, self._order[-1].seconds) if self._order and work > self._order[-1].work else hoped


class CostModel:
    """The curves of one model on one machine, by kind of forward and number of sequences, and the machine's drift.

    Neighbours slow a machine down for seconds, whatever it runs. So each surprise is divided: a change that comes without
    another size is the machine's, and moves no curve; one that comes with another size belongs, as far as little is known of
    that size, to it. A single forward that took far longer than all others says
    little.
    """

    def __init__(self) -> None:
        self._curves: dict[tuple[Hashable, int], CostCurve] = {}
        self._drift = 0.0
        self._drift_variance = _DRIFT * _JITTER
        self._jitter = _JITTER**2
        self._outliers = 0
        self._last: _Size | None = None

    def curve(self, kind: Hashable, sequences: int) -> CostCurve:
        """That of forwards of so many sequences, powers of two apart."""
        key = kind, sequences.bit_length()
        curve = self._curves.get(key)
        if curve is None:
            near = [each for each in self._curves if each[0] == kind and self._curves[each].sizes]
            near.sort(key=lambda each: (abs(each[1] - key[1]), each[1]))
            curve = CostCurve(self._curves[near[0]] if near else None)
            self._curves[key] = curve
        return curve

    def learn(self, curve: CostCurve, work: float, seconds: float) -> None:
        """A forward of so much work took so long."""
        if seconds <= 0:
            return
        surprise = math.log(seconds / curve.seconds(work)) - self._drift
        unknown = not curve.known
        size = curve.sizes.get(curve.index(work))
        if size is None:
            size = curve.add(work)
        of_size, of_drift = size.variance, self._drift_variance + _DRIFT**2
        total = of_size + of_drift + self._jitter
        if unknown:
            of_size, of_drift = 1e6, 0.0
        elif size.runs < _FEW_RUNS:
            surprise = min(surprise, _DEAREST)  # what is dear by accident would not be run again
        elif surprise * surprise > _OUTLIER**2 * total:
            self._outliers = max(self._outliers, 0) + 1 if surprise > 0 else min(self._outliers, 0) - 1
            if not -2 < self._outliers < 3:  # rather an interruption or two than that everything takes longer now
                of_drift = max(of_drift, surprise * surprise / 2)
                of_size = 0.0 if size is self._last else max(of_size, (_JITTER / 2) ** 2)
            else:
                surprise, of_drift = math.copysign(math.sqrt(total), surprise), 0.0
        else:
            self._outliers = 0
            self._jitter += (surprise * surprise / 2 - self._jitter) / 50
            self._jitter = min(max(self._jitter, (_JITTER / 2) ** 2), (3 * _JITTER) ** 2)
        total = of_size + of_drift + self._jitter
        size.value += of_size / total * surprise
        if of_size:
            size.variance = of_size * (1 - of_size / total) + _AGEING**2
        self._drift += of_drift / total * surprise
        if of_drift:
            self._drift_variance = of_drift * (1 - of_drift / total)
        size.runs += 1
        size.work += (work - size.work) / min(size.runs, 30)
        curve.moved(size)
        self._last = size

    @property
    def drift(self) -> float:
        """By what factor the machine is slower now than the curves say."""
        return math.exp(self._drift)
