"""The step API below `generate`: a batch of sequences that advance together, added and dropped between steps.

    settings = resolve_settings(lm, prompt_length=1024, max_new_tokens=256, draft_steps=8)
    decoder = Decoder(lm, settings, slots=8, capacity=2048)
    sequence = decoder.add(prompt)
    while not sequence.finished:
        decoder.launch()            # device work of one forward for every sequence
        decoder.poll()              # one read of what it found; moves the windows
    answer = sequence.generated(sequence.tokens)

A step is one forward, its predictions and one `draft_step` for the whole batch; only a forward of many long drafts is
divided among several calls of the model, and the logits of a large vocabulary are made in slices (`prediction.py`), so that
memory stays about that of static decoding. Each sequence has its own
block, its own accepted length and its own end, and costs nothing once it has ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch

from freedave.cache_policy import CachePolicy, new_cache, policy_for
from freedave.integers import as_int
from freedave.models.diffusion_lm import DiffusionLM
from freedave.output import Commit, NonFiniteLogitsError
from freedave.packed_forward import ForwardBuilder
from freedave.prediction import Predictor
from freedave.sequence import ACCEPTED, NON_FINITE, PREFIX_LENGTH, STEPS, Sequence
from freedave.settings import Settings, check_length, check_prompt
from freedave_kernels import DraftStep, draft_step
from freedave_kernels.ops.draft_step import RecordLayout

# Stands at positions that a sequence's window does not have: no model sees it, and it is nobody's token.
_PADDING = -1

# Tokens that a call of the model may have in any case: with so many it is bound by arithmetic, not by reading the weights.
CALL_TOKENS = 1024


@dataclass(frozen=True)
class Committed:
    """What a step committed of one sequence; `describe` makes the `Commit`, which takes longer than the step's own work."""

    sequence: Sequence
    forward: int
    positions: list[int]
    steps: int

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
            sequence=sequence.index,
        )


@dataclass(eq=False)
class _Slot:
    sequence: Sequence
    policy: CachePolicy


class Decoder:
    """Sequences that are decoded together, and the device memory they share.

    Args:
        lm, settings: as `generate` resolves them (`resolve_settings`).
        slots: how many sequences fit at a time.
        capacity: positions a sequence may have, prompt and generated blocks.
    """

    def __init__(self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int) -> None:
        self.forwards = 0
        self._features_seconds = 0.0
        self.positions_computed = 0
        self._lm = lm
        self._settings = settings
        self._cache = new_cache(settings.cache, slots, capacity)
        self._capacity = capacity
        self._free = list(range(slots))[::-1]
        self._added = 0
        self._active: list[_Slot] = []
        self._launched: tuple[list[_Slot], list[_Slot], DraftStep | None] | None = None
        self._predict = Predictor(lm)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that are being decoded."""
        return [slot.sequence for slot in self._active]

    @property
    def forward_seconds(self) -> float:
        """What all forwards took, with making the logits, as the host sees it."""
        return self._features_seconds + self._predict.projection_seconds

    @property
    def free_slots(self) -> int:
        """How many more sequences can be added."""
        return len(self._free)

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return 0 if self._cache is None else self._cache.bytes

    def add(self, prompt: Several[int] | torch.Tensor, max_new_tokens: int | None = None) -> Sequence:
        """Adds a sequence; the next step that is launched computes its prompt. Any time, a step under way does not mind.

        Args:
            prompt: its token ids, one at least.
            max_new_tokens: None: as many as the settings say.

        Raises:
            RuntimeError: every slot is taken.
            TypeError, ValueError: what `generate` would refuse, or more positions than a slot has. Nothing has changed then.
        """
        if not self._free:
            raise RuntimeError("every slot is taken: wait for a sequence to finish, or drop one")
        settings = self._settings
        if max_new_tokens is not None:
            max_new_tokens = as_int("Decoder.add", "max_new_tokens", max_new_tokens, minimum=1)
            settings = dataclasses.replace(settings, max_new_tokens=max_new_tokens)
        prompt = check_prompt(self._lm, prompt)
        length = check_length(self._lm, settings, len(prompt))
        if length > self._capacity:
            raise ValueError(
                f"the prompt ({len(prompt)} tokens) and max_new_tokens ({settings.max_new_tokens}) need {length} positions, "
                f"but a slot has {self._capacity}"
            )
        sequence = Sequence(self._added, self._free.pop(), prompt, settings, self._lm.mask_token_id)
        policy = policy_for(
            settings,
            self._lm.mask_token_id,
            block_causal=self._lm.attention == "block_causal",
            logits_shift=self._lm.logits_shift,
        )
        self._added += 1
        self._active.append(_Slot(sequence, policy))
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its slot: at once, or in `poll` where a step is under way. Nothing more is committed.

        Raises:
            ValueError: it is not being decoded: it has finished, or was dropped.
        """
        kept = [slot for slot in self._active if slot.sequence is not sequence]
        if len(kept) == len(self._active):
            raise ValueError("the sequence is not being decoded: it has finished, or was dropped")
        self._active = kept
        storing, launched, _ = self._launched or ([], [], None)
        if all(slot.sequence is not sequence for slot in storing + launched):
            self._free.append(sequence.slot)

    def launch(self) -> None:
        """One forward over the drafts of every sequence, and everything up to the next drafts, on the device."""
        if self._launched is not None:
            raise RuntimeError("a step is under way: call poll() first")
        if not self._active:
            raise RuntimeError("there is nothing to decode: add a sequence first")
        with torch.inference_mode():
            storing, active = self._scheduled()
            self._launched = storing, active, self._step(storing, active)

    def _scheduled(self) -> tuple[list[_Slot], list[_Slot]]:
        """Those whose next chunk of the prompt is only stored, and those whose drafts are predicted; others wait.

        A forward stores `prefill_chunk` tokens of prompts at most, in order of arrival, so that its time is bounded however
        many prompts, and however long ones, have come.
        """
        storing: list[_Slot] = []
        arriving: list[_Slot] = []
        decoding: list[_Slot] = []
        most = self._settings.prefill_chunk
        stored = 0
        for slot in self._active:
            count = slot.policy.prompt_tokens(slot.sequence)
            if count and stored and most is not None and stored + count > most:
                continue
            stored += count
            predicts = slot.policy.predicts(slot.sequence)
            (decoding if not count else arriving if predicts else storing).append(slot)
        # Prompts come first in a forward: what is retained of it are the tokens behind them.
        return storing, arriving + decoding

    def _step(self, storing: list[_Slot], active: list[_Slot]) -> DraftStep | None:
        """A forward; None where it predicted nothing."""
        settings, lm = self._settings, self._lm
        count = max((len(slot.sequence.states) for slot in active), default=1)
        length = max((slot.sequence.length for slot in active), default=1)
        # What static decoding computes at a time, and a quarter more so that a few drafts beside a refresh are one call.
        static_tokens = sum(len(slot.sequence.tokens) for slot in active)
        builder = ForwardBuilder(count, length, max(static_tokens * 5 // 4, CALL_TOKENS))
        for slot in storing:
            slot.policy.plan_chunk(slot.sequence, builder)
        states: list[list[int]] = []
        for b, slot in enumerate(active):
            slot.policy.plan(slot.sequence, b, builder)
            padding = [_PADDING] * (length - slot.sequence.length)
            states += [state + padding for state in slot.sequence.states]
            states += states[-1:] * (count - len(slot.sequence.states))
        numbers = [len(slot.sequence.states) for slot in active] + [slot.sequence.steps_taken for slot in active]
        calls, drafts, numbers_on_device = builder.build(states, numbers, lm.device, self._cache)
        num_drafts, steps_taken = numbers_on_device.chunk(2)

        token_ids = drafts.clone()
        confidence = torch.full(drafts.shape, float("-inf"), device=lm.device)
        for forward, prediction in calls:
            began = time.perf_counter()
            features = lm.packed_features(forward, prediction.logits_row)
            self._features_seconds += time.perf_counter() - began
            self.positions_computed += forward.input_ids.shape[1]
            if not len(prediction.place):
                continue
            predicted, certainty = self._predict(features, torch.full_like(prediction.logits_row, lm.mask_token_id))
            places = len(prediction.place)
            token_ids.view(-1).index_copy_(0, prediction.place, predicted[:places])
            confidence.view(-1).index_copy_(0, prediction.place, certainty[:places])
        for b, slot in enumerate(active):
            slot.policy.rank(slot.sequence, confidence[b])
        if not active:
            return None
        return draft_step(
            drafts,
            token_ids,
            confidence,
            num_drafts,
            lm.mask_token_id,
            settings.draft_steps,
            tokens_per_step=settings.tokens_per_step,
            threshold=settings.threshold,
            order=settings.order,
            block_length=settings.block_length,
            drafting=settings.drafting,
            step=steps_taken,
        )

    def poll(self) -> list[Committed]:
        """What the launched step committed, one entry a sequence that it predicted; finished ones free their slots."""
        if self._launched is None:
            raise RuntimeError("no step is under way: call launch() first")
        storing, active, step = self._launched
        self._launched = None
        dropped = [slot for slot in storing + active if slot not in self._active]
        self._free += [slot.sequence.slot for slot in dropped]
        for slot in storing:
            slot.sequence.accepted_lengths.append(0)
        commits: list[Committed] = []
        tokens: list[int] = []
        places: list[int] = []
        for slot, record in zip(active, [] if step is None else step.record.tolist(), strict=True):
            if slot in dropped:
                continue
            assert step is not None
            commits.append(self._advance(slot, record, step.layout, step.length, tokens, places))
        if tokens:
            assert self._cache is not None
            with torch.inference_mode():
                both = torch.tensor([tokens, places], device=self._lm.device)
                self._cache.keep(both[0], both[1])
        self._active = [slot for slot in self._active if not slot.sequence.finished]
        self.forwards += 1
        return commits

    def _advance(
        self, slot: _Slot, record: list[int], layout: RecordLayout, length: int, tokens: list[int], places: list[int]
    ) -> Committed:
        """Commits what a step found out about one sequence; adds what the cache keeps of it, and where."""
        sequence, start = slot.sequence, slot.sequence.start
        if record[NON_FINITE] >= 0:
            raise NonFiniteLogitsError(
                f"sequence {sequence.index}: the logits of position {start + record[NON_FINITE]} are not finite (forward "
                f"{self.forwards}); check the weights and the dtype of the model"
            )
        drafts = [record[begin : begin + length] for begin in range(layout.drafts.start, layout.drafts.stop, length)]
        new = sequence.advance(drafts, record, record[layout.step_map], self.forwards)
        if sequence.finished:
            self._free.append(sequence.slot)
        else:
            kept = slot.policy.kept(record[ACCEPTED], record[PREFIX_LENGTH])
            first = sequence.slot * self._capacity + start
            tokens += kept
            places += range(first, first + len(kept))
        return Committed(sequence, self.forwards, new, record[STEPS])
