"""Decoding with all state on the device: a step is one sequence of launches of fixed shapes, which a CUDA graph holds.

The planned executor (`planned_executor.py`) plans each forward on the host, so that it computes as little as possible. Where
launches cost more than arithmetic (a GPU at small batch) this is the other way: a step forwards K drafts of a window for
every slot, and everything from its input to the next drafts stays in the same tensors. The host chooses which step to
replay next, from the record that it reads of the last one, and does nothing else.

A step's forward has F tokens a draft, from `begin` on; predictions, verification and drafting look at a window of L of them:

| cache | F tokens from | stored keys that they see | window |
|---|---|---|---|
| exact | the window's start | everything before it | blocks that the drafts can reach |
| none | position 0 | none | the same |
| dual | the block's start, the block alone | everything before and after it | the block |
| prefix | the block's start, to the end | everything before it | the block |

A sequence's first forward also carries its prompt, and with "dual" and "prefix" the first of each block carries the whole
sequence; these are steps of one slot, with one draft.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.executor import Found
from freedave.decode.sequence import Sequence
from freedave.decode.settings import Settings
from freedave.decode.shapes import Shape, Shapes
from freedave.forward.compiled_layers import compiled_layers, is_compile_error
from freedave.forward.prediction import Predictor
from freedave.forward.window_attention import WindowAttention, attention_modules, layer_buffers
from freedave_kernels import DraftStep, draft_step, keep
from freedave_kernels.contract import COUNTERS, RecordLayout

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

logger = logging.getLogger(__name__)

# The settings that a captured step holds; the others concern the host.
_FIXED = ("draft_steps", "block_length", "tokens_per_step", "order", "threshold", "drafting", "cache", "compile")

# Stands at positions beyond a sequence: never predicted, and nobody's token.
_NOTHING = -1

# The confidence of a position that has to rank first: with shifted logits a block's first one is committed by its refresh.
_FIRST = torch.finfo(torch.float32).max


@dataclass
class _Step:
    """A shape's buffers, and how often it ran: first as it is, then captured, then replayed."""

    window: list[torch.Tensor]
    record: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    runs: int = 0


@dataclass
class Launched:
    """A step under way: its sequences, their rows of `record [R, 11 + 3 L]`, and the length L of its window."""

    sequences: list[DeviceSequence]
    rows: list[int]
    record: torch.Tensor
    window: int


class GraphExecutor:
    """The device state of `slots` sequences of up to `capacity` positions, and the steps that advance it.

    Args:
        lm: a transformers model. settings: as `resolve_settings` makes them.
        capture: whether steps are captured in CUDA graphs; None: on a GPU. Without, they run launch by launch.

    Device state, in place throughout: `drafts [S, K, L]`, and `[S]` each: `num_drafts` (0 where a slot is empty, or waits
    for a forward of its own), `start` of the window, `begin` of the sequence's own forward, `length` of the sequence,
    `steps_taken`. `tokens [S, *]` is what is committed; with an exact cache, the prompt.
    """

    def __init__(
        self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int, capture: bool | None = None
    ) -> None:
        on_gpu = lm.device.type == "cuda"
        self.positions_computed = 0
        self.forward_seconds = 0.0
        self._lm = lm
        self._settings = settings
        self._slots = slots
        self._capacity = capacity
        self._layers = None
        if on_gpu if settings.compile is None else settings.compile:
            self._layers = compiled_layers(lm)
        self._capture = on_gpu if capture is None else capture
        self._shapes = Shapes(settings, slots, capacity)
        self._one_block = self._shapes.one_block
        self._stores = settings.cache != "none"
        self._size = settings.block_length
        self._length = self._shapes.longest_window
        self._weights = _addresses(lm.model)  # which captured steps read
        self._predict = Predictor(lm)
        self._steps: dict[Shape, _Step] = {}
        self._ran: Counter[Shape] = Counter()
        self._launched: list[Launched] = []
        self._stored_only: list[DeviceSequence] = []
        self._pool: Any = None
        self._modules = attention_modules(lm.model)
        layers, groups, features, self._dtype = lm.key_layout()
        self._layout = (groups, features)
        stored = (layers, slots, capacity if self._stores else 1, groups, features)
        self._stored = [torch.empty(stored, dtype=self._dtype, device=lm.device) for _ in range(2)]

        def integers(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=lm.device)

        self.tokens = integers(slots, 2 * (capacity + self._length), fill=_NOTHING)
        self.drafts = integers(slots, settings.draft_steps, self._length, fill=_NOTHING)
        self.num_drafts, self.start, self.begin = integers(slots), integers(slots), integers(slots)
        self.length, self.steps_taken = integers(slots), integers(slots)
        self._row = integers(1)
        self._most_drafts = integers(1, fill=settings.active_drafts or settings.draft_steps)
        # Never written: positions from 0 on, runs of a forward, ranges without positions, and what no block has yet.
        self._columns = torch.arange(capacity + 2 * self._length, device=lm.device)
        self._runs = torch.arange(slots * settings.draft_steps, device=lm.device)
        self._nothing = torch.zeros(slots, 1, 2, dtype=torch.int32, device=lm.device)
        self._no_block = integers(slots, 1, self._length, fill=_NOTHING)

    def serves(self, settings: Settings, slots: int, capacity: int) -> bool:
        """Whether its steps are those of other settings, for as many sequences of up to `capacity` positions."""
        fixed = all(getattr(settings, name) == getattr(self._settings, name) for name in _FIXED)
        window = Shapes(settings, slots, capacity).longest_window
        fits = slots == self._slots and capacity <= self._capacity and window == self._length
        return fixed and fits and self._weights == _addresses(self._lm.model)

    def reset(self, settings: Settings) -> None:
        """Empties all slots, for a decode with settings that it `serves`."""
        self._settings = settings
        self._shapes = Shapes(settings, self._slots, self._capacity)
        self._ran.clear()
        self.positions_computed = 0
        self.forward_seconds = 0.0
        with torch.inference_mode():
            self.drafts.fill_(_NOTHING)
            for state in (self.num_drafts, self.start, self.begin, self.length):
                state.zero_()
            self._most_drafts.fill_(settings.active_drafts or settings.draft_steps)

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return sum(part.numel() * part.element_size() for part in self._stored) if self._stores else 0

    @property
    def shapes(self) -> dict[str, int]:
        return {str(shape): runs for shape, runs in self._ran.items()}

    # What the host tells the device, between steps.

    def enter(self, index: int, slot: int, prompt: list[int], settings: Settings) -> DeviceSequence:
        sequence = DeviceSequence(index, slot, prompt, settings, self._lm.mask_token_id)
        start, length = sequence.start, len(sequence.tokens)
        with torch.inference_mode():
            tokens = torch.tensor(sequence.tokens, device=self._lm.device)
            self.tokens[slot] = _NOTHING
            self.tokens[slot, :length] = tokens
            self.drafts[slot] = _NOTHING
            if not sequence.waits:
                window = tokens[start : start + self._length]
                self.drafts[slot, :, : len(window)] = window
            self.num_drafts[slot] = int(not sequence.waits)
            self.start[slot], self.length[slot] = start, length
            self.begin[slot] = self.steps_taken[slot] = 0
        return sequence

    def leave(self, sequence: Sequence) -> None:
        with torch.inference_mode():
            self.drafts[sequence.slot] = _NOTHING
            for state in (self.num_drafts, self.start, self.begin, self.length):
                state[sequence.slot] = 0

    # Steps.

    def launch(self, sequences: list[Sequence]) -> None:
        began = time.perf_counter()
        own = [sequence for sequence in sequences if isinstance(sequence, DeviceSequence)]  # all of them
        self._launched, self._stored_only = [], []
        together = [sequence for sequence in own if not sequence.waits]
        if together:
            shape = self._shapes.together(together)
            rows = [sequence.slot for sequence in together]
            self._launched.append(Launched(together, rows, self._run(shape), shape.window))
        for sequence in self._with_own_forward(own):
            if self._ends_in_chunk(sequence):
                shape = self._shapes.own(sequence)
                self._launched.append(Launched([sequence], [0], self._run(shape, sequence.slot), shape.window))
                sequence.waits = False
            else:
                self._store_chunk(sequence)
                self._stored_only.append(sequence)
        self.forward_seconds += time.perf_counter() - began

    def _with_own_forward(self, sequences: list[DeviceSequence]) -> list[DeviceSequence]:
        """Those that wait for a forward of their own and have it now: prompts of `prefill_chunk` tokens at most."""
        most, tokens = self._settings.prefill_chunk, 0
        chosen = []
        for sequence in sequences:
            if sequence.waits:
                count = self._prompt_tokens(sequence)
                if tokens and most is not None and tokens + count > most:
                    break
                tokens += count
                chosen.append(sequence)
        return chosen

    def _prompt_tokens(self, sequence: DeviceSequence) -> int:
        """How many positions of the prompt the next forward stores."""
        if self._settings.cache != "exact":
            return 0
        missing, chunk = sequence.start - sequence.stored, self._settings.prefill_chunk
        return missing if chunk is None else min(missing, max(chunk // self._size, 1) * self._size)

    def _ends_in_chunk(self, sequence: DeviceSequence) -> bool:
        """Whether what is left of the prompt rides along with the first prediction."""
        return self._one_block or sequence.stored + self._prompt_tokens(sequence) >= sequence.start

    def read(self) -> list[Found]:
        began = time.perf_counter()
        for sequence in self._stored_only:
            sequence.accepted_lengths.append(0)
        found = []
        for launched in self._launched:
            layout = RecordLayout.of(launched.window, self._settings.draft_steps)
            rows = launched.record.tolist()
            for sequence, row in zip(launched.sequences, launched.rows, strict=True):
                found.append(Found(sequence, rows[row], layout, launched.window))
        self.forward_seconds += time.perf_counter() - began
        return found

    def advance(self, found: Found, forward: int) -> list[int]:
        assert isinstance(found.sequence, DeviceSequence)
        first = found.layout.drafts.start
        draft = found.record[first : first + found.window]
        return found.sequence.advance(draft, found.record, found.record[found.layout.step_map], forward)

    def settle(self) -> None:
        """The step has kept what it keeps."""

    def _store_chunk(self, sequence: DeviceSequence) -> None:
        """Stores a long prompt's next chunk; other sequences need not wait for all of it."""
        count, done = self._prompt_tokens(sequence), sequence.stored
        shape = Shape(1, 1, count, 0, one=True, whole=True)
        window = self._window_buffers(shape)
        self._row.fill_(sequence.slot)
        begin, one = torch.full_like(self._row, done), torch.ones_like(self._row)
        with layer_buffers(self._modules, self._stored, window):
            tokens = self.tokens[sequence.slot, done : done + count][None, None]
            positions = self._columns[done : done + count][None, None]
            self._forward(shape, tokens, positions, begin, begin, one)
            self._keep(shape, window, 0 * one, begin, count * one)
        self.positions_computed += count
        sequence.stored = done + count
        self.begin[sequence.slot] = done + count

    def _run(self, shape: Shape, slot: int | None = None) -> torch.Tensor:
        """Runs a step, by replaying it where it has been captured; its record."""
        if slot is not None:
            self._row.fill_(slot)
        self.positions_computed += shape.rows * shape.drafts * shape.forward
        # A prompt's length is its own, so that its forward is no shape to keep.
        passing = shape.one and self._settings.cache == "exact"
        step = _Step(self._window_buffers(shape)) if passing else self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = _Step(self._window_buffers(shape))
            if self._layers is not None or self._capture:
                logger.info("a new shape, which takes a moment: %s", shape)
        step.runs += 1
        self._ran.update([] if passing else [shape])
        # The first run compiles, and loads kernels; the second is captured.
        if self._capture and not passing and step.runs > 1 and step.graph is None:
            self._record(shape, step)
        if step.graph is None:
            return self._by_launches(shape, step, compiled=not passing)
        assert step.record is not None
        step.graph.replay()
        # Graphs share their memory: the next one's intermediate results may lie where this one's record does.
        return step.record.clone()

    def _by_launches(self, shape: Shape, step: _Step, *, compiled: bool) -> torch.Tensor:
        """Runs a step launch by launch."""
        with layer_buffers(self._modules, self._stored, step.window):
            if compiled and self._layers is not None:
                try:
                    with self._layers.instead():
                        return self._step(shape, step.window)
                except Exception as error:
                    if not is_compile_error(error):
                        raise
                    self._layers = None
                    warnings.warn(f"{self._lm.name} does not compile, so it runs uncompiled: {error}", stacklevel=2)
            return self._step(shape, step.window)

    def _record(self, shape: Shape, step: _Step) -> None:
        """Captures a step, without running it."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step.record = self._by_launches(shape, step, compiled=True)
        except RuntimeError as error:  # a model that reads back what it computes, say
            self._capture = False
            warnings.warn(f"{self._lm.name} cannot be captured, so it runs launch by launch: {error}", stacklevel=2)
        else:
            step.graph = graph

    def _window_buffers(self, shape: Shape) -> list[torch.Tensor]:
        size = (len(self._modules), shape.rows, shape.drafts, shape.forward, *self._layout)
        return [torch.empty(size, dtype=self._dtype, device=self._lm.device) for _ in range(2)]

    # What a step does, on the device.

    def _taken(self, state: torch.Tensor, shape: Shape) -> torch.Tensor:
        return state.index_select(0, self._row) if shape.one else state

    def _put(self, state: torch.Tensor, values: torch.Tensor, shape: Shape) -> None:
        if shape.one:
            state.index_copy_(0, self._row, values)
        elif values is not state:  # which was changed in place
            state.copy_(values)

    def _step(self, shape: Shape, window: list[torch.Tensor]) -> torch.Tensor:
        """One forward, and everything up to the next drafts. Reads nothing back; the record `[R, 11 + 3 L]`."""
        settings, lm = self._settings, self._lm
        start = self._taken(self.start, shape)
        begin = self._taken(self.begin, shape) if shape.whole else start
        number = torch.ones_like(self._row) if shape.one else self.num_drafts
        drafts = self._drafts(shape, start)
        known = drafts.clamp(min=0)  # any token, where there is no position
        inputs, positions, rows = self._inputs(shape, known, start, begin)
        features = self._forward(shape, inputs, positions, start, begin, number, rows)
        token_ids, confidence = self._predict(features, known.view(-1))
        confidence = confidence.view(drafts.shape)
        if self._one_block and lm.logits_shift:
            first = confidence[..., 0]
            first.masked_fill_(first > float("-inf"), _FIRST)
        step = draft_step(
            drafts,
            token_ids.view(drafts.shape),
            confidence,
            number.clamp(min=1),
            lm.mask_token_id,
            settings.draft_steps,
            tokens_per_step=settings.tokens_per_step,
            threshold=settings.threshold,
            order=settings.order,
            block_length=settings.block_length,
            drafting=settings.drafting,
            step=self._taken(self.steps_taken, shape),
        )
        self._advance(shape, window, step, start, begin, number)
        return step.record[:, : len(COUNTERS) + 3 * shape.window]

    def _drafts(self, shape: Shape, start: torch.Tensor) -> torch.Tensor:
        """`[R, K, L]`: those of the slots, or what is committed of the one sequence that a step is for."""
        if not shape.one:
            return self.drafts[:, : shape.drafts, : shape.window]
        columns = start[:, None] + self._columns[: shape.window]
        return self._taken(self.tokens, shape).gather(1, columns)[:, None]

    def _inputs(
        self, shape: Shape, known: torch.Tensor, start: torch.Tensor, begin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The tokens of the forward and their positions `[R, K, F]`, and its rows that predict the window `[R K L]` (None:
        all, in order). `known [R, K, L]` are the drafts, which take their places among what is committed.
        """
        shift, together = int(self._lm.logits_shift), (shape.rows, shape.drafts, -1)
        alone = shape.forward == shape.window and not shape.whole
        columns = self._columns[: shape.forward if alone else shape.forward + shape.window]
        columns = begin[:, None, None] + columns.expand(*together)
        place = self._columns[: shape.window]
        if alone:
            tokens = known
        else:
            tokens = self._taken(self.tokens, shape)[:, None].expand(*together).gather(2, columns).clamp_(min=0)
            if shape.whole:
                place = (start - begin)[:, None, None] + place
                tokens.scatter_(2, place.expand(*together), known)
            else:
                tokens[..., : shape.window] = known
        positions = columns[..., : shape.forward]
        if alone and not shift:
            return tokens, positions, None
        row = (place - shift if shift else place).clamp(0, shape.forward - 1)
        first = self._runs[: shape.rows * shape.drafts].view(*together) * shape.forward
        return tokens[..., : shape.forward], positions, (first + row).flatten()

    def _forward(
        self,
        shape: Shape,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        start: torch.Tensor,
        begin: torch.Tensor,
        number: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What logits are made of: features `[n, *]` of the forward's rows."""
        length = self._taken(self.length, shape)
        seen = length
        if self._settings.cache == "dual" and not shape.whole:  # the block, which may be cut short
            seen = torch.minimum(start + self._size, length)
        attention = WindowAttention(
            drafts=shape.drafts,
            ranges=self._ranges(shape, begin, seen, length),
            window_start=begin,
            slots=self._row if shape.one else None,
            num_drafts=number,
            window_lengths=(seen - begin).clamp(0, shape.forward),
            block_length=self._size if self._lm.attention == "block_causal" else None,
        )
        return self._lm.window_features(tokens.flatten(0, 1), positions.flatten(0, 1), rows, attention)

    def _ranges(self, shape: Shape, begin: torch.Tensor, seen: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The stored positions that a forward sees, `[R, 1 or 2, 2]`: before its own, and with "dual" behind them."""
        if self._settings.cache == "none" or (self._one_block and shape.whole):
            return self._nothing[: shape.rows]
        bounds = [self._nothing[: shape.rows, 0, 0], begin]
        if self._settings.cache == "dual":
            bounds += [seen, length]
        return torch.stack(bounds, -1).view(shape.rows, -1, 2).int()

    def _advance(
        self,
        shape: Shape,
        window: list[torch.Tensor],
        step: DraftStep,
        start: torch.Tensor,
        begin: torch.Tensor,
        number: torch.Tensor,
    ) -> None:
        """Keeps the accepted draft's keys and values, slides the window and sets up the next drafts.

        A slot without drafts stays as it is: nothing is masked there, so that nothing is drafted, and its window does not
        move.
        """
        size, mask = shape.window, self._lm.mask_token_id
        length = self._taken(self.length, shape)
        committed = step.drafts[:, 0]
        active = number > 0
        if self._one_block:
            going = (committed == mask).any(1)  # never where a slot is inactive
            passed = (active & ~going) * size
        else:
            passed = step.prefix_length * active
        if self._settings.cache == "exact":
            self._keep(shape, window, step.accepted, begin, passed + (start - begin) if shape.whole else passed)
        elif self._one_block and shape.whole:
            self._keep(shape, window, step.accepted, begin, length)
        if self._settings.cache != "exact":
            self._commit(shape, start, committed, active)

        if self._one_block:  # a new block waits for a forward of its own
            following = self._no_block[: shape.rows]
        else:
            columns = start[:, None] + self._columns[size : size + self._length]
            following = self._taken(self.tokens, shape).gather(1, columns)[:, None]
        drafts = torch.cat([step.drafts, following.expand(-1, self._settings.draft_steps, -1)], -1)
        source = passed[:, None, None] + self._columns[: self._length]
        self._put(self.drafts, drafts.gather(2, source.expand(-1, self._settings.draft_steps, -1)), shape)
        start.add_(passed)
        if not self._one_block:
            going = active & (start < length)
        # Draft 0 goes on where no other can be made.
        self._put(self.num_drafts, torch.clamp(step.num_drafts, min=going, max=going * self._most_drafts), shape)
        self._put(self.start, start, shape)
        self._put(self.steps_taken, self._taken(self.steps_taken, shape).add_(step.steps), shape)

    def _commit(self, shape: Shape, start: torch.Tensor, committed: torch.Tensor, active: torch.Tensor) -> None:
        """Writes the window of each active slot."""
        place = start[:, None] + self._columns[: shape.window]
        tokens = self._taken(self.tokens, shape)
        new = torch.where(active[:, None], committed, tokens.gather(1, place))
        self._put(self.tokens, tokens.scatter_(1, place, new), shape)

    def _keep(
        self,
        shape: Shape,
        window: list[torch.Tensor],
        accepted: torch.Tensor,
        begin: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        keys, values = window
        stored_keys, stored_values = self._stored
        slots = self._row if shape.one else None
        keep(keys, values, accepted, begin, count, stored_keys, stored_values, slots=slots)


def _addresses(model: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]
