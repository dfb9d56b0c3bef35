"""The decoding loop: forward the drafts, verify them, commit, draft again.

One loop serves both: static decoding is `draft_steps=1`, and defines what FreeDave must reproduce token for token and step
for step. The window that a forward covers is the current block and those further blocks that the drafts, or the drafts
made from any of them, can reach; so no forward is spent on storing a block, on the masks of a fresh one, or on the prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from freedave.draft_forward import CachedForward, DraftForward, DraftWindow, UncachedForward, predict_drafts
from freedave.models.diffusion_lm import DiffusionLM
from freedave.settings import Settings, check_prompt, resolve_settings
from freedave_kernels import DraftStep, draft_step
from freedave_kernels.ops.draft_step import COUNTERS


class NonFiniteLogitsError(RuntimeError):
    """The model produced NaN or infinite logits at a position that had to be decoded."""


class LosslessnessError(RuntimeError):
    """A decode differs from static decoding; `.output` and `.static` hold both."""

    def __init__(self, message: str, output: DecodeOutput, static: DecodeOutput) -> None:
        super().__init__(message)
        self.output = output
        self.static = static


@dataclass(frozen=True)
class Commit:
    """What one forward committed, as `on_step` receives it. Positions count from the first generated one."""

    forward: int
    steps: int
    positions: list[int]
    token_ids: list[int]
    step_of: list[int]
    tokens: int
    total: int
    finished: bool


@dataclass
class DecodeStats:
    """Where forwards and time went.

    `accepted_lengths`: static steps committed by each forward. `positions_computed`: token positions that went through the
    model in all forwards, the compute that was spent. Seconds are wall time, without that of `on_step`; the forward is the
    model's, with the vocabulary projection and the cache.
    """

    accepted_lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    positions_computed: int = 0
    forward_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def other_seconds(self) -> float:
        """Time outside the forward: ranking, drafting, verifying, committing and the loop itself."""
        return self.total_seconds - self.forward_seconds

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(len(self.accepted_lengths), 1)


@dataclass
class DecodeOutput:
    """A finished decode. New positions are counted from the end of the prompt.

    `sequences [1, prompt + new]` int64; after an end of sequence the rest is `eos_token_id`. `step_map [1, new]` int64: the
    static step at which each position was committed, -1 for never. `forward_map [1, new]` int64: the forward whose result
    committed it. `num_forwards`: model forwards, prompt included. `static`: the static decode that `check_lossless`
    compared with.
    """

    sequences: torch.Tensor
    step_map: torch.Tensor
    forward_map: torch.Tensor
    num_forwards: int
    stats: DecodeStats
    static: DecodeOutput | None = None


def generate(
    lm: DiffusionLM,
    input_ids: torch.Tensor,
    max_new_tokens: int = 256,
    draft_steps: int = 8,
    block_length: int | None = None,
    tokens_per_step: int = 1,
    order: str = "confidence",
    threshold: float | None = None,
    drafting: str = "recycled",
    cache: str = "auto",
    eos_token_id: int | None = None,
    lookahead_steps: int | None = None,
    on_step: Callable[[Commit], None] | None = None,
    check_lossless: bool = False,
) -> DecodeOutput:
    """Decodes one sequence block by block, committing what static decoding commits, in fewer forwards.

    Args:
        lm: the model (`load_model`, `DiffusionLM`).
        input_ids: `[1, P]` int64, the prompt.
        max_new_tokens: positions to generate. A block-causal model decodes whole blocks and the result is cut there.
        draft_steps: K, drafts a forward verifies; 1 is static decoding.
        block_length: None: the model's own (full attention without one: the whole answer is one block). Blocks are aligned
            at position 0 for block-causal models and at the end of the prompt for full attention.
        tokens_per_step: positions that one static step commits.
        order: "confidence" or "left_to_right".
        threshold: a static step commits every position of the block at least this confident; if there is none,
            `tokens_per_step` positions.
        drafting: "recycled" or "nested" (as published).
        cache: "auto" (exact for block-causal models, none for full attention) or "none".
        eos_token_id: a finished block that ends with it ends the sequence. None: the model's own.
        lookahead_steps: for how many of its next steps each draft is prepared with predictions; None: for all
            `draft_steps`, which takes the fewest forwards. Less leaves out following blocks that few drafts get to: many
            fewer positions are computed for a few more forwards, which is faster where compute is scarce (a CPU).
        on_step: called with a `Commit` after each forward.
        check_lossless: decode statically as well and compare.

    Returns:
        `DecodeOutput`.

    Raises:
        TypeError, ValueError: a bad argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits.
        LosslessnessError: `check_lossless` found a difference.

    Source: FreeDave (free draft-and-verification); the window and recycled drafting are this project's own.
    """
    prompt = check_prompt(lm, input_ids)
    settings = resolve_settings(
        lm, prompt.shape[0], max_new_tokens, draft_steps, block_length, tokens_per_step, order, threshold, drafting, cache,
        eos_token_id, lookahead_steps,
    )  # fmt: skip
    out = _decode(lm, prompt, settings, on_step)
    if check_lossless:
        out.static = _decode(lm, prompt, settings.static(), None)
        _compare(out, out.static)
    return out


def _decode(
    lm: DiffusionLM, prompt: torch.Tensor, settings: Settings, on_step: Callable[[Commit], None] | None
) -> DecodeOutput:
    began = time.perf_counter()
    with torch.inference_mode():
        state = _State(lm, prompt, settings)
        while not state.finished:
            token_ids, confidence = state.predict()
            step = draft_step(
                state.window.drafts[None],
                token_ids[None],
                confidence[None],
                state.num_drafts,
                lm.mask_token_id,
                settings.draft_steps,
                tokens_per_step=settings.tokens_per_step,
                threshold=settings.threshold,
                order=settings.order,
                block_length=settings.block_length,
                drafting=settings.drafting,
                eos_token_id=settings.eos_token_id,
                step=state.steps_taken,
            )
            commit = state.advance(step)
            if on_step is not None:
                paused = time.perf_counter()
                on_step(commit())
                began += time.perf_counter() - paused
        state.close()
    state.stats.total_seconds = time.perf_counter() - began
    return state.output()


class _State:
    """One sequence between two forwards: what is final, and the drafts of the window `start ... start + L - 1`."""

    def __init__(self, lm: DiffusionLM, prompt: torch.Tensor, settings: Settings) -> None:
        self._lm = lm
        self._settings = settings
        self._prompt_length = prompt.shape[0]
        self._end = self._prompt_length + settings.max_new_tokens
        self._suppressed = torch.tensor([lm.mask_token_id], device=prompt.device)

        self._sequence = prompt.new_full((settings.sequence_length,), lm.mask_token_id)
        self._sequence[: self._prompt_length] = prompt
        self._step_map = torch.full_like(self._sequence, -1)
        self._forward_map = torch.full_like(self._sequence, -1)
        self._forward = _forward(lm, self._sequence, settings)

        self.stats = DecodeStats()
        self.steps_taken = prompt.new_zeros(1)
        self.finished = False

        # The first forward has one "draft": the state with nothing generated, which is right by definition.
        self.num_drafts = torch.ones(1, dtype=torch.int32, device=prompt.device)
        first = self._sequence[None, settings.first_block : settings.first_block + settings.block_length]
        self.window = self._open_window(first, first.tolist(), settings.first_block)

    def predict(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forwards the drafts: predictions `[K, L]` of each."""
        prediction = predict_drafts(self._forward, self.window, self._lm.mask_token_id, self._suppressed)
        self.stats.positions_computed += self._forward.computed
        self.stats.forward_seconds += prediction.forward_seconds
        return prediction.token_ids, prediction.confidence

    def advance(self, step: DraftStep) -> Callable[[], Commit]:
        """Commits what the forward proved and moves the window; returns the description of the commit, made on demand."""
        counters = dict(zip(COUNTERS, step.counters[0].tolist(), strict=True))
        if counters["non_finite"] >= 0:
            raise NonFiniteLogitsError(
                f"sequence 0: the logits of position {self.window.start + counters['non_finite']} are not finite (forward "
                f"{len(self.stats.accepted_lengths)}); check the weights and the dtype of the model"
            )
        window = slice(self.window.start, self.window.start + self.window.drafts.shape[1])
        committed = step.drafts[0, 0]
        step_map = step.step_map[0]
        new = step_map >= 0
        self._sequence[window] = committed
        self._step_map[window] = torch.where(new, step_map, self._step_map[window])
        self._forward_map[window].masked_fill_(new, len(self.stats.accepted_lengths))
        self.stats.accepted_lengths.append(counters["steps"])
        self.steps_taken = self.steps_taken + step.steps

        self.finished = bool(counters["ended"]) or self._is_complete(committed, window)
        if not self.finished:
            self._move_window(step, counters)
        return lambda: self._describe(window, new, counters["steps"])

    def _is_complete(self, committed: torch.Tensor, window: slice) -> bool:
        """Whether everything that will be returned is there; the last block may reach beyond it."""
        if window.stop < self._end:
            return False
        return not bool((committed[: self._end - window.start] == self._lm.mask_token_id).any())

    def _move_window(self, step: DraftStep, counters: dict[str, int]) -> None:
        passed = counters["prefix_length"]
        self._forward.keep(counters["accepted"], passed)
        drafts = step.drafts[0, :, passed:]
        self.num_drafts = step.num_drafts
        self.window = self._open_window(drafts, drafts[: counters["num_drafts"]].tolist(), self.window.start + passed)

    def _open_window(self, drafts: torch.Tensor, states: list[list[int]], start: int) -> DraftWindow:
        """The window from `start` for `drafts [K, l]`, of which `states` are active, as long as their next drafts need."""
        fresh = [self._lm.mask_token_id] * (self._sequence.shape[0] - start - drafts.shape[1])
        reach = [self._reach(state + fresh) for state in states]
        length = reach[-1]  # the last draft is the furthest
        if length > drafts.shape[1]:
            beyond = self._sequence[start + drafts.shape[1] : start + length]
            drafts = torch.cat([drafts, beyond.expand(drafts.shape[0], -1)], dim=1)
        states = [(state + fresh)[:length] for state in states]
        states = [state for state in states if self._lm.mask_token_id in state]  # a finished draft predicts nothing
        return DraftWindow(drafts[:, :length].contiguous(), start, states, reach[: len(states)])

    def _reach(self, state: list[int]) -> int:
        """How far the next drafts of `state` can get: to the end of the block that the last lookahead step fills."""
        settings = self._settings
        masked = [token_id == self._lm.mask_token_id for token_id in state]
        length, steps = 0, 0
        while length < len(masked) and steps < settings.lookahead_steps:
            in_block = sum(masked[length : length + settings.block_length])
            length = min(length + settings.block_length, len(masked))
            if settings.threshold is None:
                steps += math.ceil(in_block / settings.tokens_per_step)
            else:  # the first step may fill a whole block, each further one fills one position
                steps += in_block if steps else min(in_block, 1)
        return length

    def _describe(self, window: slice, new: torch.Tensor, steps: int) -> Commit:
        positions = (torch.nonzero(new).flatten() + window.start).tolist()
        positions = [position for position in positions if position < self._end]
        tokens = int((self._sequence[self._prompt_length : self._end] != self._lm.mask_token_id).sum())
        return Commit(
            forward=len(self.stats.accepted_lengths) - 1,
            steps=steps,
            positions=[position - self._prompt_length for position in positions],
            token_ids=[int(self._sequence[position]) for position in positions],
            step_of=[int(self._step_map[position]) for position in positions],
            tokens=tokens,
            total=self._settings.max_new_tokens,
            finished=self.finished,
        )

    def close(self) -> None:
        """After the last forward: drafts may have run ahead into blocks that static decoding never starts."""
        ended = self._end_of_sequence()
        if ended is not None:
            assert self._settings.eos_token_id is not None
            self._sequence[ended:] = self._settings.eos_token_id
            self._step_map[ended:] = -1
            self._forward_map[ended:] = -1
        self.stats.tokens = int((self._step_map[self._prompt_length : self._end] >= 0).sum())

    def output(self) -> DecodeOutput:
        new = slice(self._prompt_length, self._end)
        return DecodeOutput(
            sequences=self._sequence[None, : self._end].clone(),
            step_map=self._step_map[None, new].clone(),
            forward_map=self._forward_map[None, new].clone(),
            num_forwards=len(self.stats.accepted_lengths),
            stats=self.stats,
        )

    def _end_of_sequence(self) -> int | None:
        """Where the first finished block that ends with the end-of-sequence token ends."""
        settings = self._settings
        if settings.eos_token_id is None:
            return None
        sequence = self._sequence.tolist()
        for begin in range(settings.first_block, len(sequence), settings.block_length):
            block = sequence[begin : begin + settings.block_length]
            if self._lm.mask_token_id in block:
                return None
            if block[-1] == settings.eos_token_id:
                return begin + len(block)
        return None


def _forward(lm: DiffusionLM, sequence: torch.Tensor, settings: Settings) -> DraftForward:
    if settings.cache == "exact":
        return CachedForward(lm, sequence, settings.block_length)
    return UncachedForward(lm, sequence, settings.block_length if lm.attention == "block_causal" else None)


def _compare(out: DecodeOutput, static: DecodeOutput) -> None:
    prompt_length = out.sequences.shape[1] - out.step_map.shape[1]
    tokens = out.sequences[0, prompt_length:]
    expected = static.sequences[0, prompt_length:]
    different = (tokens != expected) | (out.step_map[0] != static.step_map[0])
    if not bool(different.any()):
        return
    first = int(different.nonzero()[0])
    raise LosslessnessError(
        f"{int((tokens != expected).sum())} of {len(tokens)} tokens differ from static decoding; the first difference is at "
        f"generated position {first}: token {int(tokens[first])} at step {int(out.step_map[0, first])}, statically token "
        f"{int(expected[first])} at step {int(static.step_map[0, first])}",
        out,
        static,
    )
