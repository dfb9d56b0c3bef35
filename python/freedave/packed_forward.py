"""What one model forward computes, for all drafts of all sequences: a single packed row of tokens.

Runs of equal length (a block of a draft, a whole draft, a prompt) lie one after the other in that row. No run sees another
one unless it is told to: `windows` says which keys of this forward each run attends to, `contexts` which stored ones. So a
draft's result does not depend on what else is packed, and no run is padded to the length of another.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from freedave.cache import KeyValueCache, Write

# On a CPU, up to this many stored keys are copied next to each run's own.
JOINED_KEYS = 128


@dataclass
class Runs:
    """`count` runs of `length` tokens, from token `begin` of the forward on."""

    begin: int
    count: int
    length: int

    @property
    def end(self) -> int:
        return self.begin + self.count * self.length

    def covers(self, other: Runs) -> bool:
        """Whether these are the same runs."""
        return (self.begin, self.count, self.length) == (other.begin, other.count, other.length)


@dataclass
class Context(Runs):
    """How runs attend to stored keys: those of `slot` at each of `ranges`, for all runs alike.

    `joined`: they are copied next to the runs' own keys. On a CPU a second kernel call and the merge take longer than copying
    a short prefix for a dozen runs. The choice depends on the sequence alone, not on how many of its drafts are computed, so
    that their results do not.
    """

    slot: int
    ranges: list[tuple[int, int]]
    joined: bool = False


@dataclass
class Window(Runs):
    """How runs attend to the keys of this forward.

    `keys [count * n]`: the tokens that each run attends to, one run after the other; None: its own. `block_length`: a run
    sees its own tokens block by block, blocks aligned at its first token; None: all of them. `context`: the stored keys
    that these runs attend to as well; a context belongs to one or more whole windows.
    """

    keys: torch.Tensor | None = None
    block_length: int | None = None
    context: Context | None = None


@dataclass
class PackedForward:
    """One forward: tokens and positions `[1, T]`, what they attend to, and what the cache keeps of them.

    The cache retains the tokens from `retain` on until the next forward.
    Windows cover the tokens in order, without gaps; contexts some of them. `masks` holds the block-causal masks made so far.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    windows: list[Window]
    contexts: list[Context]
    writes: list[Write]
    retain: int
    cache: KeyValueCache | None
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def is_rectangle(self) -> bool:
        """Whether it is nothing but drafts of equal length, which see themselves alone."""
        return len(self.windows) == 1 and self.windows[0].keys is None and self.cache is None


@dataclass
class Prediction:
    """Where predictions come from: row `logits_row[n]` of the packed forward belongs to place `place[n]` of the flattened
    drafts `[B, J, L]`."""

    logits_row: torch.Tensor
    place: torch.Tensor


class ForwardBuilder:
    """Collects the runs of one forward on the host; `build` uploads everything in one copy.

    `drafts`, `length`: J and L of the drafts `[B, J, L]` that predictions are made for.
    """

    def __init__(self, drafts: int, length: int) -> None:
        self._drafts = drafts
        self._length = length
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._rows: list[int] = []
        self._places: list[int] = []
        self._windows: list[Window] = []
        self._chained: list[tuple[Window, list[int]]] = []  # windows that attend to more than their own keys
        self._contexts: list[Context] = []
        self._writes: list[Write] = []
        self._retain_from: int | None = None

    @property
    def retained(self) -> int:
        """The first token whose keys and values are retained."""
        return len(self._tokens) if self._retain_from is None else self._retain_from

    @property
    def tokens(self) -> int:
        """Tokens so far: where the next run begins."""
        return len(self._tokens)

    def add(
        self,
        runs: list[list[int]],
        first_position: int,
        *,
        keys: list[int] | None = None,
        block_length: int | None = None,
    ) -> int:
        """Appends runs of equal length at the same positions; returns the first one's first token."""
        begin, length = len(self._tokens), len(runs[0])
        self._tokens.extend(itertools.chain.from_iterable(runs))
        self._positions.extend(list(range(first_position, first_position + length)) * len(runs))
        window = Window(begin, len(runs), length, block_length=block_length)
        self._windows.append(window)
        if keys is not None:
            self._chained.append((window, keys))
        return begin

    def attend(self, begin: int, count: int, length: int, slot: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Lets runs, all that were added from token `begin` on, attend to stored keys."""
        ranges = [(first, end) for first, end in ranges if first < end]
        if not ranges:
            return
        context = Context(begin, count, length, slot, ranges)
        self._contexts.append(context)
        for window in reversed(self._windows):
            if window.begin < begin:
                break
            window.context = context

    def store(self, begin: int, count: int, slot: int, at: int) -> None:
        """Stores keys and values of tokens."""
        if count:
            self._writes.append(Write(begin, count, slot, at))

    def retain_from(self, begin: int) -> None:
        """Keeps the keys and values of all tokens from `begin` on until the next forward (the first call decides)."""
        if self._retain_from is None:
            self._retain_from = begin

    def predict(self, sequence: int, draft: int, positions: Iterable[int], rows: Iterable[int]) -> None:
        """Draft `draft` of the `sequence`-th sequence is predicted at window `positions` by these rows' logits."""
        offset = (sequence * self._drafts + draft) * self._length
        self._places.extend(offset + position for position in positions)
        self._rows.extend(rows)

    def predict_masked(
        self, sequence: int, begin: int, first_places: list[tuple[int, int]], length: int, mask: int
    ) -> None:
        """Runs of `length` tokens from `begin` on predict their own masked tokens.

        `first_places[n]`: the draft, and the window position, that run n begins with.
        """
        offsets = [
            (sequence * self._drafts + draft) * self._length + position - n * length
            for n, (draft, position) in enumerate(first_places)
        ]
        masked = [
            i for i, token in enumerate(self._tokens[begin : begin + len(first_places) * length]) if token == mask
        ]
        self._rows.extend([begin + i for i in masked])
        self._places.extend([offsets[i // length] + i for i in masked])

    def build(
        self, drafts: list[list[int]], numbers: list[int], device: torch.device, cache: KeyValueCache | None
    ) -> tuple[PackedForward, Prediction, torch.Tensor, torch.Tensor]:
        """The forward, its predictions, `drafts [B, J, L]` (given as `B * J` rows) and `numbers`, on the device."""
        keys = [keys for _, keys in self._chained]
        parts = [self._tokens, self._positions, self._rows, self._places, numbers, *keys]
        sizes = [len(part) for part in parts]
        flat: list[int] = []
        for part in itertools.chain(parts, drafts):
            flat += part
        # An array takes a list of integers several times as fast as torch.tensor does.
        uploaded = torch.frombuffer(array.array("q", flat), dtype=torch.int64).to(device)
        sizes.append(len(drafts) * self._length)
        tokens, positions, rows, places, numbers_there, *key_tensors, draft_ids = uploaded.split(sizes)
        if device.type == "cpu":
            for context in self._contexts:
                context.joined = sum(end - begin for begin, end in context.ranges) <= JOINED_KEYS
        for (window, _), tensor in zip(self._chained, key_tensors, strict=True):
            window.keys = tensor
        forward = PackedForward(
            tokens[None], positions[None], self._windows, self._contexts, self._writes, self.retained, cache
        )
        return forward, Prediction(rows, places), draft_ids.view(-1, self._drafts, self._length), numbers_there
