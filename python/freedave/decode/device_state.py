"""What the graph executor keeps on the device: the drafts and windows of all slots, and their keys and values."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from freedave.decode.device_sequence import DeviceSequence
from freedave.decode.noise import bits_of
from freedave.decode.settings import Settings
from freedave.decode.shapes import Shape
from freedave.forward.window_attention import attention_modules, layer_buffers
from freedave_kernels import DraftPool, draft_pool

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# Fills the positions beyond a sequence. No token has this id, and it is never predicted.
NOTHING = -1


class DeviceState:
    """The state of `slots` sequences of up to `capacity` positions, with windows of up to `window` of them.

    All of it is changed in place, as a captured step reads and writes these tensors wherever it is replayed.

    `drafts [S, K, window]`, and `[S]` each: `num_drafts` (0 where a slot is empty, or waits for a forward of its own),
    `start` of the window, `begin` of the sequence's own forward, `length` of the sequence, `prompt_length` and `steps_taken`;
    `threshold` (float64, NaN: none) and `end`, the token behind which pooled drafts need not go (-1: none).
    `noise [S, 2]`: where tokens are drawn, the key that it follows from, and the bits of the temperature, a float32. One copy
    spreads both.
    `tokens [S, *]`: what is committed; with an exact cache, the prompt.
    `stored`: keys and values `[N, S, capacity, G, D]` of all layers. `row [1]`: the slot that a step of one slot is for.
    `pool`: where drafts are pooled, what each slot knows of states that were forwarded.
    """

    def __init__(self, lm: DiffusionLM, settings: Settings, slots: int, capacity: int, window: int) -> None:
        self.device = lm.device
        self.window = window
        self._modules = attention_modules(lm.model)
        layers, self._groups, self._features, self.dtype = lm.key_layout()
        self._stores = settings.cache != "none"
        stored = (layers, slots, capacity if self._stores else 1, self._groups, self._features)
        self.stored = [torch.empty(stored, dtype=self.dtype, device=self.device) for _ in range(2)]

        def integers(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=self.device)

        self.tokens = integers(slots, 2 * (capacity + window), fill=NOTHING)
        self.drafts = integers(slots, settings.draft_steps, window, fill=NOTHING)
        self.num_drafts, self.start, self.begin = integers(slots), integers(slots), integers(slots)
        self.length, self.prompt_length, self.steps_taken = integers(slots), integers(slots), integers(slots)
        self.noise = integers(slots, 2)
        self.threshold = torch.full((slots,), math.nan, dtype=torch.float64, device=self.device)
        self.end = integers(slots, fill=-1)
        self.pool: DraftPool | None = None
        if settings.pooled:
            self.pool = draft_pool(slots, settings.pool_states, window, self.device)
        self.row = integers(1)
        self.most_drafts = integers(1, fill=settings.active_drafts or settings.draft_steps)
        # Constants: positions from 0 on, indices of a forward's runs, ranges without positions, a block that is not drafted
        # yet, and that the one sequence of a step begins anew.
        self.columns = torch.arange(capacity + 2 * window, device=self.device)
        self.runs = torch.arange(slots * settings.draft_steps, device=self.device)
        self.no_range = torch.zeros(slots, 1, 2, dtype=torch.int32, device=self.device)
        self.no_block = integers(slots, 1, window, fill=NOTHING)
        self.anew = torch.ones(1, dtype=torch.bool, device=self.device)

    @property
    def layers(self) -> int:
        """How many layers attend."""
        return len(self._modules)

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return sum(part.numel() * part.element_size() for part in self.stored) if self._stores else 0

    # What the host tells the device, between steps.

    def reset(self, settings: Settings) -> None:
        """Empties all slots."""
        with torch.inference_mode():
            self.drafts.fill_(NOTHING)
            for state in (self.num_drafts, self.start, self.begin, self.length):
                state.zero_()
            self.most_drafts.fill_(settings.active_drafts or settings.draft_steps)

    def enter(self, sequence: DeviceSequence) -> None:
        """A sequence's first state, in its slot."""
        slot, start, length = sequence.slot, sequence.start, len(sequence.tokens)
        with torch.inference_mode():
            tokens = torch.tensor(sequence.tokens, device=self.device)
            self.tokens[slot] = NOTHING
            self.tokens[slot, :length] = tokens
            self.drafts[slot] = NOTHING
            if not sequence.waits:
                window = tokens[start : start + self.window]
                self.drafts[slot, :, : len(window)] = window
            self.num_drafts[slot] = int(not sequence.waits)
            self.start[slot], self.length[slot], self.prompt_length[slot] = start, length, sequence.prompt_length
            self.begin[slot] = self.steps_taken[slot] = 0
            self.noise[slot] = torch.tensor([sequence.key, bits_of(sequence.temperature)], device=self.device)
            least, end = sequence.least_confidence, sequence.pooled_end
            self.threshold[slot] = math.nan if least is None else least
            self.end[slot] = -1 if end is None else end
            if self.pool is not None:
                self.pool.clear(slot)

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        with torch.inference_mode():
            self.drafts[slot] = NOTHING
            for state in (self.num_drafts, self.start, self.begin, self.length):
                state[slot] = 0

    # How a step reads and writes it.

    def window_buffers(self, shape: Shape) -> list[torch.Tensor]:
        """Keys and values of a step's own tokens, `[N, R, K, F, G, D]` each."""
        size = (self.layers, shape.rows, shape.drafts, shape.forward, self._groups, self._features)
        return [torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(2)]

    def lent(self, window: list[torch.Tensor]) -> AbstractContextManager[None]:
        """While it lasts, the layers of the model read and write these buffers, `stored` and a step's own."""
        return layer_buffers(self._modules, self.stored, window)

    def taken(self, state: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The rows of one of the tensors that a step of this shape is for."""
        return state.index_select(0, self.row) if shape.one else state

    def put(self, state: torch.Tensor, values: torch.Tensor, shape: Shape) -> None:
        """Writes those rows."""
        if shape.one:
            state.index_copy_(0, self.row, values)
        elif values is not state:  # which was changed in place
            state.copy_(values)
