"""The executor that plans each forward on the host, so that it computes as little as possible: best where arithmetic takes
most of the time.

A step is one forward, its predictions and one `draft_step` for the whole batch; only a forward of many long drafts is
divided among several calls of the model, and the logits of a large vocabulary are made in slices (`prediction.py`), so that
memory stays about that of static decoding.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from freedave.decode.acceptance import Chain
from freedave.decode.cache_policy import CachePolicy, new_cache, policy_for
from freedave.decode.draft_choice import Choice, DraftChooser, described
from freedave.decode.executor import Found
from freedave.decode.experience import chain_of, chooser_for
from freedave.decode.log_probs import beside, committed_log_probs, read_behind, remembered
from freedave.decode.noise import bits_of, temperatures_of
from freedave.decode.planned_sequence import PlannedSequence
from freedave.decode.sequence import ACCEPTED, NON_FINITE, PREFIX_LENGTH, Sequence
from freedave.decode.settings import Settings
from freedave.forward.packed_forward import ForwardBuilder, Prediction
from freedave.forward.prediction import Predictor
from freedave_kernels import DraftPool, DraftStep, draft_pool, draft_step

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# Fills the windows of a batch to one length. No token has this id, and the model never sees it.
_PADDING = -1

# Tokens that a call of the model may always have. With so many, arithmetic takes longer than reading the weights.
CALL_TOKENS = 1024


def _head_share(lm: DiffusionLM) -> float:
    """The share of the vocabulary projection, which is only computed for what is predicted, in the work on a token."""
    if not lm.has_plain_head:
        return 0.0
    model: Any = lm.model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(parameter.numel() for parameter in model.parameters()) - head.numel()
    if embedding is not head:
        body -= embedding.numel()
    return float(head.numel() / (head.numel() + body))


@dataclass(eq=False)
class _Slot:
    sequence: PlannedSequence
    policy: CachePolicy


class PlannedExecutor:
    """Runs the forwards of a batch of sequences; see `executor.Executor`."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """What the steps are timed with, where drafts are chosen."""

    def __init__(self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int) -> None:
        self.positions_computed = 0
        self._chooser = chooser_for(lm, settings) if settings.choose_drafts else None
        self._head_share = _head_share(lm) if settings.choose_drafts else 0.0
        self._choice = Choice(
            settings.draft_steps, settings.lookahead_steps, settings.draft_steps, settings.draft_steps
        )
        self._work = self._step_seconds = 0.0
        self._chains: list[Chain] = []
        self._features_seconds = 0.0
        self._lm = lm
        self._settings = settings
        self._cache = new_cache(settings.cache, slots, capacity)
        self._capacity = capacity
        self._slots: dict[int, _Slot] = {}
        self._launched: tuple[list[_Slot], list[_Slot], DraftStep | None] = ([], [], None)
        self._log_probs: torch.Tensor | None = None
        self._kept: list[int] = []
        self._kept_at: list[int] = []
        self._predict = Predictor(lm, settings.measure, settings.truncation)
        self._pool: DraftPool | None = None
        if settings.pooled:
            self._pool = draft_pool(slots, settings.pool_states, settings.pool_length(capacity), lm.device)

    @property
    def forward_seconds(self) -> float:
        """What all forwards took, with making the logits, as the host sees it."""
        return self._features_seconds + self._predict.projection_seconds

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""
        return 0 if self._cache is None else self._cache.bytes

    @property
    def shapes(self) -> dict[str, int]:
        """No two forwards need have the same shape."""
        return {}

    def enter(self, index: int, slot: int, prompt: list[int], settings: Settings, key: int = 0) -> PlannedSequence:
        sequence = PlannedSequence(index, slot, prompt, settings, self._lm.mask_token_id, key)
        policy = policy_for(
            settings,
            self._lm.mask_token_id,
            block_causal=self._lm.attention == "block_causal",
            logits_shift=self._lm.logits_shift,
        )
        if self._pool is not None:
            self._pool.clear(slot)
        self._slots[index] = _Slot(sequence, policy)
        return sequence

    def leave(self, sequence: Sequence) -> None:
        del self._slots[sequence.index]

    @property
    def drafts_chosen(self) -> dict[str, int]:
        chosen = {} if self._chooser is None else self._chooser.chosen
        return {described(*way): times for way, times in sorted(chosen.items())}

    @property
    def drafts_reason(self) -> str:
        return "" if self._chooser is None else self._chooser.why()

    def launch(self, sequences: list[Sequence]) -> None:
        began = self.clock()
        storing, active = self._scheduled(sequences)
        if self._chooser is not None and active:
            self._choose(self._chooser, storing, active)
        for slot in active:
            slot.sequence.open_window(self._choice.drafts, self._choice.lookahead, self._choice.shown)
        self._launched = storing, active, self._step(storing, active)
        self._step_seconds = self.clock() - began

    def _choose(self, chooser: DraftChooser, storing: list[_Slot], active: list[_Slot]) -> None:
        """How many drafts this forward has. Its prompts are work that it has anyway."""
        outlooks = [slot.policy.outlook(slot.sequence, self._head_share) for slot in active]
        prompts = sum(slot.policy.prompt_tokens(slot.sequence) for slot in (*storing, *active))
        self._choice = Choice(*self._lm.agreed(chooser.choose(outlooks, float(prompts))))
        # A forward that computes prompts says little about those that do not.
        self._work = 0.0
        if not prompts:
            self._work = chooser.expected_work

    def read(self) -> list[Found]:
        self._read_at = self.clock()
        self._chains = []
        storing, active, step = self._launched
        for slot in storing:
            slot.sequence.accepted_lengths.append(0)
        if step is None:
            return []
        rows = (step.record if self._log_probs is None else beside(step.record, self._log_probs)).tolist()
        for slot, row in zip(active, rows, strict=True):
            if row[NON_FINITE] >= slot.sequence.length:  # the rest of a last block that is cut short is no position
                row[NON_FINITE] = -1
        return [Found(slot.sequence, row, step.layout, step.length) for slot, row in zip(active, rows, strict=True)]

    def advance(self, found: Found, forward: int) -> list[int]:
        slot, record, length = self._slots[found.sequence.index], found.record, found.window
        sequence, start = slot.sequence, slot.sequence.start
        first_of_drafts = range(found.layout.drafts.start, found.layout.drafts.stop, length)
        drafts = [record[begin : begin + length] for begin in first_of_drafts]
        new = sequence.advance(drafts, record, record[found.layout.step_map], forward)
        if self._settings.log_probs:
            sequence.note(start, new, read_behind(record, length))
        self._chains.append(
            chain_of(len(sequence.states), record, pooled=self._pool is not None, ended=sequence.finished)
        )
        if not sequence.finished:
            kept = slot.policy.kept(record[ACCEPTED], record[PREFIX_LENGTH])
            first = sequence.slot * self._capacity + start
            self._kept += kept
            self._kept_at += range(first, first + len(kept))
        return new

    def settle(self) -> None:
        if self._kept:
            assert self._cache is not None
            with torch.inference_mode():
                both = torch.tensor([self._kept, self._kept_at], device=self._lm.device)
                self._cache.keep(both[0], both[1])
            self._kept, self._kept_at = [], []
        if self._chooser is not None and self._launched[1]:
            seconds = self._step_seconds + self.clock() - self._read_at
            self._chooser.learn(self._work, seconds if self._work else None, self._chains)

    def _scheduled(self, sequences: list[Sequence]) -> tuple[list[_Slot], list[_Slot]]:
        """Those whose next chunk of the prompt is only stored, and those whose drafts are predicted; others wait.

        A forward stores `prefill_chunk` tokens of prompts at most, in order of arrival, so that its time is bounded however
        many prompts, and however long ones, have come.
        """
        storing: list[_Slot] = []
        arriving: list[_Slot] = []
        predicting: list[_Slot] = []
        most = self._settings.prefill_chunk
        stored = 0
        for slot in (self._slots[sequence.index] for sequence in sequences):
            count = slot.policy.prompt_tokens(slot.sequence)
            if count and stored and most is not None and stored + count > most:
                continue
            stored += count
            predicts = slot.policy.predicts(slot.sequence)
            (predicting if not count else arriving if predicts else storing).append(slot)
        # Prompts come first in a forward. The tokens behind them are the drafts', which the cache retains until one is
        # accepted.
        return storing, arriving + predicting

    def _step(self, storing: list[_Slot], active: list[_Slot]) -> DraftStep | None:
        """A forward; None where it predicted nothing."""
        settings, lm = self._settings, self._lm
        count = max((len(slot.sequence.states) for slot in active), default=1)
        length = max((slot.sequence.length for slot in active), default=1)
        # What static decoding computes at a time, and a quarter more: so a few drafts fit into the call of a refresh.
        static_tokens = sum(len(slot.sequence.tokens) for slot in active)
        if settings.pooled:  # in whole blocks, so that what is known of a last block that is cut short fits any batch
            length = math.ceil(length / settings.block_length) * settings.block_length
        builder = ForwardBuilder(count, length, max(static_tokens * 5 // 4, CALL_TOKENS))
        for slot in storing:
            slot.policy.plan_chunk(slot.sequence, builder)
        states: list[list[int]] = []
        for b, slot in enumerate(active):
            slot.policy.plan(slot.sequence, b, builder)
            # A pool's states are masked behind their windows.
            padding = [lm.mask_token_id if settings.pooled else _PADDING] * (length - slot.sequence.length)
            states += [state + padding for state in slot.sequence.states]
            states += states[-1:] * (count - len(slot.sequence.states))
        numbers = [[len(slot.sequence.states) for slot in active], [slot.sequence.steps_taken for slot in active]]
        if settings.pooled:
            sequences = [slot.sequence for slot in active]
            numbers.append([sequence.prompt_length - sequence.start for sequence in sequences])
            numbers.append([sequence.start for sequence in sequences])
            numbers.append([sequence.slot for sequence in sequences])
            numbers.append([int(settings.one_block and sequence.refresh) for sequence in sequences])
        if settings.draws:
            numbers.append([slot.sequence.key for slot in active])
            numbers.append([slot.sequence.start for slot in active])
            numbers.append([bits_of(slot.sequence.temperature) for slot in active])
        calls, drafts, numbers_on_device = builder.build(states, [*itertools.chain(*numbers)], lm.device, self._cache)
        num_drafts, steps_taken, *others = numbers_on_device.split([len(each) for each in numbers])
        for_noise = others[-3:] if settings.draws else None
        for_pool = others[:4] if settings.pooled else []

        token_ids = drafts.clone()
        confidence = torch.full(drafts.shape, float("-inf"), dtype=torch.float32, device=lm.device)
        for forward, prediction in calls:
            began = time.perf_counter()
            features = lm.packed_features(forward, prediction.logits_row)
            self._features_seconds += time.perf_counter() - began
            self.positions_computed += forward.input_ids.shape[1]
            if not len(prediction.place):
                continue
            noise = None if for_noise is None else _noise(prediction, *for_noise, shape=drafts.shape)
            masked = torch.full_like(prediction.logits_row, lm.mask_token_id)
            predicted, certainty = self._predict(features, masked, noise)
            places = len(prediction.place)
            token_ids.view(-1).index_copy_(0, prediction.place, predicted[:places])
            confidence.view(-1).index_copy_(0, prediction.place, certainty[:places])
        certain = confidence.clone() if settings.log_probs else confidence
        for b, slot in enumerate(active):
            slot.policy.rank(slot.sequence, confidence[b])
        if not active:
            return None
        pooling = self._pooling(for_pool, active)
        known = None
        if settings.log_probs and self._pool is not None:
            windows = (pooling["slots"], pooling["window_start"], pooling["forget"])
            known = remembered(self._pool, *windows, lm.mask_token_id, length)
        step = draft_step(
            drafts,
            token_ids,
            confidence,
            num_drafts,
            lm.mask_token_id,
            self._choice.build,
            tokens_per_step=settings.tokens_per_step,
            **self._bounds(active),
            order=settings.order,
            block_length=settings.block_length,
            drafting=settings.drafting,
            step=steps_taken,
            **pooling,
        )
        if settings.log_probs:
            self._log_probs = committed_log_probs(
                drafts, certain, num_drafts, lm.mask_token_id, steps_taken, step, settings.measure, known
            )
        return step

    def _bounds(self, active: list[_Slot]) -> dict[str, Any]:
        """The rule, and the threshold of all sequences, or `[B]` with NaN for none where they differ."""
        thresholds = [slot.sequence.least_confidence for slot in active]
        numbers = [math.nan if each is None else each for each in thresholds]
        alike = len({*thresholds}) == 1
        each = thresholds[0] if alike else torch.tensor(numbers, dtype=torch.float64, device=self._lm.device)
        return {"threshold": each, "rule": self._settings.step_rule}

    def _pooling(self, for_pool: list[torch.Tensor], active: list[_Slot]) -> dict[str, Any]:
        """Arguments of `draft_step`. No draft is told how far it was computed: where it was not, nothing is predicted."""
        if not for_pool:
            return {}
        answer_start, window_start, slots, refreshed = for_pool
        ends = [-1 if slot.sequence.pooled_end is None else slot.sequence.pooled_end for slot in active]
        return {
            "pool": self._pool,
            "answer_start": answer_start,
            "eos_token_id": ends[0] if len({*ends}) == 1 else torch.tensor(ends, device=self._lm.device),
            "window_start": window_start,
            "slots": slots,
            "forget": refreshed != 0,
        }


def _noise(
    prediction: Prediction, keys: torch.Tensor, starts: torch.Tensor, bits: torch.Tensor, *, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key, position and temperature of each row that is predicted, `[R]`, where drafts `[B, J, L]` begin at `starts`; 0 of
    rows that only fill up a product.
    """
    count, length = shape[1:]
    sequence = prediction.place // (count * length)
    rows = len(prediction.logits_row) - len(sequence)
    positions = starts[sequence] + prediction.place % length
    seed, positions, bits = (F.pad(each, (0, rows)) for each in (keys[sequence], positions, bits[sequence]))
    return seed, positions, temperatures_of(bits)
