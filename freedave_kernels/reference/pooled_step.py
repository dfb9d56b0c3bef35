"""pooled_step in plain Python, one sequence after the other: it reads values on the host, unlike every other backend.

Each sequence is looked at from its window on: element i of a list is window position i, whichever column of the pool that is.
What lies beyond the window is masked in every draft.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from freedave_kernels.contract import COUNTERS, PoolLayout, RecordLayout
from freedave_kernels.reference.build_drafts import threshold_of_each, tokens_of_each

INF = float("inf")
DECAY, LEAST_SCORE = 0.85, 1e-6  # of a draft's score, float32
EFFECT = 0.5  # how much of a measured effect is expected at other states

State = list[int]


class Rule(NamedTuple):
    """Static decoding of one sequence."""

    mask_token_id: int
    tokens_per_step: int
    threshold: float
    """NaN: none."""
    rule: str
    """What it bounds."""
    left_to_right: bool
    block_length: int
    length: int
    eos_token_id: int
    """Negative: none."""
    answer_start: int

    def masked(self, state: State) -> list[int]:
        return [i for i in range(self.length) if state[i] == self.mask_token_id]

    def current_block(self, state: State) -> range:
        """The lowest block with a masked position; empty, at the window's end, where there is none."""
        first = next(iter(self.masked(state)), self.length)
        begin = first - first % self.block_length if first < self.length else first
        return range(begin, min(begin + self.block_length, self.length))

    def ended(self, state: State) -> bool:
        """Whether nothing is left to decode: no masked position, or an end token in a leading complete block."""
        complete = self.current_block(state).start
        return complete == self.length or self.has_end(state)

    def has_end(self, state: State) -> bool:
        """Whether an end token stands in a leading complete block, the prompt left out."""
        answer = state[max(self.answer_start, 0) : self.current_block(state).start]
        return self.eos_token_id >= 0 and self.eos_token_id in answer

    def picks(self, state: State, confidence: Sequence[float]) -> list[int]:
        """The positions that one static step fills, in ascending order."""
        masked = [i for i in self.current_block(state) if state[i] == self.mask_token_id]
        ranked = [i for i in masked if confidence[i] > -INF]
        if not self.left_to_right:
            ranked.sort(key=lambda i: -confidence[i])  # stable: ties go to the lower position
        passing = self.passing(masked, ranked, confidence)
        return sorted(passing or ranked[: self.tokens_per_step])

    def passing(self, masked: list[int], ranked: list[int], confidence: Sequence[float]) -> list[int]:
        """What passes the threshold, of a block's `masked` positions, `ranked` without those that cannot be."""
        found: list[int] = []
        entropy = 0.0
        for i in masked if self.left_to_right else ranked:
            entropy -= min(confidence[i], 0.0)
            if not (confidence[i] > -INF and self.goes_on(len(found), confidence[i], entropy)):
                break
            found.append(i)
        return ranked if self.rule == "factor" and found and len(found) == len(masked) - 1 else found

    def goes_on(self, before: int, confidence: float, entropy: float) -> bool:
        """Whether a step that has `before` positions takes one of this confidence; `entropy` is that of all of them."""
        if self.rule == "factor":
            limit = 1 - self.threshold / (before + 2)
            return confidence >= limit if before else not math.isnan(self.threshold)
        if self.rule == "entropy_bound":
            return entropy < self.threshold
        return confidence > self.threshold if self.rule == "strict" else confidence >= self.threshold


class Known(NamedTuple):
    """A state that was forwarded, and what was predicted at it."""

    state: State
    token_ids: list[int]
    confidence: list[float]
    computed: int
    """Leading positions of the window whose predictions are known."""
    age: int
    """Larger is newer."""
    place: int
    """The input draft's index; of an entry of the pool -1 - its index."""

    def serves(self, rule: Rule) -> bool:
        """Whether the static step from it is known."""
        block = rule.current_block(self.state)
        return len(block) > 0 and block.stop <= self.computed


def filled(state: State, picks: Iterable[int], token_ids: Sequence[int]) -> State:
    state = list(state)
    for i in picks:
        state[i] = token_ids[i]
    return state


def extends(state: State, other: State, mask_token_id: int) -> bool:
    """Whether `state` agrees with `other` wherever that is filled."""
    return all(there in (mask_token_id, here) for here, there in zip(state, other, strict=True))


def distance(state: State, other: State) -> int:
    """Hamming distance."""
    return sum(here != there for here, there in zip(state, other, strict=True))


def newest(known: Iterable[Known], state: State, rule: Rule) -> Known | None:
    """The newest known state that is `state`, if the static step from it is known."""
    same = [one for one in known if one.state == state and one.serves(rule)]
    return max(same, key=lambda one: one.age, default=None)


Path = list[tuple[Known, list[int]]]


def verify(first: Known, known: list[Known], rule: Rule) -> tuple[Path, State]:
    """Static decoding from `first` for as long as its states are known, each with what is filled then; where it leads."""
    path: Path = []
    one: Known | None = first
    state = first.state
    while one is not None:
        picks = rule.picks(one.state, one.confidence) if one.serves(rule) else []
        path.append((one, picks))
        state = filled(one.state, picks, one.token_ids)
        one = newest(known, state, rule) if picks and not rule.ended(state) else None
    return path, state


class Effect(NamedTuple):
    """What filling a position does to the confidences elsewhere, measured by two drafts of which the second fills it."""

    position: int
    before: list[float]
    after: list[float]

    def on(self, confidence: torch.Tensor, i: int) -> torch.Tensor:
        """A float32 confidence at position `i`, as it is to be expected once this one is filled, too."""
        before, after = self.before[i], self.after[i]
        if not (before > -INF and after > -INF):  # not measured here
            return confidence
        return confidence + EFFECT * (torch.tensor(after) - torch.tensor(before))


def measured_effects(drafts: list[Known], mask_token_id: int) -> list[Effect]:
    """Of the drafts that fill one position more than the draft before them."""
    effects = []
    for before, after in itertools.pairwise(drafts):
        different = [i for i, (a, b) in enumerate(zip(before.state, after.state, strict=True)) if a != b]
        if len(different) == 1 and before.state[different[0]] == mask_token_id:
            effects.append(Effect(different[0], before.confidence, after.confidence))
    return effects


def foresee(state: State, known: list[Known], effects: list[Effect], rule: Rule) -> tuple[list[int], list[float]]:
    """What to expect at a state: each position as predicted at the nearest known state that has a prediction there. What is
    filled by now, but not in that state, has half the effects on its confidence that were measured, added in their order.
    """
    token_ids, confidence = list(state), [-INF] * len(state)
    nearest = sorted(known, key=lambda one: (distance(one.state, state), one.age))
    mask = rule.mask_token_id
    for i in rule.masked(state):
        for one in nearest:
            if one.confidence[i] > -INF:
                expected = torch.tensor(one.confidence[i])
                for effect in effects:
                    if state[effect.position] != mask and one.state[effect.position] == mask:
                        expected = effect.on(expected, i)
                token_ids[i], confidence[i] = one.token_ids[i], expected.item()
                break
    return token_ids, confidence


def next_drafts(
    state: State,
    known: list[Known],
    kept: list[Known],
    effects: list[Effect],
    rule: Rule,
    draft_steps: int,
    pipelined: bool,
) -> list[State]:
    """`state`, which static decoding reaches for sure, and the states after it that are worth a forward."""
    first, block = state, rule.current_block(state)
    score = values = torch.tensor(1.0)
    scores: list[float] = []
    candidates: list[State] = []
    while not rule.ended(state) and score.item() > torch.tensor(LEAST_SCORE).item():
        if pipelined and rule.current_block(state) != block:
            score = (values * values) * (values * values)
        block = rule.current_block(state)
        one = newest(kept, state, rule)
        if one is not None:  # costs no forward
            token_ids, picks = one.token_ids, rule.picks(state, one.confidence)
        else:
            if not pipelined and len(candidates) == draft_steps:
                break
            candidates.append(state)
            scores.append(score.item())
            score = score * DECAY
            token_ids, confidence = foresee(state, known, effects, rule)
            picks = rule.picks(state, confidence)
            for i in picks:
                values = values * min(max(confidence[i], 0.0), 1.0)
        if not picks:
            break
        state = filled(state, picks, token_ids)
    best = sorted(range(1, len(candidates)), key=lambda n: -scores[n])[
        : draft_steps - 1
    ]  # stable: ties go to the earlier
    return [first, *(candidates[n] for n in sorted(best))]


class Pool:
    """A slot as seen from a window: its columns in the order of positions. What is written goes to the slot."""

    def __init__(self, memory: torch.Tensor, states: int, length: int, window_start: int) -> None:
        layout = PoolLayout.of(states, length)
        size = (states, length)
        self.states, self.token_ids = memory[layout.states].view(size), memory[layout.token_ids].view(size)
        self.computed, self.age, self.start = memory[layout.computed], memory[layout.age], memory[layout.start]
        self.confidence = memory[layout.confidence].view(torch.float32)[: states * length].view(size)
        self.window_start, self.entries, self.width = window_start, states, length
        self.columns = (window_start + torch.arange(length)) % length

    def enter(self, mask_token_id: int, forget: bool) -> None:
        """Positions that the window has left make room for others; a jump is a new start."""
        start = int(self.start)
        slid = 0 <= self.window_start - start < self.width
        if forget or not slid:
            self.age.zero_()
        left = (start + torch.arange(self.window_start - start if slid else 0)) % self.width
        for tensor, empty in ((self.states, mask_token_id), (self.token_ids, mask_token_id), (self.confidence, -INF)):
            tensor[:, left] = empty
        self.start.fill_(self.window_start)

    def known(self, length: int) -> list[Known]:
        return [
            Known(
                self.states[n, self.columns].tolist(),
                self.token_ids[n, self.columns].tolist(),
                self.confidence[n, self.columns].tolist(),
                min(int(self.computed[n]) - self.window_start, length),
                int(self.age[n]),
                -1 - n,
            )
            for n in range(self.entries)
            if self.age[n] > 0
        ]

    def keep(self, kept: list[Known]) -> None:
        """Makes `kept` the pool: entries stay where they are, drafts go where there is room, the oldest first."""
        stay = {-1 - one.place for one in kept if one.place < 0}
        room = [n for n in range(self.entries) if n not in stay]
        for n in room:
            self.age[n] = 0
        drafts = sorted((one for one in kept if one.place >= 0), key=lambda one: one.age)
        for n, one in zip(room, drafts, strict=False):
            self.states[n, self.columns] = torch.tensor(one.state)
            self.token_ids[n, self.columns] = torch.tensor(one.token_ids)
            self.confidence[n, self.columns] = torch.tensor(one.confidence)
            self.computed[n] = self.window_start + one.computed
            self.age[n] = one.age


def kept_states(state: State, known: list[Known], count: int, mask_token_id: int) -> list[Known]:
    """The newest `count` known states that decoding may still come through from `state` on."""
    agreeing = [one for one in known if extends(one.state, state, mask_token_id)]
    return sorted(agreeing, key=lambda one: -one.age)[:count]


def input_draft(
    state: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    computed: int,
    width: int,
    mask_token_id: int,
    clock: int,
    place: int,
) -> Known:
    """Draft `place`. Predicted is what was computed, masked there, and not predicted to be the mask."""
    beyond = width - len(state)
    tokens = torch.where(torch.arange(len(state)) < computed, token_ids, state)
    certainty = torch.where((state == mask_token_id) & (tokens != mask_token_id), confidence, -INF)
    return Known(
        state.tolist() + [mask_token_id] * beyond,
        tokens.tolist() + [mask_token_id] * beyond,
        certainty.tolist() + [-INF] * beyond,
        computed,
        clock + 1 + place,
        place,
    )


def record(path: Path, state: State, drafts: list[State], rule: Rule, draft_steps: int, step: int) -> list[int]:
    """A row of what draft_step returns; `drafts` is empty where nothing could be filled."""
    length, mask = rule.length, rule.mask_token_id
    first, last = path[0][0], path[-1][0]
    accepted = [known for known, _ in path if known.place >= 0][-1]
    step_map = [-1] * length
    for n, (_, picks) in enumerate(path):
        for i in picks:
            step_map[i] = step + n

    block = rule.current_block(state)
    broken = [i for i in rule.current_block(last.state) if last.state[i] == mask and not last.confidence[i] > -INF]
    ended = rule.has_end(state)
    counters = {
        "accepted": accepted.place,
        "steps": sum(bool(picks) for _, picks in path),
        "tokens_committed": len(rule.masked(first.state)) - len(rule.masked(state)),
        "masked_in_block": sum(state[i] == mask for i in block),
        "masked_in_window": len(rule.masked(state)),
        "prefix_length": rule.current_block(accepted.state).start,
        "forward_drafts": sum(len(rule.masked(draft)) > 0 for draft in drafts),
        "finished": ended or not rule.masked(state),
        "non_finite": min(broken, default=-1),
        "num_drafts": len(drafts),
        "ended": ended,
    }
    rows = [*drafts, *[(drafts or [state])[-1]] * (draft_steps - len(drafts))]
    pairs = torch.tensor(last.confidence[:length] + [0.0] * (length % 2)).view(torch.int64)
    return [
        *(int(counters[name]) for name in COUNTERS),
        *last.token_ids[:length],
        *step_map,
        *itertools.chain.from_iterable(row[:length] for row in rows),
        *pairs.tolist(),
    ]


def pooled_step(
    drafts: torch.Tensor,
    token_ids: torch.Tensor,
    confidence: torch.Tensor,
    num_drafts: torch.Tensor,
    pool: torch.Tensor,
    pool_states: int,
    pool_length: int,
    mask_token_id: int,
    draft_steps: int,
    tokens_per_step: int,
    tokens_per_step_per_row: torch.Tensor | None,
    threshold: float | None,
    threshold_per_row: torch.Tensor | None,
    rule: str,
    order: str,
    block_length: int | None,
    drafting: str,
    eos_token_id: int | None,
    eos_token_id_per_row: torch.Tensor | None,
    step: torch.Tensor | None,
    answer_start: torch.Tensor | None,
    window_start: torch.Tensor | None,
    computed_length: torch.Tensor | None,
    slots: torch.Tensor | None,
    forget: torch.Tensor | None,
) -> torch.Tensor:
    batch, count, length = drafts.shape
    tokens = tokens_of_each(drafts, tokens_per_step, tokens_per_step_per_row)
    limits = threshold_of_each(confidence, threshold, threshold_per_row)
    end = -1 if eos_token_id is None else eos_token_id
    device, memory = drafts.device, pool.cpu()
    drafts, token_ids, confidence = drafts.cpu(), token_ids.cpu(), confidence.cpu()

    def of(tensor: torch.Tensor | None, b: int, default: int = 0) -> int:
        return default if tensor is None else int(tensor[b])

    records = []
    for b in range(batch):
        static = Rule(
            mask_token_id, of(tokens, b), float(limits[b]), rule, order == "left_to_right", block_length or length, length,
            of(eos_token_id_per_row, b, end), of(answer_start, b),
        )  # fmt: skip
        slot = Pool(memory[of(slots, b, b)], pool_states, pool_length, of(window_start, b))
        slot.enter(mask_token_id, bool(of(forget, b)))
        entries = slot.known(length)
        active = min(max(of(num_drafts, b), 1), count)  # draft 0 is right by construction
        extent = [length] * count if computed_length is None else computed_length[b].clamp(0, length).tolist()
        clock = max((entry.age for entry in entries), default=0)
        inputs = [
            input_draft(
                drafts[b, j], token_ids[b, j], confidence[b, j], extent[j], pool_length, mask_token_id, clock, j
            )
            for j in range(active)
        ]

        known = [*inputs, *entries]
        path, state = verify(inputs[0], known, static)
        kept = kept_states(state, known, pool_states, mask_token_id)
        slot.keep(kept)
        built = []
        if path[-1][1]:  # else nothing can be filled, nor could it be after another forward of the same state
            effects = measured_effects(inputs, mask_token_id)
            built = next_drafts(state, known, kept, effects, static, draft_steps, drafting == "pipelined")
        records.append(record(path, state, built, static, draft_steps, of(step, b)))
    if memory is not pool:
        pool.copy_(memory)
    width = RecordLayout.of(length, draft_steps).width
    return torch.tensor(records, dtype=torch.int64, device=device).view(batch, width)
