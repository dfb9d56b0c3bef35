"""How many drafts a forward should have, and how far ahead they should be computed: `draft_steps="auto"`.

Numbers in, a choice out; nothing here knows a tensor or a clock. Four parts, each learnt from the forwards that run anyway:

- `CostModel` (`forward_cost.py`): the seconds of a forward against its work (tokens, roughly).
- `Acceptance` (`acceptance.py`): how likely drafts are right.
- `PooledDrafts` (`pooled_drafts.py`): what numbers of pooled drafts bring against what was foretold of them.
- `DraftChooser`: the number of drafts and the lookahead with the most static steps a second, for the batch as a whole.

What is chosen changes speed only. Static decoding, one draft, is a choice as any other.
"""

from __future__ import annotations

import bisect
import operator
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from freedave.decode.acceptance import MOST_DRAFTS, Acceptance, Chain, sums
from freedave.decode.forward_cost import CostCurve, CostModel
from freedave.decode.outlook import AnyOutlook, Expected
from freedave.decode.pooled_drafts import THRIFT, TRIED_FOR, PooledDrafts

LEVELS = (1, 2, 3, 4, 6, 8, 12, MOST_DRAFTS)
"""How many drafts a forward may have; between two neighbours the speed differs little."""

AHEAD = (1, 2, 4, 8, MOST_DRAFTS)
"""For how many of its next steps each draft may be prepared."""


class Choice(NamedTuple):
    """`drafts` each sequence has in a forward, if it has as many; `lookahead`: for how many of its next steps each draft is
    prepared; `build`: how many drafts to make of what the forward finds. `shown`: for how many drafts the first one shows
    what they can reach, where drafts are pooled."""

    drafts: int
    lookahead: int
    build: int
    shown: int


def described(drafts: int, lookahead: int) -> str:
    """A choice in words; a lookahead of 0 is not worth a word."""
    return f"{drafts} draft{'s' if drafts > 1 else ''}" + (f", lookahead {lookahead}" if lookahead else "")


class _Decision(NamedTuple):
    """`work`, `seconds` and `steps` are those that are expected of the forward, `static` the seconds of one with one draft
    each; `tried`: another one is expected to be better."""

    choice: Choice
    work: float
    seconds: float
    steps: float
    static: float
    tried: bool


@dataclass
class _Rate:
    """Static steps and seconds of the last forwards, newer ones counting more."""

    steps: float = 0.0
    seconds: float = 0.0

    def add(self, steps: float, seconds: float) -> None:
        self.steps += steps - self.steps / 40
        self.seconds += seconds - self.seconds / 40


class _Candidate(NamedTuple):
    """A way that a forward could go."""

    score: float
    """Steps that it brings, beyond what its time is worth."""
    level: int
    lookahead: int
    shown: int
    gain: float
    work: float
    seconds: float


_score = operator.attrgetter("score")


@dataclass
class _Plan:
    """What holds for the next forwards: until some have run, or the steps that they take are not what was expected."""

    rate: float
    """Steps that a second is worth."""
    expected: Expected
    brought: list[float]
    """`[n]`: steps that n drafts bring."""
    wanted: int
    """How many drafts are worth their time."""
    build: int
    """How many might be."""
    work: float
    """Of a usual forward with one draft."""
    forwards_left: int
    only_near: bool
    """Whether forwards have no other lookahead than the shortest now."""
    foretold: dict[int, float]
    """Where drafts are pooled: steps that a second brings, by how many of them are wanted."""
    decided: dict[tuple[AnyOutlook, ...], _Decision] = field(default_factory=dict)
    more: float = 0.0
    fewer: float = 0.0
    """How surprisingly many steps, and how few, the last forwards have taken."""


@dataclass
class _Progress:
    """Where choosing stands for forwards of one kind, drafts of one kind and about as many sequences."""

    made: _Rate = field(default_factory=_Rate)
    pooled: PooledDrafts = field(default_factory=PooledDrafts)
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
    plan: _Plan | None = None


@dataclass
class Experience:
    """What the decodes of a model leave to the next ones."""

    costs: CostModel = field(default_factory=CostModel)
    acceptance: dict[Hashable, Acceptance] = field(default_factory=dict)
    progress: dict[Hashable, _Progress] = field(default_factory=dict)


# The first forwards, and some now and then, have the shortest lookahead, so that its rate is known.
_NEAR_FORWARDS, _NEAR_EVERY = 8, 500
_TRIALS = 0.006  # share of the time that may be lost by trying what is not expected to be best
# For how many forwards' time trials may be had at once: among the first forwards, and later.
_FIRST_FORWARDS, _FIRST_TRIALS, _LATER_TRIALS = 20, 3.0, 1.0
# A plan holds for a quarter as many forwards as there were, and for so many at most: among the first ones, and later.
_FIRST_PLANS, _LATER_PLANS, _EARLY = 8, 24, 256
# Where steps differ from what was expected by more than a share, that adds up; from so many forwards' steps on, it tells.
_SLACK, _SURPRISE = 0.3, 3.0


class Chosen(NamedTuple):
    """What a choice rests on: what comes of it is held against that."""

    decision: _Decision
    plan: _Plan
    progress: _Progress
    curve: CostCurve


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
        levels: Sequence[int] = LEVELS,
        lookaheads: Sequence[int] = AHEAD,
    ) -> None:
        self._costs = experience.costs
        self._machine = machine
        self._drafting = drafting
        self._all_progress = experience.progress
        self._acceptance = experience.acceptance.setdefault(drafting, Acceptance())
        self._levels = tuple(levels)
        self._lookaheads = tuple(lookaheads)
        self._curve = CostCurve()
        self._progress = _Progress()
        self._sequences = 0
        self.last: Chosen | None = None
        self.chosen: Counter[tuple[int, int]] = Counter()

    def choose(self, outlooks: Sequence[AnyOutlook], other_work: float = 0.0) -> Choice:
        """For the next forward of these sequences, at least one, which also does `other_work`."""
        count = len(outlooks)
        if count != self._sequences:
            self._sequences = count
            self._curve = self._costs.curve(self._machine, count)
            key = self._machine, self._drafting, count.bit_length()
            self._progress = self._all_progress.setdefault(key, _Progress())
        progress = self._progress
        plan, decision = progress.plan, None
        alike = tuple(outlooks)
        if plan is None or plan.forwards_left <= 0:
            plan = progress.plan = self._plan(outlooks[0], count)
            decision = self._decide(alike, other_work, plan, trial=not other_work)
        elif not other_work:
            decision = plan.decided.get(alike)
        if decision is None:
            decision = self._decide(alike, other_work, plan)
            if not other_work:
                plan.decided[alike] = decision
        plan.forwards_left -= 1
        self.last = Chosen(decision, plan, progress, self._curve)
        self.chosen[decision.choice[:2]] += 1
        return decision.choice

    @property
    def expected_work(self) -> float:
        """Of the forward that was chosen last."""
        return self.last.decision.work if self.last else 0.0

    def learn(self, work: float, seconds: float | None, chains: Sequence[Chain], of: Chosen | None = None) -> None:
        """What came of a forward, by default that which was chosen last: its work and seconds (None: they say nothing about
        forwards like it), and the drafts of each sequence."""
        if chains:
            self._acceptance.learn(chains)
        of = of or self.last
        if seconds is None or work <= 0 or of is None:
            return
        decision, plan, progress, curve = of
        expected = decision.seconds or curve.seconds(work)
        self._costs.learn(curve, work, seconds)
        steps = 0
        for chain in chains:
            steps += chain.steps
        progress.made.add(steps, expected)
        progress.static.add(len(chains), decision.static)
        if plan.foretold:
            if not decision.tried:
                settled, foretold = progress.forwards >= _FIRST_FORWARDS, plan.foretold[plan.wanted] * expected
                progress.pooled.learn(plan.wanted, steps, foretold, len(chains), settled=settled)
            progress.pooled.earn(expected)
        if plan.only_near:
            progress.near.add(steps, expected)
            progress.near_likely = sum(self._acceptance.reached()[:4])
        progress.forwards += 1
        most = (_FIRST_TRIALS if progress.forwards <= _FIRST_FORWARDS else _LATER_TRIALS) * expected
        allowance = most if progress.allowance is None else progress.allowance
        progress.allowance = min(allowance + _TRIALS * expected, most)
        progress.most_allowance = _LATER_TRIALS * expected
        if decision.steps:
            self._compare(plan, steps / decision.steps - 1)

    def _compare(self, plan: _Plan, surprise: float) -> None:
        """Of a forward that brought so much more than expected, in shares of that."""
        plan.more = max(plan.more + surprise - _SLACK, 0.0)
        plan.fewer = max(plan.fewer - surprise - _SLACK, 0.0)
        if max(plan.more, plan.fewer) > _SURPRISE:
            self._acceptance.doubt()
            plan.forwards_left = 0

    def seconds_of_a_step(
        self, works: Mapping[int, float], count: int, *, optimistic: bool = False
    ) -> dict[int, float]:
        """What a static step takes in forwards of `count` sequences with so much work, by number of drafts; `optimistic`: if
        what is not known well turns out well.

        Empty where nothing is known.
        """
        curve, acceptance = self._costs.curve(self._machine, count), self._acceptance
        if not curve.known:
            return {}
        brought = sums(acceptance.useful(acceptance.reached(1.0 if optimistic else 0.0)))
        seconds = curve.hopeful_seconds if optimistic else curve.seconds
        return {drafts: seconds(work) / (count * brought[drafts]) for drafts, work in works.items()}

    def why(self) -> str:
        """What was chosen most often, and what that rests on; empty where nothing was."""
        plan, curve, drift = self._progress.plan, self._curve, self._costs.drift
        if plan is None:
            return ""
        (drafts, ahead), times = self.chosen.most_common(1)[0]
        text = f"mostly {described(drafts, ahead)} ({times} of {self.chosen.total()} forwards): "
        likely = [f"draft {j} is right {plan.expected.reached[j - 1]:.0%} of the time" for j in (2, 4, 8)]
        costs = [f"{k * plan.work:.0f} tokens {1e3 * drift * curve.seconds(k * plan.work):.1f}" for k in (1, 4, 16)]
        return f"{text}{', '.join(likely)}; a forward takes, in ms: {', '.join(costs)}"

    def _plan(self, outlook: AnyOutlook, count: int) -> _Plan:
        """Which drafts are worth their time in a usual forward of so many sequences."""
        progress, acceptance = self._progress, self._acceptance
        curve, reached, hopeful = self._curve, acceptance.reached(), acceptance.reached(1.0)
        useful, hoped = acceptance.useful(reached), acceptance.useful(hopeful)
        one = count * outlook.usual_work * progress.crowding
        seconds = {level: curve.seconds(one * level) for level in self._levels}
        brought = sums(useful)
        if progress.made.seconds > 0:
            # At least what simpler ways made: a rate that is too low makes time look cheap, and stays low by that.
            rate = max(each.steps / each.seconds for each in (progress.made, progress.static) if each.seconds)
            if progress.near.seconds > 0:
                near = progress.near.steps / progress.near.seconds
                rate = max(rate, near * min(sum(reached[:4]) / progress.near_likely, 1.0))
            rate *= THRIFT
        else:
            rate = max(count * brought[level] / seconds[level] for level in self._levels)
        longest = _FIRST_PLANS if progress.forwards < _EARLY else _LATER_PLANS
        forwards = min(max(progress.forwards // 4, 1), longest)
        foretold: dict[int, float] = {}
        if outlook.pooled:
            forwards_of = self._levels, count, one, outlook.usually_shown
            foretold = progress.pooled.foretold(*forwards_of, brought, curve.seconds)
            hopes = progress.pooled.foretold(*forwards_of, sums(hoped), curve.seconds)
            likely = progress.pooled.likely(foretold)
            rate = max(rate, THRIFT * max(likely.values()))
        worth, total, best, previous = [0.0, 0.0], 0.0, 0.0, 1
        wanted, build, hope, most_hope = 1, 1, 0.0, 0.0
        for level in self._levels[1:]:
            each = rate * (seconds[level] - seconds[previous]) / (count * (level - previous))
            for n in range(previous, level):
                total += useful[n] - each
                if total > best:
                    wanted, best = level, total
                worth.append(best)
                hope += hoped[n] - each
            if hope > most_hope:
                build, most_hope = level, hope
            previous = level
        if outlook.pooled:
            wanted, tried = progress.pooled.choose(likely, hopes, seconds)
            forwards = TRIED_FOR if tried else forwards
            worth = worth if wanted > 1 else [0.0] * len(worth)
            build = max(build, wanted)
        near = len(self._lookaheads) > 1 and progress.forwards % _NEAR_EVERY < _NEAR_FORWARDS
        return _Plan(rate, Expected(reached, useful, worth), brought, wanted, build, one, forwards, near, foretold)

    def _decide(
        self, outlooks: tuple[AnyOutlook, ...], other_work: float, plan: _Plan, trial: bool = False
    ) -> _Decision:
        most = 0
        for outlook in outlooks:
            most = max(most, outlook.drafts)
        levels = self._levels[: bisect.bisect_left(self._levels, most) + 1]
        groups = list(Counter(outlooks).items()) if len(outlooks) > 1 else [(outlooks[0], 1)]
        near, pooled = self._lookaheads[0], outlooks[0].pooled
        static = other_work  # showing what more drafts could reach is not static decoding's work
        for outlook, times in groups:
            static += times * outlook.work(1, near, 1)
        if pooled and not trial:
            best = self._wanted(groups, levels, other_work, plan)
        else:
            candidates = self._candidates(groups, levels, near, plan.wanted, other_work, plan)
            best = candidates[levels.index(min(plan.wanted, levels[-1]))] if pooled else max(candidates, key=_score)
            if not plan.only_near:  # about as many drafts are worth their time with a longer lookahead
                n = levels.index(best.level)
                for ahead in self._lookaheads[1:]:
                    candidates += self._candidates(
                        groups, levels[max(n - 1, 0) : n + 2], ahead, plan.wanted, other_work, plan
                    )
                best = best if pooled else max(candidates, key=_score)
        tried = False
        if trial:
            usual, best = best, self._trial(best, candidates, groups, plan)
            tried = best is not usual
        self._crowd(outlooks[0])
        steps = 0.0
        for outlook, times in groups:
            steps += times * plan.brought[outlook.forwarded(best.level)]
        choice = Choice(min(best.level, most), best.lookahead, max(plan.build, best.level), best.shown)
        return _Decision(choice, best.work, best.seconds, steps, self._curve.seconds(static), tried)

    def _wanted(
        self, groups: Sequence[tuple[AnyOutlook, int]], levels: Sequence[int], other_work: float, plan: _Plan
    ) -> _Candidate:
        """Pooled drafts: what is worth its time in a usual forward is so in all."""
        level, near = min(plan.wanted, levels[-1]), self._lookaheads[0]
        work = other_work
        for outlook, times in groups:
            work += times * outlook.work(level, near, plan.wanted)
        if plan.wanted > 1:
            had = sum(times * outlook.forwarded(level) for outlook, times in groups) / sum(times for _, times in groups)
            self._progress.pooled.had(had, plan.wanted)
        return _Candidate(0.0, level, near, plan.wanted, 0.0, work, self._curve.seconds(work))

    def _crowd(self, outlook: AnyOutlook) -> None:
        """Notes what all drafts in hand would take together."""
        if outlook.drafts > 1:
            crowding = outlook.work(outlook.drafts, 1, 1) / (outlook.drafts * outlook.usual_work)
            self._progress.crowding += 0.1 * (crowding - self._progress.crowding)

    def _candidates(
        self,
        groups: Sequence[tuple[AnyOutlook, int]],
        levels: Sequence[int],
        lookahead: int,
        shown: int,
        other_work: float,
        plan: _Plan,
    ) -> list[_Candidate]:
        """One for each number of drafts."""
        gains, works = [0.0] * len(levels), [other_work] * len(levels)
        for outlook, times in groups:
            for n, gain in enumerate(outlook.gains(levels, lookahead, shown, plan.expected)):
                gains[n] += times * gain
                works[n] += times * outlook.work(levels[n], lookahead, shown)
        seconds = self._curve.seconds
        found = []
        for level, gain, work in zip(levels, gains, works, strict=True):
            took = seconds(work)
            found.append(_Candidate(gain - plan.rate * took, level, lookahead, shown, gain, work, took))
        return found

    def _trial(
        self, best: _Candidate, candidates: list[_Candidate], groups: Sequence[tuple[AnyOutlook, int]], plan: _Plan
    ) -> _Candidate:
        """Another choice in the place of the best where it might be better, and the time that it may cost is allowed."""
        progress = self._progress
        allowance = progress.allowance
        if allowance is None:
            return best
        reached = self._acceptance.reached(1.0)
        hopeful = Expected(reached, self._acceptance.useful(reached), plan.expected.worth)
        tried, most = best, best.score
        for each in candidates:
            loss = (best.score - each.score) / plan.rate
            if each is best or min(loss, progress.most_allowance) > allowance:
                continue
            gain = 0.0
            for outlook, times in groups:
                gain += times * outlook.gains((each.level,), each.lookahead, each.shown, hopeful)[0]
            hope = gain - plan.rate * self._curve.optimistic_seconds(each.work)
            if hope > most:
                tried, most = each, hope
        progress.allowance = allowance - (best.score - tried.score) / plan.rate
        return tried
