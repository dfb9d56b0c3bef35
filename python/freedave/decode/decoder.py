"""The step API below `generate`: a batch of sequences that advance together, added and dropped between steps.

    settings = resolve_settings(lm, prompt_length=1024, max_new_tokens=256, draft_steps=8)
    decoder = Decoder(lm, settings, slots=8, capacity=2048)
    sequence = decoder.add(prompt)
    while not sequence.finished:
        decoder.launch()            # device work of one forward for every sequence
        decoder.poll()              # one read of what it found; moves the windows
    answer = sequence.generated(sequence.tokens)

Each sequence has its own block, its own accepted length and its own end, and costs nothing once it has ended. How a step runs
is the executor's part: either the host plans each forward (`planned_executor.py`), or steps have fixed shapes, which CUDA
graphs hold (`graph_executor.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from freedave.decode import idle_executors
from freedave.decode.executor import Executor, Found
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.metrics import DecoderMetrics
from freedave.decode.noise import sequence_key
from freedave.decode.options import Seed
from freedave.decode.output import Commit
from freedave.decode.planned_executor import PlannedExecutor
from freedave.decode.sequence import NON_FINITE, STEPS, Sequence
from freedave.decode.settings import SequenceSettings, Settings, check_length, check_prompt, with_own
from freedave.integers import as_int

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM


@dataclass(frozen=True)
class Committed:
    """What a step committed of one sequence. `describe` makes a `Commit` of it, only where one is asked for: it takes longer
    than the step's own work on the host.
    """

    sequence: Sequence
    forward: int
    positions: list[int]
    steps: int
    log_probs: bool = False
    """Whether they are asked for."""

    def describe(self) -> Commit:
        sequence = self.sequence
        positions = [position for position in self.positions if position < sequence.answer_end]
        return Commit(
            forward=self.forward,
            steps=self.steps,
            positions=[position - sequence.prompt_length for position in positions],
            token_ids=[sequence.tokens[position] for position in positions],
            step_of=[sequence.step_map[position] for position in positions],
            tokens=sequence.committed,
            total=sequence.total,
            finished=sequence.finished,
            length=sequence.answer_end - sequence.prompt_length,
            final=sequence.final,
            sequence=sequence.index,
            log_probs=[sequence.log_probs[position] for position in positions] if self.log_probs else None,
        )


class Decoder:
    """Sequences that are decoded together, and the device memory they share.

    Args:
        lm, settings: as `generate` resolves them (`resolve_settings`).
        slots: how many sequences fit at a time.
        capacity: positions a sequence may have, prompt and generated blocks.

    Raises:
        TypeError, ValueError: `slots` or `capacity` is no integer of at least 1.
    """

    def __init__(self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int) -> None:
        slots = as_int("Decoder", "slots", slots, minimum=1)
        capacity = as_int("Decoder", "capacity", capacity, minimum=1)
        self.forwards = 0
        self._lm = lm
        self._settings = settings
        self._capacity = capacity
        self._free = list(range(slots))[::-1]
        self._metrics = DecoderMetrics()
        self._active: list[Sequence] = []
        self._launched: list[Sequence] | None = None
        self._executor: Executor
        if settings.executor == "graph":
            self._executor = idle_executors.take(lm, settings, slots, capacity)
        else:
            self._executor = PlannedExecutor(lm, settings, slots=slots, capacity=capacity)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that are being decoded."""
        return self._active.copy()

    @property
    def free_slots(self) -> int:
        """How many more sequences can be added."""
        return len(self._free)

    @property
    def forward_seconds(self) -> float:
        """What all forwards took, with making the logits, as the host sees it."""
        return self._executor.forward_seconds

    @property
    def positions_computed(self) -> int:
        """Tokens that the model has computed."""
        return self._executor.positions_computed

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return self._executor.cache_bytes

    @property
    def shapes(self) -> dict[str, int]:
        """How often each fixed shape ran; the planned executor has none."""
        return self._executor.shapes

    @property
    def drafts_chosen(self) -> dict[str, int]:
        """How often each number of drafts and lookahead was chosen; empty where none is."""
        return self._executor.drafts_chosen

    @property
    def drafts_reason(self) -> str:
        """Why, in a sentence."""
        return self._executor.drafts_reason

    def metrics(self) -> DecoderMetrics:
        """What the decoder has done until now."""
        return dataclasses.replace(
            self._metrics,
            accepted=self._metrics.accepted.copy(),
            forwards=self.forwards,
            positions_computed=self.positions_computed,
            forward_seconds=self.forward_seconds,
        )

    def add(
        self,
        prompt: Several[int] | torch.Tensor,
        settings: SequenceSettings | None = None,
        seed: int | None = None,
    ) -> Sequence:
        """Adds a sequence, whose prompt the next launched step computes. Allowed while a step is under way, too.

        Args:
            prompt: its token ids, one at least.
            settings: its own length, ends, threshold and temperature; None: those of the decoder's settings.
            seed: of this sequence's draws, which are then those of `generate` with this seed and prompt alone. None: the
                decoder's seed, with a key of its own for each sequence.

        Raises:
            RuntimeError: every slot is taken.
            TypeError, ValueError: what `generate` would refuse, or more positions than a slot has.
            torch.OutOfMemoryError: there is no memory for its prompt. Whatever is raised, nothing has changed then.
        """
        if not self._free:
            raise RuntimeError("every slot is taken: wait for a sequence to finish, or drop one")
        own = SequenceSettings() if settings is None else settings
        if not isinstance(own, SequenceSettings):
            raise TypeError(f"Decoder.add: settings must be SequenceSettings, got {type(settings).__name__}")
        chosen = with_own(self._lm, self._settings, own)
        key = sequence_key(chosen.seed, self._metrics.added) if chosen.draws else 0
        if seed is not None:
            key = sequence_key(Seed().checked("seed", seed), 0)
        prompt = check_prompt(self._lm, prompt)
        length = check_length(self._lm, chosen, len(prompt))
        if length > self._capacity:
            raise ValueError(
                f"the prompt ({len(prompt)} tokens) and max_new_tokens ({chosen.max_new_tokens}) need {length} positions, "
                f"but a slot has {self._capacity}"
            )
        sequence = self._executor.enter(self._metrics.added, self._free[-1], prompt, chosen, key)
        self._free.pop()
        self._metrics.added += 1
        self._active.append(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its slot: at once, or in `poll` where a step is under way. Nothing more is committed.

        Raises:
            ValueError: it is not being decoded: it has finished, or was dropped.
        """
        if sequence not in self._active:
            raise ValueError("the sequence is not being decoded: it has finished, or was dropped")
        self._active.remove(sequence)
        self._metrics.dropped += 1
        if self._launched is None or sequence not in self._launched:
            self._release(sequence)

    def close(self) -> None:
        """Leaves what was compiled and captured to the model's next decoder with such settings. Nothing can be added then.

        Raises:
            RuntimeError: sequences are being decoded: drop them first.
        """
        if self._active or self._launched is not None:
            raise RuntimeError("sequences are being decoded: drop them, and poll() a step that is under way")
        self._free = []
        if isinstance(self._executor, GraphExecutor):
            idle_executors.give_back(self._lm, self._executor)

    def _release(self, sequence: Sequence) -> None:
        self._executor.leave(sequence)
        self._free.append(sequence.slot)

    def launch(self) -> None:
        """One forward over the drafts of every sequence, and everything up to the next drafts, on the device."""
        if self._launched is not None:
            raise RuntimeError("a step is under way: call poll() first")
        if not self._active:
            raise RuntimeError("there is nothing to decode: add a sequence first")
        with torch.inference_mode():
            self._executor.launch(self._active)
        self._launched = self._active.copy()

    def poll(self) -> list[Committed]:
        """What the launched step committed, one entry a sequence that it predicted; finished ones free their slots.

        A sequence whose logits were not finite where it had to be decoded is finished by that, with `sequence.error`; the
        others go on.
        """
        if self._launched is None:
            raise RuntimeError("no step is under way: call launch() first")
        launched, self._launched = self._launched, None
        for sequence in launched:
            if sequence not in self._active:  # it was dropped while the step ran
                self._release(sequence)
        found = [each for each in self._executor.read() if each.sequence in self._active]
        commits = [self._advance(each) for each in found]
        self._executor.settle()
        for commit in commits:
            if commit.sequence.finished:
                self._release(commit.sequence)
        self._active = [sequence for sequence in self._active if not sequence.finished]
        self.forwards += 1
        for commit in commits:
            self._count(commit)
        return commits

    def _count(self, commit: Committed) -> None:
        metrics, sequence = self._metrics, commit.sequence
        metrics.tokens += len(commit.positions)
        if sequence.error is None:
            metrics.accepted[commit.steps] += 1
        metrics.failed += sequence.error is not None
        metrics.finished += sequence.finished and sequence.error is None

    def _advance(self, found: Found) -> Committed:
        """Commits what a step found out about one sequence."""
        sequence, record = found.sequence, found.record
        if record[NON_FINITE] >= 0:
            sequence.fail(record[NON_FINITE], self.forwards)
            return Committed(sequence, self.forwards, [], 0)
        positions = self._executor.advance(found, self.forwards)
        return Committed(sequence, self.forwards, positions, record[STEPS], self._settings.log_probs)
