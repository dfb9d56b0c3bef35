"""Decoding with all state on the device: a step is one sequence of launches of fixed shapes, which a CUDA graph holds.

The planned executor (`planned_executor.py`) plans each forward on the host, so that it computes as little as possible. Where
launches cost more than arithmetic (a GPU at small batch) this is the other way: a step forwards K drafts of a window for
every slot, and everything from its input to the next drafts stays in the same tensors (`device_step.py`). The host chooses
which step to replay next, from the record that it reads of the last one, and does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freedave.decode.acceptance import Chain
from freedave.decode.captured_steps import CapturedSteps
from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.device_state import DeviceState
from freedave.decode.device_step import DeviceStep
from freedave.decode.executor import Found
from freedave.decode.experience import chain_of, chooser_for
from freedave.decode.log_probs import read_behind
from freedave.decode.sequence import NON_FINITE, Sequence
from freedave.decode.settings import Settings
from freedave.decode.shape_choice import DRAFTS, ShapeChooser
from freedave.decode.shapes import Shape, Shapes
from freedave_kernels.contract import RecordLayout

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# The settings that a captured step holds; the others concern the host.
_FIXED = (
    *("draft_steps", "block_length", "tokens_per_step", "order", "step_rule"),
    *("measure", "draws", "truncation", "drafting", "cache", "compile", "log_probs"),
)


@dataclass
class Launched:
    """A step under way: its sequences, their rows of `record [R, 11 + 3 L]`, and the length L of its window."""

    sequences: list[DeviceSequence]
    rows: list[int]
    record: torch.Tensor
    window: int


class GraphExecutor:
    """Up to `slots` sequences of up to `capacity` positions; see `executor.Executor`.

    Args:
        lm: a transformers model. settings: as `resolve_settings` makes them.
        capture: whether steps are captured in CUDA graphs; None: on a GPU. Without, they run launch by launch.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """What the steps are timed with, where drafts are chosen."""

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
        self._shapes = Shapes(settings, slots, capacity)
        self._launched: list[Launched] = []
        self._stored_only: list[DeviceSequence] = []
        compile = on_gpu if settings.compile is None else settings.compile
        self.state = DeviceState(lm, settings, slots, capacity, self._shapes.longest_window)
        self.step = DeviceStep(lm, settings, self.state)
        self.steps = CapturedSteps(lm, self.step, compile=compile, capture=on_gpu if capture is None else capture)
        self._read = _read_by_steps(lm.model)  # which captured steps read; compiling layers has moved them
        self._chooser = ShapeChooser(lm, self.steps)
        self._start_choosing()

    def serves(self, settings: Settings, slots: int, capacity: int) -> bool:
        """Whether its steps are those of other settings, for as many sequences of up to `capacity` positions."""
        fixed = all(getattr(settings, name) == getattr(self._settings, name) for name in _FIXED)
        window = Shapes(settings, slots, capacity).longest_window
        fits = slots == self._slots and capacity <= self._capacity and window == self.state.window
        return fixed and fits and self._read == _read_by_steps(self._lm.model)

    def reset(self, settings: Settings) -> None:
        """Empties all slots, for a decode with settings that it `serves`."""
        self._settings = settings
        self._shapes = Shapes(settings, self._slots, self._capacity)
        self.steps.ran.clear()
        self.positions_computed = 0
        self.forward_seconds = 0.0
        self.state.reset(settings)
        self._start_choosing()

    def _start_choosing(self) -> None:
        if self._settings.choose_drafts:
            self._chooser.start(chooser_for(self._lm, self._settings, DRAFTS), self._shapes)
        self._chains: list[Chain] = []
        self._launched_at = self._launched_until = self._read_at = 0.0

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return self.state.cache_bytes

    @property
    def shapes(self) -> dict[str, int]:
        return {str(shape): runs for shape, runs in self.steps.ran.items()}

    @property
    def drafts_chosen(self) -> dict[str, int]:
        return self._chooser.chosen if self._settings.choose_drafts else {}

    @property
    def drafts_reason(self) -> str:
        return self._chooser.reason if self._settings.choose_drafts else ""

    def enter(self, index: int, slot: int, prompt: list[int], settings: Settings, key: int = 0) -> DeviceSequence:
        sequence = DeviceSequence(index, slot, prompt, settings, self._lm.mask_token_id, key)
        try:
            self.state.enter(sequence)
        except BaseException:  # out of memory, or interrupted: the slot stays empty
            self.state.leave(slot)
            raise
        return sequence

    def leave(self, sequence: Sequence) -> None:
        self.state.leave(sequence.slot)

    def launch(self, sequences: list[Sequence]) -> None:
        began = time.perf_counter()
        own = [sequence for sequence in sequences if isinstance(sequence, DeviceSequence)]  # for mypy: all are
        self._launched, self._stored_only = [], []
        together = [sequence for sequence in own if not sequence.waits]
        waiting = self._with_own_forward(own)
        if together:
            shape = self._shape(together, alone=not waiting)
            rows = [sequence.slot for sequence in together]
            self._launched.append(Launched(together, rows, self._run(shape), shape.window))
        for sequence in waiting:
            sequence.forwarded = 1
            if self._ends_in_chunk(sequence):
                shape = self._shapes.own(sequence)
                self._launched.append(Launched([sequence], [0], self._run(shape, sequence.slot), shape.window))
                sequence.waits = False
            else:
                self._store_chunk(sequence)
                self._stored_only.append(sequence)
        if self._settings.choose_drafts:
            self._chooser.learn()  # while the device runs
        self.forward_seconds += time.perf_counter() - began
        self._launched_until = self.clock()

    def _shape(self, sequences: list[DeviceSequence], alone: bool) -> Shape:
        """That of the step of all slots. `alone`: no other forward comes with it, whose time would be taken for its own."""
        self._launched_at = self.clock()
        if self._settings.choose_drafts:
            shape = self._chooser.choose(sequences, alone)
        else:
            shape = self._shapes.together(sequences, self._settings.draft_steps)
        for sequence in sequences:
            sequence.forwarded = min(sequence.num_drafts, shape.drafts)
        return shape

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
        return (
            missing
            if chunk is None
            else min(missing, max(chunk // self._settings.block_length, 1) * self._settings.block_length)
        )

    def _ends_in_chunk(self, sequence: DeviceSequence) -> bool:
        """Whether what is left of the prompt rides along with the first prediction."""
        return self._settings.one_block or sequence.stored + self._prompt_tokens(sequence) >= sequence.start

    def read(self) -> list[Found]:
        began, self._read_at, self._chains = time.perf_counter(), self.clock(), []
        for sequence in self._stored_only:
            sequence.accepted_lengths.append(0)
        found = []
        for launched in self._launched:
            layout = RecordLayout.of(launched.window, self._settings.draft_steps)
            rows = launched.record.tolist()
            for sequence, row in zip(launched.sequences, launched.rows, strict=True):
                if rows[row][NON_FINITE] >= len(sequence.tokens) - sequence.start:  # there is no such position
                    rows[row][NON_FINITE] = -1
                found.append(Found(sequence, rows[row], layout, launched.window))
        self.forward_seconds += time.perf_counter() - began
        return found

    def advance(self, found: Found, forward: int) -> list[int]:
        assert isinstance(found.sequence, DeviceSequence)
        first = found.layout.drafts.start
        draft = found.record[first : first + found.window]
        sequence, start = found.sequence, found.sequence.start
        new = sequence.advance(draft, found.record, found.record[found.layout.step_map], forward)
        if self._settings.log_probs:
            sequence.note(start, new, read_behind(found.record, found.window))
        pooled = self.state.pool is not None
        self._chains.append(chain_of(sequence.forwarded, found.record, pooled=pooled, ended=sequence.finished))
        return new

    def settle(self) -> None:
        """The step has kept what it keeps."""
        if not self._settings.choose_drafts or not self._launched:
            return
        took = self._launched_until - self._launched_at + self.clock() - self._read_at
        self._chooser.found(took, self._read_at - self._launched_until, self._chains)
        if all(sequence.finished for launched in self._launched for sequence in launched.sequences):
            self._chooser.learn()  # no step may follow that could run meanwhile

    def _store_chunk(self, sequence: DeviceSequence) -> None:
        """Stores a long prompt's next chunk; other sequences need not wait for all of it."""
        count = self._prompt_tokens(sequence)
        self.state.row.fill_(sequence.slot)
        self.step.store(count, done=sequence.stored)
        self.positions_computed += count
        sequence.stored += count

    def _run(self, shape: Shape, slot: int | None = None) -> torch.Tensor:
        """Runs a step, that of a slot where one is given; its record."""
        if slot is not None:
            self.state.row.fill_(slot)
        self.positions_computed += shape.rows * shape.drafts * shape.forward
        if not self._shapes.comes_again(shape):
            return self.steps.run_once(shape)
        # A prompt runs once an answer, in one of several shapes: compiling them all takes longer than it saves.
        return self.steps.run(shape, compiled=not self._shapes.carries_prompt(shape))


def _read_by_steps(model: torch.nn.Module) -> list[object]:
    """What a captured step goes on with, whatever becomes of the model: addresses of weights, and which adapters of peft are
    switched on in each layer that has some.
    """
    switched: list[object] = []
    for module in model.modules():
        disabled: Any = getattr(module, "disable_adapters", None)
        if isinstance(disabled, bool):  # of a transformers model, it is a method
            switched += [disabled, list(getattr(module, "active_adapters", ()))]
    return [*(part.data_ptr() for parameter in model.parameters() for part in _parts(parameter)), *switched]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that have memory: those inside where one wraps others, as quantised weights do, which have no address."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
