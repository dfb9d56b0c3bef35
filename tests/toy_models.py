"""Made-up models, whose predictions are a function of the state alone, and a decoder of them by the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from states import BROKEN, CONFIDENCES, INF, MASK

import freedave_kernels as fk

State = tuple[int, ...]


@dataclass
class Toy:
    """A position's prediction depends on the blocks up to its own. Most of it stays as the state fills, the rest is anew."""

    seed: int
    block_length: int
    noise: float = 0.2
    broken: float = 0.0
    """The share of predictions that are not finite, or the mask itself."""
    entropies: bool = False
    """Whether its confidences are negative entropies, most of them."""
    known: dict[State, tuple[list[int], list[float]]] = field(default_factory=dict)

    def __call__(self, state: State) -> tuple[list[int], list[float]]:
        if state not in self.known:
            predictions = [self._predict(i, state) for i in range(len(state))]
            sures = [-sure if self.entropies and math.isfinite(sure) else sure for _, sure in predictions]
            self.known[state] = [token for token, _ in predictions], sures
        return self.known[state]

    def _predict(self, i: int, state: State) -> tuple[int, float]:
        if state[i] != MASK:
            return state[i], -INF
        seen = state[: (i // self.block_length + 1) * self.block_length]
        once, now = Random(self.seed * 1009 + i), Random(hash((self.seed, i, *seen)))
        token, sure = once.randrange(MASK), once.choice([*CONFIDENCES, once.random()])
        if now.random() < self.noise:
            sure = now.choice([*CONFIDENCES, now.random()])
        if now.random() < self.noise / 4:
            token = now.randrange(MASK)
        if now.random() < self.broken:
            return (MASK, sure) if now.random() < 0.5 else (token, now.choice(BROKEN))
        return token, sure


@dataclass
class Decoded:
    tokens: list[int]
    step_map: list[int]
    steps: int = 0
    forwards: int = 0
    stuck: bool = False
    start: int = 0  # of the window
    drafts: list[list[int]] = field(default_factory=list)
    done: bool = False

    @property
    def result(self) -> tuple[list[int], list[int], bool]:
        """What must not depend on how it was decoded."""
        return self.tokens, self.step_map, self.stuck


Step = Callable[..., fk.DraftStep]


def decode(
    models: Sequence[Toy],
    states: Sequence[list[int]],
    draft_steps: int,
    drafting: str,
    *,
    answer_start: int = 0,
    window: int | None = None,
    entries: int = 16,
    slots: Sequence[int] | None = None,
    own_block: bool = False,
    draft_step: Step | None = None,
    **rule: Any,
) -> list[Decoded]:
    """Decodes a batch, whose sequences leave it when they are done. The window begins at the answer's first block, and slides
    over what is complete.

    With `own_block`, no draft is computed further than its current block, and what stands beyond is wrong.
    """
    length = len(states[0])
    window = window or length
    pooled = drafting in ("pooled", "pipelined")
    pool = fk.draft_pool(max(slots or range(len(states)), default=0) + 1, entries, window) if pooled else None
    start = min(answer_start - answer_start % (rule["block_length"] or length), length - window)
    sequences = [
        Decoded(list(state), [-1] * length, start=start, drafts=[list(state[start : start + window])])
        for state in states
    ]
    for _ in range(length + 1):
        batch = [b for b, sequence in enumerate(sequences) if not sequence.done]
        if not batch:
            return sequences
        call = _forward(models, [sequences[b] for b in batch], batch, draft_steps, window, own_block, rule)
        own = {name: value[batch] for name, value in rule.items() if isinstance(value, torch.Tensor)}
        named = {"drafting": drafting, **rule, **own}
        if pooled:
            named |= {
                "pool": pool,
                "window_start": torch.tensor([sequences[b].start for b in batch]),
                "slots": torch.tensor([(slots or range(len(states)))[b] for b in batch]),
                "computed_length": call.pop("computed_length"),
            }
        call.pop("computed_length", None)
        named["answer_start"] = torch.tensor([answer_start - sequences[b].start for b in batch])
        named["step"] = torch.tensor([sequences[b].steps for b in batch])
        step = (draft_step or fk.draft_step)(*call.values(), MASK, draft_steps, **named)
        for row, b in enumerate(batch):
            _commit(sequences[b], step, row, window)
    raise AssertionError(f"more forwards than there are positions: {sequences}")


def _forward(
    models: Sequence[Toy],
    sequences: list[Decoded],
    places: list[int],
    draft_steps: int,
    window: int,
    own_block: bool,
    rule: dict[str, Any],
) -> dict[str, torch.Tensor]:
    drafts, token_ids, confidence, computed = [], [], [], []
    for sequence, place in zip(sequences, places, strict=True):
        sequence.forwards += 1
        begin, end = sequence.start, sequence.start + window
        rows = [*sequence.drafts, *[sequence.drafts[-1]] * (draft_steps - len(sequence.drafts))]
        drafts.append(rows)
        for row in rows:
            tail = [MASK] * (len(sequence.tokens) - end)
            tokens, sure = models[place]((*sequence.tokens[:begin], *row, *tail))
            block = rule.get("block_length") or window
            first = next((i for i, token in enumerate(row) if token == MASK), window - 1)
            extent = min((first // block + 1) * block, window) if own_block else window
            computed.append(extent)
            token_ids.append(tokens[begin : begin + extent] + [0] * (window - extent))
            confidence.append(sure[begin : begin + extent] + [2.0] * (window - extent))
    shape = (len(sequences), draft_steps, window)
    return {
        "drafts": torch.tensor(drafts),
        "token_ids": torch.tensor(token_ids).view(shape),
        "confidence": torch.tensor(confidence).view(shape),
        "num_drafts": torch.tensor([len(sequence.drafts) for sequence in sequences]),
        "computed_length": torch.tensor(computed).view(shape[:2]),
    }


def _commit(sequence: Decoded, step: fk.DraftStep, row: int, window: int) -> None:
    begin, last = sequence.start, len(sequence.tokens) - window
    sequence.tokens[begin : begin + window] = step.drafts[row, 0].tolist()
    for i, at in enumerate(step.step_map[row].tolist()):
        if at >= 0:
            assert sequence.step_map[begin + i] == -1
            sequence.step_map[begin + i] = at
    sequence.steps += int(step.steps[row])
    complete = step.masked_in_window[row] == 0
    sequence.stuck = bool(step.steps[row] == 0 and not step.finished[row])
    sequence.done = sequence.stuck or bool(step.ended[row]) or bool(complete and begin == last)
    if sequence.done:
        return
    moved = min(window if complete else int(step.prefix_length[row]), last - begin)
    sequence.start += moved
    active = step.drafts[row, : max(int(step.num_drafts[row]), 1)].tolist()
    sequence.drafts = [draft[moved:] + [MASK] * moved for draft in active]
