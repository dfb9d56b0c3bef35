"""Which shape the next step of the graph executor has, where the number of drafts is chosen.

A step waits for what is decided before it, so everything else is done while the device runs: learning from the step before,
and weighing whether a shape that there is not yet is worth being made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from freedave.decode.acceptance import Chain
from freedave.decode.captured_steps import CapturedSteps
from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.draft_choice import Chosen, DraftChooser, described
from freedave.decode.outlook import ShapeOutlook
from freedave.decode.shapes import Shape, Shapes

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# How many drafts a step may have where that is chosen; the first shape, of which nothing is known yet, has `_FIRST_DRAFTS`.
DRAFTS, _FIRST_DRAFTS = (1, 2, 4, 8, 16), 8
# So often a new shape runs before it competes with others: it is prepared by the first two runs, and timed in the others.
_TRIAL_RUNS = 5
# A step whose result is fetched later than this share of its time has waited for that, so that its time is not known.
_PAUSE = 0.05


class _Step(NamedTuple):
    """A step that was chosen: the shapes that it could have had, by number of drafts, and those of them that were ready."""

    chosen: Chosen | None
    shapes: dict[int, Shape]
    ready: list[int]
    sequences: int
    left: int
    """Positions that its sequences have not committed."""


@dataclass(frozen=True)
class _Result:
    """What came of a step; `seconds`: None where they say nothing about steps like it."""

    step: _Step
    work: float
    seconds: float | None
    chains: list[Chain]


class ShapeChooser:
    """Chooses for one executor, whose shapes stay from decode to decode."""

    def __init__(self, lm: DiffusionLM, steps: CapturedSteps) -> None:
        self._lm = lm
        self._steps = steps
        self._missed: dict[Shape, float] = {}  # seconds that shapes would have saved which were not made
        self._new: set[Shape] = set()  # that are worth being made, until they have been timed

    def start(self, chooser: DraftChooser, shapes: Shapes) -> None:
        """A decode begins."""
        self._chooser = chooser
        self._shapes = shapes
        self._chosen: Counter[int] = Counter()
        self._step: _Step | None = None
        self._result: _Result | None = None
        self._work = 0.0

    @property
    def chosen(self) -> dict[str, int]:
        return {described(drafts, 0): times for drafts, times in sorted(self._chosen.items())}

    @property
    def reason(self) -> str:
        return self._chooser.why()

    def choose(self, sequences: list[DeviceSequence], alone: bool) -> Shape:
        """A shape that is ready, or one that is worth being made. `alone`: no other forward comes with the step, whose time
        would be taken for its own."""
        shapes = {drafts: self._shapes.together(sequences, drafts) for drafts in DRAFTS}
        ready = [drafts for drafts, shape in shapes.items() if self._steps.ready(shape)]
        new = [drafts for drafts, shape in shapes.items() if shape in self._new]
        possible, count = new[:1] or ready, len(sequences)
        if not possible:
            seconds = self._chooser.seconds_of_a_step(_works(shapes), count)
            possible = [min(seconds, key=seconds.__getitem__) if seconds else _FIRST_DRAFTS]
        tokens = tuple((drafts, shapes[drafts].tokens / count if drafts in possible else None) for drafts in DRAFTS)
        choice = self._chooser.choose([ShapeOutlook(each.num_drafts, tokens) for each in sequences])
        shape = shapes[self._lm.agreed([choice.drafts])[0]]
        self._chosen[shape.drafts] += 1
        self._work = float(shape.tokens) if alone and self._steps.ready(shape) else 0.0
        left = sum(each.total - each.committed for each in sequences)
        self._step = _Step(self._chooser.last, shapes, ready, count, left)
        return shape

    def found(self, seconds: float, waited: float, chains: list[Chain]) -> None:
        """What came of the step that was chosen last: it took so many seconds, after which its result `waited` for others."""
        self.learn()
        if self._step is not None:
            timed = self._work > 0 and waited <= _PAUSE * seconds
            self._result = _Result(self._step, self._work, seconds if timed else None, chains)
        self._step = None

    def learn(self) -> None:
        """From the last result that was found."""
        result, self._result = self._result, None
        if result is None:
            return
        self._chooser.learn(result.work, result.seconds, result.chains, result.step.chosen)
        for shape in [shape for shape in self._new if self._steps.runs(shape) >= _TRIAL_RUNS]:
            self._new.remove(shape)
            del self._missed[shape]
        if result.step.ready and not self._new.intersection(result.step.shapes.values()):
            self._weigh(result)

    def _weigh(self, result: _Result) -> None:
        """Whether a shape that is not ready is worth being made.

        It is once that takes no longer than the shape would have saved so far, if it takes as little as it may, and what it
        is expected to save of the time that is left. Who does not know how much is to come then pays twice of what was
        necessary at most.
        """
        step = result.step
        if len(step.ready) == len(DRAFTS):
            return
        works = _works(step.shapes)
        expected = self._chooser.seconds_of_a_step(works, step.sequences)
        if not expected:
            return
        least = self._chooser.seconds_of_a_step(works, step.sequences, optimistic=True)
        fastest, price = min(expected[drafts] for drafts in step.ready), self._steps.new_seconds
        done = sum(each.steps for each in result.chains)
        worth = {}
        for drafts in expected.keys() - set(step.ready):
            shape = step.shapes[drafts]
            missed = max(self._missed.get(shape, 0.0) + done * (fastest - least[drafts]), 0.0)
            self._missed[shape] = missed
            saves = missed + max(step.left * (fastest - expected[drafts]), 0.0)
            if saves > price:
                worth[shape] = saves
        if worth:
            self._new.add(max(worth, key=worth.__getitem__))


def _works(shapes: dict[int, Shape]) -> dict[int, float]:
    return {drafts: float(shape.tokens) for drafts, shape in shapes.items()}
