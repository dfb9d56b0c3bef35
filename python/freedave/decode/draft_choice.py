"""How many drafts a forward should have, and how far ahead they should be computed: `draft_steps="auto"`.

Numbers in, a choice out; nothing here knows a tensor or a clock. Three parts, each learnt from the forwards that run anyway:

- `CostModel`: the seconds of a forward against its work (tokens, roughly).
- `Acceptance`: how likely a chain of drafts that was right so far goes on.
- `DraftChooser`: the number of drafts and the lookahead with the most static steps a second, for the batch as a whole.

What is chosen changes speed only. Static decoding, one draft, is a choice as any other.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from freedave.decode.forward_cost import CostCurve, CostModel
from freedave.decode.outlook import Outlook

MOST_DRAFTS = 16
LEVELS = (1, 2, 3, 4, 6, 8, 12, MOST_DRAFTS)
"""How many drafts a forward may have; between two neighbours the speed differs little."""

AHEAD = (1, 2, 4, 8, MOST_DRAFTS)
"""For how many of its next steps each draft may be prepared."""

_MEMORY = 35.0  # forwards after which what was seen counts little more than a third
_LONG_MEMORY = 400.0  # chains, for what is expected where little was seen of late
_PRIOR_RUNS, _PRIOR = 1.5, 0.7


class Acceptance:
    """How likely chains of drafts go on, over all sequences, newer ones counting more.

    `tried[j]` chains of the last forwards had j right drafts beyond the first and one more; of those, `held[j]` went on.
    `usual[j]` is the share over many more; where no chain came so far, it is expected to go on as it did a draft earlier.
    """

    def __init__(self) -> None:
        self.tried = [0.0] * MOST_DRAFTS
        self.held = [0.0] * MOST_DRAFTS
        self._usually_tried = [0.0] * MOST_DRAFTS
        self._usually_held = [0.0] * MOST_DRAFTS
        self._complete = self._beyond = 0.0

    def learn(self, chains: Sequence[tuple[int, int]]) -> None:
        """A forward's sequences: of so many drafts each, so many static steps were committed (with a pool, perhaps more)."""
        keep = 1 - 1 / _MEMORY
        self.tried = [each * keep for each in self.tried]
        self.held = [each * keep for each in self.held]
        self._complete *= keep
        self._beyond *= keep
        for drafts, steps in chains:
            for j in range(min(steps, drafts - 1)):
                held = j < steps - 1
                self.tried[j] += 1
                self.held[j] += held
                self._usually_held[j] += held - self._usually_held[j] / _LONG_MEMORY
                self._usually_tried[j] += 1 - self._usually_tried[j] / _LONG_MEMORY
            if steps >= drafts:
                self._complete += 1
                self._beyond += steps - drafts

    @property
    def beyond(self) -> float:
        """How many steps more a complete chain takes, through states that were forwarded before."""
        return self._beyond / (self._complete + _PRIOR_RUNS)

    def reached(self, deviations: float = 0.0) -> list[float]:
        """`[j]`: the probability that a chain's draft j, from 0, is right; with `deviations`, how high it may be."""
        likely, found = _PRIOR, [1.0]
        for j in range(MOST_DRAFTS - 1):
            usual = (self._usually_held[j] + _PRIOR_RUNS * likely) / (self._usually_tried[j] + _PRIOR_RUNS)
            runs = self.tried[j] + _PRIOR_RUNS
            likely = most = (self.held[j] + _PRIOR_RUNS * usual) / runs
            if deviations:
                most = min(likely + deviations * math.sqrt(max(likely * (1 - likely), 0.1 / runs) / runs), 1.0)
            found.append(found[-1] * most)
        return found


@dataclass(frozen=True)
class Choice:
    """`drafts` each sequence has in a forward, if it has as many; `lookahead`: for how many of its next steps each draft is
    prepared; `build`: how many drafts to make of what the forward finds. `shown`: for how many drafts the first one shows
    what they can reach, where drafts are pooled."""

    drafts: int
    lookahead: int
    build: int
    shown: int


def described(drafts: int, lookahead: int) -> str:
    """A choice in words."""
    return f"{drafts} draft{'s' if drafts > 1 else ''}, lookahead {lookahead}"


@dataclass
class _Rate:
    """Static steps and seconds of the last forwards, newer ones counting more."""

    steps: float = 0.0
    seconds: float = 0.0

    def add(self, steps: float, seconds: float) -> None:
        self.steps += steps - self.steps / 40
        self.seconds += seconds - self.seconds / 40


_REPLAN = 4  # forwards


@dataclass
class _Plan:
    """What stays nearly the same from one forward to the next."""

    rate: float
    reached: list[float]
    worth: list[float]
    """`[n]`: what it is worth to have n drafts for the next forward, in steps beyond those of one."""
    wanted: int
    """How many drafts are worth their time."""
    build: int
    """How many might be."""
    work: float
    """Of a usual forward with one draft."""
    forwards_left: int = _REPLAN


@dataclass
class _Progress:
    """Where choosing stands for forwards of one kind, drafts of one kind and about as many sequences."""

    made: _Rate = field(default_factory=_Rate)
    static: _Rate = field(default_factory=_Rate)
    """What static decoding would have made of the same time, as far as the curve knows."""
    near: _Rate = field(default_factory=_Rate)
    """Of forwards with the shortest lookahead, one after the other."""
    near_likely: float = 1.0
    """How many of four drafts were expected to be right then."""
    crowding: float = 1.0
    """Work of a draft against that of one that computes its own block alone."""
    allowance: float | None = None
    """Seconds that trials may lose now; None: no forward has been timed."""
    most_allowance: float = 0.0
    """With so much, a trial may lose more; then there is none until that is made up for."""
    forwards: int = 0
    only_near: bool = False
    """Whether the forward that was chosen last could have no other lookahead than the shortest."""
    ahead: int = 1
    """The lookahead that was chosen last."""
    plan: _Plan | None = None


@dataclass
class Experience:
    """What the decodes of a model leave to the next ones."""

    costs: CostModel = field(default_factory=CostModel)
    acceptance: dict[Hashable, Acceptance] = field(default_factory=dict)
    progress: dict[Hashable, _Progress] = field(default_factory=dict)


_THRIFT = 1.01  # what time is worth more than it brings now: of choices that are nearly alike, the cheaper one
# The first forwards, and some now and then, have the shortest lookahead, so that its rate is known.
_NEAR_FORWARDS, _NEAR_EVERY = 16, 500
_TRIALS = 0.006  # share of the time that may be lost by trying what is not expected to be best
# For how many forwards' time trials may be had at once: among the first forwards, and later.
_FIRST_FORWARDS, _FIRST_TRIALS, _LATER_TRIALS = 20, 3.0, 1.0


class DraftChooser:
    """Chooses for one decoder.

    `machine`: forwards of the same kind take the same time; `drafting`: drafts of the same kind are as likely right.

    Per step, the choice has the most expected steps beyond what the time that it takes is worth, and of the next step as far
    as it depends on this one: a longer lookahead finds more drafts. Time is worth the steps that the last forwards made of
    it.
    """

    def __init__(
        self,
        experience: Experience,
        machine: Hashable = None,
        drafting: Hashable = None,
        most_drafts: int = MOST_DRAFTS,
        most_ahead: int = MOST_DRAFTS,
    ) -> None:
        self._costs = experience.costs
        self._machine = machine
        self._drafting = drafting
        self._all_progress = experience.progress
        self._acceptance = experience.acceptance.setdefault(drafting, Acceptance())
        self._levels = [level for level in LEVELS if level <= most_drafts]
        self._ahead_levels = [ahead for ahead in AHEAD if 1 < ahead <= most_ahead]
        self._curve = CostCurve()
        self._progress = _Progress()
        self.chosen: Counter[tuple[int, int]] = Counter()

    def choose(self, outlooks: Sequence[Outlook], other_work: float = 0.0) -> Choice:
        """For the next forward of these sequences, at least one, which also does `other_work`."""
        count = len(outlooks)
        self._curve = curve = self._costs.curve(self._machine, count)
        key = self._machine, self._drafting, count.bit_length()
        self._progress = progress = self._all_progress.setdefault(key, _Progress())
        groups = list(Counter(outlooks).items())
        plan, replanned = progress.plan, False
        if plan is None or plan.forwards_left <= 0:
            plan, replanned = self._plan(groups[0][0].usual_work, count), True
            progress.plan = plan
        plan.forwards_left -= 1
        most = max(outlook.drafts for outlook, _ in groups)
        levels = [level for level in self._levels if level <= most]
        if levels[-1] < most and len(levels) < len(self._levels):
            levels.append(most)

        scores: dict[tuple[int, int], float] = {}
        works: dict[tuple[int, int], float] = {}

        def score(level: int, ahead: int) -> None:
            gain = sum(times * outlook.gain(level, ahead, plan.reached, plan.worth) for outlook, times in groups)
            work = works[level, ahead] = (
                sum(times * outlook.work(level, ahead) for outlook, times in groups) + other_work
            )
            scores[level, ahead] = gain - plan.rate * curve.seconds(work)

        tried = levels
        if not replanned:  # what is worth its time in a usual forward is nearly best in all
            usual = bisect.bisect_left(levels, min(plan.wanted, levels[-1]))
            tried = [1, *(level for level in levels[max(usual - 2, 0) : usual + 2] if level > 1)]
        for level in tried:
            score(level, 1)
        if not other_work:
            progress.static.add(count, curve.seconds(works[1, 1]))
            last = tried[-1]
            deepest = sum(times * min(outlook.drafts, last) for outlook, times in groups)
            crowding = works[last, 1] / (deepest * groups[0][0].usual_work)
            progress.crowding += 0.1 * (crowding - progress.crowding)
        near = levels.index(max(scores, key=scores.__getitem__)[0])
        progress.only_near = progress.forwards % _NEAR_EVERY < _NEAR_FORWARDS
        if progress.only_near:
            pass
        elif replanned:
            for ahead in self._ahead_levels:
                for level in levels[max(near - 1, 0) : near + 2]:
                    score(level, ahead)
        elif progress.ahead > 1:
            for level in levels[max(near - 1, 0) : near + 2]:
                score(level, progress.ahead)
        best = max(scores, key=scores.__getitem__)
        if replanned and not other_work:
            best = self._trial(best, scores, works, groups, plan)
        progress.ahead = best[1]
        self.chosen[best] += 1
        # Those in hand may be fewer than are worth their time, and the next ones need not be.
        return Choice(best[0], best[1], plan.build, max(plan.wanted, best[0]) if best[0] >= levels[-1] else best[0])

    def learn(self, work: float, seconds: float | None, chains: Sequence[tuple[int, int]]) -> None:
        """What came of the forward that was chosen last: its work and seconds (None: they say nothing about forwards like
        it), and of each sequence the drafts that it had and the static steps that were committed."""
        if chains:
            self._acceptance.learn(chains)
        if seconds is None or work <= 0:
            return
        progress = self._progress
        self._costs.learn(self._curve, work, seconds)
        expected = self._curve.seconds(work)
        progress.made.add(sum(steps for _, steps in chains), expected)
        if progress.only_near:
            progress.near.add(sum(steps for _, steps in chains), expected)
            progress.near_likely = sum(self._acceptance.reached()[:4])
        progress.forwards += 1
        most = (_FIRST_TRIALS if progress.forwards <= _FIRST_FORWARDS else _LATER_TRIALS) * expected
        allowance = most if progress.allowance is None else progress.allowance
        progress.allowance = min(allowance + _TRIALS * expected, most)
        progress.most_allowance = _LATER_TRIALS * expected

    def why(self) -> str:
        """What was chosen most often, and what that rests on; empty where nothing was."""
        plan, curve, drift = self._progress.plan, self._curve, self._costs.drift
        if plan is None:
            return ""
        (drafts, ahead), times = self.chosen.most_common(1)[0]
        text = f"mostly {described(drafts, ahead)} ({times} of {self.chosen.total()} forwards): "
        likely = [f"draft {j} is right {plan.reached[j - 1]:.0%} of the time" for j in (2, 4, 8)]
        costs = [f"{k * plan.work:.0f} tokens {1e3 * drift * curve.seconds(k * plan.work):.1f}" for k in (1, 4, 16)]
        return f"{text}{', '.join(likely)}; a forward takes, in ms: {', '.join(costs)}"

    def _plan(self, usual_work: float, count: int) -> _Plan:
        """Which drafts are worth their time in a usual forward of so many sequences."""
        progress = self._progress
        curve, reached, hopeful = self._curve, self._acceptance.reached(), self._acceptance.reached(1.0)
        one = count * usual_work * progress.crowding
        seconds = {level: curve.seconds(one * level) for level in self._levels}
        gains = [0.0]
        for likely in reached:
            gains.append(gains[-1] + likely)
        if progress.made.seconds > 0:
            # At least what simpler ways made: a rate that is too low makes time look cheap, and stays low by that.
            rate = max(each.steps / each.seconds for each in (progress.made, progress.static) if each.seconds)
            if progress.near.seconds > 0:
                near = progress.near.steps / progress.near.seconds
                rate = max(rate, near * min(sum(reached[:4]) / progress.near_likely, 1.0))
            rate *= _THRIFT
        else:
            rate = max(count * gains[level] / seconds[level] for level in self._levels)
        worth, total, best, previous = [0.0, 0.0], 0.0, 0.0, 1
        wanted, build, hope, most_hope = 1, 1, 0.0, 0.0
        for level in self._levels[1:]:
            each = rate * (seconds[level] - seconds[previous]) / (count * (level - previous))
            for n in range(previous, level):
                total += reached[n] - each
                if total > best:
                    wanted, best = level, total
                worth.append(best)
                hope += hopeful[n] - each
            if hope > most_hope:
                build, most_hope = level, hope
            previous = level
        return _Plan(rate, reached, worth, wanted, build, one)

    def _trial(
        self,
        best: tuple[int, int],
        scores: dict[tuple[int, int], float],
        works: dict[tuple[int, int], float],
        groups: list[tuple[Outlook, int]],
        plan: _Plan,
    ) -> tuple[int, int]:
        """Another choice in the place of the best where it might be better, and the time that it may cost is allowed."""
        allowance = self._progress.allowance
        if allowance is None:
            return best
        reached = self._acceptance.reached(1.0)
        tried, most = best, scores[best]
        for way, score in scores.items():
            loss = (scores[best] - score) / plan.rate
            if way == best or min(loss, self._progress.most_allowance) > allowance:
                continue
            gain = sum(times * outlook.gain(*way, reached, plan.worth) for outlook, times in groups)
            hope = gain - plan.rate * self._curve.optimistic_seconds(works[way])
            if hope > most:
                tried, most = way, hope
        self._progress.allowance = allowance - (scores[best] - scores[tried]) / plan.rate
        return tried
