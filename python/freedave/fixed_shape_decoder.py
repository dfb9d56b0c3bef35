"""Decoding in steps of one shape, with all state on the device: what a CUDA graph can hold.

`decoder.py` plans each forward on the host, so that it computes as little as possible. Where launches cost more than
arithmetic (a GPU at small batch), this is the other way: every step forwards K drafts of one window for each slot, reads
nothing back, and leaves its state in the same tensors, so that one captured step serves all:

    decoder = FixedShapeDecoder(lm, settings, slots=8, capacity=2048)
    decoder.add(0, prompt)
    with torch.cuda.graph(graph):   # after two or three plain steps, as for any graph
        decoder.step()
    while not all(decoder.poll()):  # may lag behind: a slot that is done stays as it is
        graph.replay()

Block-causal models keep their exact cache, and a step forwards the windows of the drafts. With full attention and without
a cache, it forwards K times the whole of each slot. (`prefix` and `dual` refresh a slot's cache whenever its block is done,
in a forward of another shape.)

What it commits is what static decoding commits. It has run on CPUs only; capture has not been tried on a GPU.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from freedave.attention import attention_with_log_sum_exp, block_causal_mask, merge_into
from freedave.cache import KeyValueCache
from freedave.models.diffusion_lm import DiffusionLM
from freedave.output import NonFiniteLogitsError
from freedave.packed_forward import ForwardBuilder
from freedave.prediction import Predictor
from freedave.settings import Settings
from freedave_kernels import DraftStep, draft_step

# Stands at positions beyond a sequence's last block: never predicted, and nobody's token.
_NOTHING = -1


def window_blocks(settings: Settings) -> int:
    """Blocks that the drafts, and the drafts made from any of them, can reach when one position of the first is left; no more
    than an answer has.
    """
    steps = settings.draft_steps + settings.lookahead_steps
    if settings.threshold is None:
        reached = 1 + math.ceil((steps * settings.tokens_per_step - 1) / settings.block_length)
    else:  # the first step may fill a block, each further one a position
        reached = 2 + math.ceil(steps / settings.block_length)
    # Where blocks are aligned at position 0, the first may be the prompt's but for its last position.
    before = settings.block_length - 1 if settings.aligned_at_zero else 0
    return min(reached, math.ceil((before + settings.max_new_tokens) / settings.block_length))


class FixedShapeDecoder:
    """A batch of slots whose sequences advance together, each at its own pace.

    Args:
        lm: a transformers model, block-causal or with full attention.
        settings: as `resolve_settings` makes them; of `eos_token_ids` one is supported here, no stop sequences.
        slots: B. capacity: positions a sequence may have. blocks: blocks of the window; None: `window_blocks(settings)`.

    Device state, in place throughout: `tokens`, `step_map` and `forward_map [B, capacity + L]`, `drafts [B, K, L]`,
    `num_drafts`, `start`, `end`, `steps_taken` and `done [B]`, `non_finite [B]` (a position, or -1).
    """

    def __init__(
        self, lm: DiffusionLM, settings: Settings, *, slots: int, capacity: int, blocks: int | None = None
    ) -> None:
        if not lm.takes_draft_attention:
            raise ValueError("steps of one shape need a transformers model, whose attention can be replaced")
        if settings.cache not in ("exact", "none"):
            raise ValueError(
                f"cache={settings.cache!r} refreshes in a forward of another shape; use 'none', or Decoder"
            )
        if len(settings.eos_token_ids) > 1 or settings.stop_sequences:
            raise ValueError(
                "steps of one shape end at one eos_token_id; use Decoder for several, or for stop sequences"
            )
        self._lm = lm
        self._settings = settings
        self._slots = slots
        self._capacity = capacity
        self._length = length = settings.block_length * (blocks or window_blocks(settings))
        device = lm.device
        columns = capacity + length
        self._cache = KeyValueCache(slots, columns) if settings.cache == "exact" else None
        self._branches: list[tuple[torch.Tensor, torch.Tensor]] = []

        def integers(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.tokens = integers(slots, columns, fill=_NOTHING)
        self.step_map = integers(slots, columns, fill=-1)
        self.forward_map = integers(slots, columns, fill=-1)
        self.drafts = integers(slots, settings.draft_steps, length, fill=_NOTHING)
        self.num_drafts = integers(slots, fill=1)
        self.start, self.end, self.steps_taken = integers(slots), integers(slots), integers(slots)
        self._answer = integers(slots)  # where each slot's begins
        self.forwards = integers(1)
        self.non_finite = integers(slots, fill=-1)
        self.done = torch.ones(slots, dtype=torch.bool, device=device)

        self._window = torch.arange(length, device=device)
        self._column = torch.arange(columns, device=device)
        self._first_column = torch.arange(slots, device=device)[:, None] * columns
        self._slot = torch.arange(slots, device=device)
        self._rows = torch.arange(slots * settings.draft_steps * length, device=device)
        self._first_row = torch.arange(slots * settings.draft_steps, device=device)[:, None] * capacity
        self._predict = Predictor(lm)
        visible = block_causal_mask(length, settings.block_length, device)
        dtype = next(lm.model.parameters()).dtype
        self._hidden_blocks = None if visible is None else _additive(visible, dtype)
        self._stored = torch.zeros(slots, 1, 1, columns, dtype=dtype, device=device)
        self._visible = torch.zeros(slots * settings.draft_steps, 1, 1, capacity, dtype=dtype, device=device)

    def add(self, slot: int, prompt: list[int], max_new_tokens: int | None = None) -> None:
        """Puts a prompt into a slot whose sequence is done; what a cache keeps of it takes a forward, beside the steps."""
        settings, mask = self._settings, self._lm.mask_token_id
        if max_new_tokens is not None:
            settings = dataclasses.replace(settings, max_new_tokens=max_new_tokens)
        if not bool(self.done[slot]):
            raise RuntimeError(f"slot {slot} is in use: wait until poll() reports it, or drop it")
        length, start = settings.sequence_length(len(prompt)), settings.first_block(len(prompt))
        if length > self._capacity:
            raise ValueError(f"the prompt and max_new_tokens need {length} positions, but a slot has {self._capacity}")
        with torch.inference_mode():
            if start and self._cache is not None:
                builder = ForwardBuilder(1, 1)
                builder.add([prompt[:start]], 0, block_length=settings.block_length)
                builder.store(0, start, slot, 0)
                [(forward, _)], *_ = builder.build([[0]], [], self._lm.device, self._cache)
                self._lm.packed_features(forward, self._rows[:1])
            for columns, fill in ((self.tokens, _NOTHING), (self.step_map, -1), (self.forward_map, -1)):
                columns[slot] = fill
            self.tokens[slot, :length] = mask
            self.tokens[slot, : len(prompt)] = torch.tensor(prompt, device=self._lm.device)
            self.drafts[slot] = self.tokens[slot, start : start + self._length]
            self.num_drafts[slot] = 1
            self.start[slot], self.end[slot] = start, len(prompt) + settings.max_new_tokens
            self._answer[slot] = len(prompt)
            self.steps_taken[slot], self.non_finite[slot] = 0, -1
            self.done[slot] = False

    def drop(self, slot: int) -> None:
        """Frees a slot."""
        with torch.inference_mode():
            self.done[slot] = True

    def step(self) -> None:
        """One forward over K drafts of every slot, and everything up to the next ones. Reads nothing back."""
        settings, lm = self._settings, self._lm
        with torch.inference_mode():
            place = self.start[:, None] + self._window
            features = self._windows(place) if self._cache is not None else self._wholes(place)
            predictions = self._predict(features, self.drafts.flatten())
            token_ids, confidence = (predicted.view_as(self.drafts) for predicted in predictions)
            self._commit(
                draft_step(
                    self.drafts,
                    token_ids,
                    confidence,
                    self.num_drafts,
                    lm.mask_token_id,
                    settings.draft_steps,
                    tokens_per_step=settings.tokens_per_step,
                    threshold=settings.threshold,
                    order=settings.order,
                    block_length=settings.block_length,
                    drafting=settings.drafting,
                    eos_token_id=settings.eos_token_ids[0] if settings.eos_token_ids else None,
                    step=self.steps_taken,
                    answer_start=self._answer - self.start,
                ),
                place,
            )

    def _windows(self, place: torch.Tensor) -> torch.Tensor:
        """The features of every draft's window, whose prefix is stored: `[B K L, *]`."""
        stored = (self._column < self.start[:, None])[:, None, None]
        self._stored.copy_(_additive(stored, self._stored.dtype))
        positions = place[:, None].expand_as(self.drafts).flatten(0, 1)
        input_ids = self.drafts.clamp(min=0).flatten(0, 1)
        return self._lm.features_of_drafts(input_ids, positions, self._rows, self._over_windows)

    def _wholes(self, place: torch.Tensor) -> torch.Tensor:
        """The same without a cache: K times the whole of each slot, with the window of each draft in its place."""
        drafts = self._settings.draft_steps
        # There is always a key to see, so that attention in a slot that was never used is a number.
        visible = (self._column < self.end[:, None].clamp(min=1))[:, None, None, : self._capacity]
        self._visible.copy_(_additive(visible, self._visible.dtype).repeat_interleave(drafts, 0))
        window = place[:, None].expand_as(self.drafts)
        whole = self.tokens[:, None].repeat(1, drafts, 1).scatter_(2, window, self.drafts)
        input_ids = whole[..., : self._capacity].clamp(min=0).flatten(0, 1)
        positions = self._column[: self._capacity].expand_as(input_ids)
        column = (window.flatten(0, 1) - int(self._lm.logits_shift)).clamp(0, self._capacity - 1)
        rows = (self._first_row + column).flatten()
        return self._lm.features_of_drafts(input_ids, positions, rows, self._over_wholes)

    def poll(self) -> list[bool]:
        """Which slots are done: the one read. Raises `NonFiniteLogitsError` naming the slot and the position."""
        done, broken = torch.stack([self.done.long(), self.non_finite]).tolist()
        for slot, position in enumerate(broken):
            if position >= 0:
                raise NonFiniteLogitsError(
                    f"slot {slot}: the logits of position {position} are not finite; check the weights and the dtype of "
                    "the model"
                )
        return [bool(flag) for flag in done]

    def _over_wholes(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """`[B K, H, T, D]` queries over all that their slot has."""
        mask = self._visible.expand(-1, -1, query.shape[2], -1)
        return attention_with_log_sum_exp(query, key, value, scaling, mask)[0].transpose(1, 2).contiguous()

    def _over_windows(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """`[B K, H, L, D]` queries over their own window, and those of all drafts of a slot over its prefix at once."""
        assert self._cache is not None
        drafts = self._settings.draft_steps
        branch = (key.transpose(1, 2).unflatten(0, (-1, drafts)), value.transpose(1, 2).unflatten(0, (-1, drafts)))
        if layer == len(self._branches):
            self._branches.append((torch.empty_like(branch[0]), torch.empty_like(branch[1])))
        for kept, new in zip(self._branches[layer], branch, strict=True):
            kept.copy_(new)
        out, sums = attention_with_log_sum_exp(query, key, value, scaling, self._hidden_blocks)

        keys, values = self._cache.rows(layer, key, value)
        joined = query.unflatten(0, (-1, drafts)).transpose(1, 2).flatten(2, 3)  # [B, H, K L, D]
        mask = self._stored.expand(-1, -1, joined.shape[2], -1)
        stored, stored_sums = attention_with_log_sum_exp(joined, keys, values, scaling, mask)
        some = (self.start > 0)[:, None, None]  # of no keys, attention is nothing and its log-sum-exp -inf
        stored = torch.where(some[..., None], stored, torch.zeros_like(stored))
        stored_sums = torch.where(some, stored_sums, torch.full_like(stored_sums, float("-inf")))
        parts = (
            stored.unflatten(2, (drafts, -1)).transpose(1, 2).flatten(0, 1),
            stored_sums.unflatten(2, (drafts, -1)).transpose(1, 2).flatten(0, 1),
        )
        merge_into((out, sums), parts, last=True)
        return out.transpose(1, 2).contiguous()

    def _commit(self, step: DraftStep, place: torch.Tensor) -> None:
        """Writes what is proven, keeps the accepted branch's keys and values, and slides the windows."""
        active = ~self.done
        broken = active & (step.non_finite >= 0)
        self.non_finite.copy_(torch.where(broken, self.start + step.non_finite, self.non_finite))
        active = active & ~broken
        self.done |= broken

        committed = active[:, None] & (step.step_map >= 0)
        for columns, new in (
            (self.tokens, step.drafts[:, 0]),
            (self.step_map, step.step_map),
            (self.forward_map, self.forwards.expand_as(place)),
        ):
            columns.scatter_(1, place, torch.where(committed, new, columns.gather(1, place)))
        # The whole window is written; only its first `passed` positions will be read before they are written again.
        where = (self._first_column + place).flatten()
        for layer, branch in enumerate(self._branches):
            assert self._cache is not None
            for buffer, new in zip(self._cache.buffers(layer), branch, strict=True):
                buffer.flatten(0, 1).index_copy_(0, where, new[self._slot, step.accepted].flatten(0, 1))

        passed = torch.where(active, step.prefix_length, 0)
        source = self._window + passed[:, None]
        inside = (source < self._length)[:, None]
        shifted = step.drafts.gather(2, source.clamp(max=self._length - 1)[:, None].expand_as(step.drafts))
        beyond = self.tokens.gather(1, (self.start[:, None] + source).clamp(max=self.tokens.shape[1] - 1))
        drafts = torch.where(inside, shifted, beyond[:, None])
        self.drafts.copy_(torch.where(active[:, None, None], drafts, self.drafts))
        self.num_drafts.copy_(torch.where(active, step.num_drafts.clamp(min=1), self.num_drafts))
        self.start.add_(passed).clamp_(max=self._capacity)  # a window that is done may pass what is beyond it, too
        self.steps_taken += torch.where(active, step.steps, 0)
        self.forwards += 1
        masked = (self.tokens == self._lm.mask_token_id) & (self._column < self.end[:, None])
        self.done |= active & ((step.ended > 0) | ~masked.any(1))


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))
