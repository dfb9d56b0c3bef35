"""What one forward computes, for all drafts of all sequences: a packed row of tokens.

The row holds runs of tokens, one after the other: a block of a draft, a whole draft, a prompt. `groups` says which keys of
this forward each run attends to, `contexts` which stored ones; it sees no others. So a draft's result does not depend on what
else is packed, and no run is padded to the length of another.

Drafts can be many more tokens than static decoding computes at a time. Then they are divided among several calls of the
model, so that the memory of a forward stays near that of static decoding. The results are the same.
"""

from __future__ import annotations

import array
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from freedave.forward.cache import KeyValueCache, Write

# On a CPU a matrix product computes four rows at a time, and the last one to three rows by other code, which rounds
# differently. So rows are padded to a multiple of four. Then the bits of a row do not depend on how many others there are
# (float32, in MKL's strict mode; `reproducible_products.py`).
ROWS_TOGETHER = 4

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

    `joined`: they are copied next to the runs' own keys, so that one kernel call serves both. On a CPU a second call and
    the merge take longer than copying a short prefix for a dozen runs. Whether they are joined depends on the sequence
    alone, not on how many of its drafts are computed: a draft's bits must not depend on that either. `by_block`: these runs
    see their own tokens block by block. That needs a mask, which covers no stored keys, so that they are not joined.
    """

    slot: int
    ranges: list[tuple[int, int]]
    by_block: bool = False
    joined: bool = False


@dataclass
class RunGroup(Runs):
    """How runs attend to the keys of this forward.

    `keys [count * n]`: the tokens that each run attends to, one run after the other; None: its own. `block_length`: a run
    sees its own tokens block by block, blocks aligned at its first token; None: all of them. `context`: the stored keys
    that these runs attend to as well; a context belongs to one or more whole groups.
    """

    keys: torch.Tensor | None = None
    block_length: int | None = None
    context: Context | None = None


@dataclass
class PackedForward:
    """One call of the model: tokens and positions `[1, T]`, what they attend to, and what the cache keeps of them.

    The cache retains the tokens from `retain` on until the next forward.
    Groups cover the tokens in order, without gaps; contexts some of them. Without a cache, every run sees itself alone.
    `masks` holds the block-causal masks made so far.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    groups: list[RunGroup]
    contexts: list[Context]
    writes: list[Write]
    retain: int
    cache: KeyValueCache | None
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass
class Prediction:
    """Where predictions come from: row `logits_row[n]` of the packed forward belongs to place `place[n]` of the flattened
    drafts `[B, J, L]`. There may be more rows than places: those are padding to a multiple of `ROWS_TOGETHER`.
    """

    logits_row: torch.Tensor
    place: torch.Tensor


@dataclass
class _Call:
    """What a builder has collected of one call of the model."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    groups: list[RunGroup] = field(default_factory=list)
    chained: list[tuple[RunGroup, list[int]]] = field(default_factory=list)
    """Groups that attend to more than their own keys."""
    contexts: list[Context] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    retain_from: int | None = None

    @property
    def retained(self) -> int:
        return len(self.tokens) if self.retain_from is None else self.retain_from


class ForwardBuilder:
    """Collects the runs of one forward on the host; `build` uploads everything in one copy.

    `drafts`, `length`: J and L of the drafts `[B, J, L]` that predictions are made for. `most_tokens`: how many tokens a call
    of the model may have, as far as policies divide what they add (`make_room`, `divide`); None: everything is one call.
    Tokens are counted from the beginning of their call.
    """

    def __init__(self, drafts: int, length: int, most_tokens: int | None = None) -> None:
        self._drafts = drafts
        self._length = length
        self._most_tokens = most_tokens
        self._calls = [_Call()]

    @property
    def retained(self) -> int:
        """The first token whose keys and values are retained."""
        return self._calls[-1].retained

    @property
    def tokens(self) -> int:
        """Tokens so far: where the next run begins."""
        return len(self._calls[-1].tokens)

    def make_room(self, tokens: int) -> None:
        """Begins another call of the model if this one has too little room; what is stored before, it can read."""
        if self._most_tokens is not None and self.tokens and self.tokens + tokens > self._most_tokens:
            self._calls.append(_Call())

    def divide(self, runs: Sequence[int], length: int) -> Iterator[Sequence[int]]:
        """Divides runs of `length` tokens among calls: as few groups as there is room for, of nearly equal size.

        Each group is to be added before the next one is asked for. A run that is too long by itself is a group.
        """
        self.make_room(len(runs) * length)
        count = 1
        if self._most_tokens is not None:
            count = math.ceil(len(runs) / max(self._most_tokens // length, 1))
        bounds = [len(runs) * n // count for n in range(count + 1)]
        for first, end in itertools.pairwise(bounds):
            self.make_room((end - first) * length)
            yield runs[first:end]

    def add(
        self,
        runs: list[list[int]],
        first_position: int,
        *,
        keys: list[int] | None = None,
        block_length: int | None = None,
    ) -> int:
        """Appends runs of equal length at the same positions; returns the first one's first token."""
        call = self._calls[-1]
        begin, length = len(call.tokens), len(runs[0])
        call.tokens.extend(itertools.chain.from_iterable(runs))
        call.positions.extend(list(range(first_position, first_position + length)) * len(runs))
        group = RunGroup(begin, len(runs), length, block_length=block_length)
        call.groups.append(group)
        if keys is not None:
            call.chained.append((group, keys))
        return begin

    def attend(self, begin: int, count: int, length: int, slot: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Lets runs, all that were added from token `begin` on, attend to stored keys."""
        ranges = [(first, end) for first, end in ranges if first < end]
        if not ranges:
            return
        context = Context(begin, count, length, slot, ranges)
        self._calls[-1].contexts.append(context)
        for group in reversed(self._calls[-1].groups):
            if group.begin < begin:
                break
            group.context = context
            context.by_block |= group.block_length is not None

    def store(self, begin: int, count: int, slot: int, at: int) -> None:
        """Stores keys and values of tokens."""
        if count:
            self._calls[-1].writes.append(Write(begin, count, slot, at))

    def retain_from(self, begin: int) -> None:
        """Keeps the keys and values of all tokens from `begin` on until the next forward (the first of several decides)."""
        call = self._calls[-1]
        if call.retain_from is None:
            call.retain_from = begin

    def predict(self, sequence: int, draft: int, positions: Iterable[int], rows: Iterable[int]) -> None:
        """Draft `draft` of the `sequence`-th sequence is predicted at window `positions` by these rows' logits."""
        offset = (sequence * self._drafts + draft) * self._length
        self._calls[-1].places.extend(offset + position for position in positions)
        self._calls[-1].rows.extend(rows)

    def predict_masked(
        self,
        sequence: int,
        begin: int,
        first_places: list[tuple[int, int]],
        length: int,
        mask: int,
        rows_before: list[int] | None = None,
    ) -> None:
        """Runs of `length` tokens from `begin` on predict their own masked tokens.

        `first_places[n]`: the draft, and the window position, that run n begins with. With shifted logits, each token is
        predicted by the row before it, and run n's first token by row `rows_before[n]`.
        """
        offsets = [
            (sequence * self._drafts + draft) * self._length + position - n * length
            for n, (draft, position) in enumerate(first_places)
        ]
        call = self._calls[-1]
        tokens = call.tokens[begin : begin + len(first_places) * length]
        masked = [i for i, token in enumerate(tokens) if token == mask]
        if rows_before is None:
            call.rows.extend([begin + i for i in masked])
        else:
            call.rows.extend([begin + i - 1 if i % length else rows_before[i // length] for i in masked])
        call.places.extend([offsets[i // length] + i for i in masked])

    def build(
        self, drafts: list[list[int]], numbers: list[int], device: torch.device, cache: KeyValueCache | None
    ) -> tuple[list[tuple[PackedForward, Prediction]], torch.Tensor, torch.Tensor]:
        """The calls of the model in order, with what each predicts, `drafts [B, J, L]` (given as `B * J` rows) and `numbers`.

        All tensors are on the device.
        """
        parts = [numbers]
        for call in self._calls:
            call.rows.extend(call.rows[-1:] * (-len(call.rows) % ROWS_TOGETHER))
            parts += [call.tokens, call.positions, call.rows, call.places, *(keys for _, keys in call.chained)]
        sizes = [len(part) for part in parts]
        flat: list[int] = []
        for part in itertools.chain(parts, drafts):
            flat += part
        # array.array converts a list of integers several times as fast as torch.tensor.
        uploaded = torch.frombuffer(array.array("q", flat), dtype=torch.int64).to(device)
        sizes.append(len(drafts) * self._length)
        numbers_there, *tensors, draft_ids = uploaded.split(sizes)
        calls, remaining = [], iter(tensors)
        for call in self._calls:
            tokens, positions, rows, places = itertools.islice(remaining, 4)
            for group, _ in call.chained:
                group.keys = next(remaining)
            if device.type == "cpu":
                for context in call.contexts:
                    stored = sum(end - begin for begin, end in context.ranges)
                    context.joined = stored <= JOINED_KEYS and not context.by_block
            forward = PackedForward(
                tokens[None], positions[None], call.groups, call.contexts, call.writes, call.retained, cache
            )
            calls.append((forward, Prediction(rows, places)))
        return calls, draft_ids.view(-1, self._drafts, self._length), numbers_there
