"""Simulated machines and models for `draft_steps="auto"`: forwards of given time, drafts accepted as often as given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from freedave.decode.acceptance import MOST_DRAFTS, Chain
from freedave.decode.draft_choice import Choice, DraftChooser
from freedave.decode.outlook import Outlook, outlook

Machine = Callable[[float], float]  # seconds of a forward, by its work
Noise = Callable[[int, random.Random], float]  # how much longer a forward takes than it should
Model = Callable[[int, int], float]  # how likely draft j > 0 is right if those before are; also by the tokens so far


@dataclass
class Fixed:
    """A fixed number of drafts, in the place of a chooser."""

    drafts: int
    lookahead: int

    def choose(self, outlooks: list[Outlook]) -> Choice:
        return Choice(self.drafts, self.lookahead, self.drafts, self.drafts)

    def learn(self, *_: object) -> None:
        pass


@dataclass
class Simulated:
    """A sequence of blocks: `open_now` masked positions in the current one; drafts fill a position each."""

    block: int
    drafts: int = 1
    open_now: int = 0
    complete: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.open_now = self.open_now or self.block

    def outlook(self) -> Outlook:
        return outlook(self.drafts, self.open_now, 1 << 20, self.block, 1, self.complete * self.block, None, 0.0)

    def accept(self, steps: int, choice: Choice) -> None:
        """`steps` drafts were right, of which the last one's predictions go as far as `choice` says."""
        follows = self.outlook().follows(choice.lookahead, choice.shown)[steps - 1]
        self.tokens += steps
        # The new draft 0 is the target of the draft that was accepted last.
        filled, self.complete = steps, 0
        while filled >= self.open_now:
            self.complete = int(filled == self.open_now)
            filled -= self.open_now
            self.open_now = self.block
        self.open_now -= filled
        self.drafts = min(follows, choice.build)


@dataclass
class Run:
    """What a decode took: by forward, the tokens after it and the seconds until then."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def speed(self, first: int, end: int) -> float:
        """Tokens a second, from about the `first` token to the `end`-th."""
        a = next(i for i, tokens in enumerate(self.tokens) if tokens >= first)
        b = next(i for i, tokens in enumerate(self.tokens) if tokens >= end)
        return (self.tokens[b] - self.tokens[a]) / (self.seconds[b] - self.seconds[a])


def simulate(
    chooser: DraftChooser | Fixed,
    machine: Machine,
    model: Model,
    *,
    tokens: int,
    block: int = 16,
    batch: int = 1,
    noise: Noise = lambda forward, draw: 1.0,
    seed: int = 0,
) -> Run:
    """Decodes `tokens` a sequence. Only the chooser sees the noise; the run's seconds are without.

    How hard each token is to foresee depends on the seed alone, so that all ways of choosing have the same luck.
    """
    draw, disturbed = random.Random(seed), random.Random(seed + 1)
    sequences = [Simulated(block, open_now=draw.randint(1, block)) for _ in range(batch)]
    hard = [[draw.random() for _ in range(tokens + 64 * MOST_DRAFTS)] for _ in range(batch)]
    run, seconds = Run(), 0.0
    while sum(sequence.tokens for sequence in sequences) < (tokens + 1) * batch:
        choice = chooser.choose([sequence.outlook() for sequence in sequences])
        work = sum(sequence.outlook().work(choice.drafts, choice.lookahead, choice.shown) for sequence in sequences)
        took = machine(work)
        chains = []
        for sequence, hardness in zip(sequences, hard, strict=True):
            drafts = min(choice.drafts, sequence.drafts)
            steps = 1
            while steps < drafts and hardness[sequence.tokens + steps] < model(steps, sequence.tokens):
                steps += 1
            chains.append(Chain(drafts, steps, steps))
            sequence.accept(steps, choice)
        chooser.learn(work, took * noise(len(run.tokens), disturbed), chains)
        seconds += took
        run.tokens.append(sum(sequence.tokens for sequence in sequences) // batch)
        run.seconds.append(seconds)
        run.choices.append(choice)
    return run


FIXED = [(k, ahead) for k in (1, 2, 4, 8, MOST_DRAFTS) for ahead in ((1, k) if k > 1 else (1,))]
