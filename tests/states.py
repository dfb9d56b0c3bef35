"""Hypothesis strategies for decoder states: drafts, predictions and confidences, rich in ties and in broken values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st

from freedave_kernels.contract import RULES

MASK = 7
INF = float("inf")

# Few distinct values, so that most rows have ties; -0.0 and 0.0 are equal; -inf and nan are never ranked.
CONFIDENCES = [0.125, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 0.0, -0.0, -3.5]
BROKEN = [-INF, float("nan")]


T = TypeVar("T")

FEW = 8
_few = False


@contextlib.contextmanager
def few_combinations(wanted: bool = True) -> Iterator[None]:
    """While a Triton kernel is compiled for every combination of constants, a second each, `Constants` picks one of `FEW`."""
    global _few
    before, _few = _few, wanted
    try:
        yield
    finally:
        _few = before


class Constants:
    """Draws what a Triton kernel is compiled for: flags, dtypes, and sizes up to the next power of two. All combinations
    on backends that compile nothing; else a few, the same in every run, with all values of each flag among them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._fixed = Random(draw(st.integers(1, FEW))) if _few else None

    def one_of(self, values: Sequence[T]) -> T:
        return self._fixed.choice(values) if self._fixed else self._draw(st.sampled_from(values))

    def value(self, wide: st.SearchStrategy[T], few: Sequence[T]) -> T:
        return self._fixed.choice(few) if self._fixed else self._draw(wide)

    def size(self, low: int, high: int) -> int:
        """From `low` to `high`."""
        if self._fixed:
            least = self._fixed.choice([n for n in (1, 2, 3, 5, 9, 17, 33, 65) if low <= n <= high])
            low, high = least, min(high, 2 * (least - 1) or 1)
        return self._draw(st.integers(low, high))

    def order(self) -> str:
        return self.one_of(["confidence", "left_to_right"])

    def threshold(self) -> float | None:
        """Two thirds of the time there is one."""
        given = self.one_of([False, True, True])
        return self._draw(st.sampled_from([-1.0, 0.0, 0.3, 0.5, 0.75, 1.0, 2.0])) if given else None

    def rule(self) -> dict[str, Any]:
        """A threshold and what it bounds."""
        threshold = self.threshold()
        return {"threshold": threshold, "rule": "threshold" if threshold is None else self.one_of(RULES)}

    def of_each(self, settings: dict[str, Any], batch: int) -> dict[str, Any]:
        """Some of the settings of static decoding in the form of one a sequence."""
        random = generator(self._draw(st.integers(0, 2**32)))
        choices: dict[str, torch.Tensor] = {
            "tokens_per_step": choose([0, 1, 1, 2, 3], (batch,), random),
            "threshold": choose([0.3, 0.5, 0.75, 2.0, float("nan")], (batch,), random),
            "eos_token_id": choose([-1, 0, 3], (batch,), random),
        }
        given = {}
        for name, each in choices.items():
            if name in settings and self.one_of([False, False, True]):
                kinds = [torch.float32, torch.float64] if name == "threshold" else [torch.int32, torch.int64]
                given[name] = each.to(self.one_of(kinds))
        return settings | given


def alone(settings: dict[str, Any], b: int) -> dict[str, Any]:
    """For sequence b by itself: its own settings as numbers, of every other tensor its part."""
    numbers = {
        "tokens_per_step": lambda one: max(int(one), 1),
        "threshold": lambda one: None if one.isnan() else float(one),
        "eos_token_id": lambda one: int(one) if one >= 0 else None,
    }
    limit = settings.get("threshold")
    if isinstance(limit, torch.Tensor) and limit[b].isnan():
        settings = {name: value for name, value in settings.items() if name != "rule"}  # it says nothing then
    return {
        name: value
        if not isinstance(value, torch.Tensor)
        else numbers[name](value[b])
        if name in numbers
        else value[b : b + 1]
        for name, value in settings.items()
    }


def ranked_for(rule: str, confidence: torch.Tensor) -> torch.Tensor:
    """The same, but as an entropy bound has them: most are negative entropies."""
    return torch.where(confidence.isinf(), confidence, -confidence) if rule == "entropy_bound" else confidence


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(values: Sequence[float], shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.tensor(values)[torch.randint(len(values), shape, generator=random)]


@st.composite
def confidences(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 of `shape`; continuous or tied, sometimes with values that are never ranked."""
    random = generator(draw(st.integers(0, 2**32)))
    continuous = draw(st.booleans())
    value = torch.rand(shape, generator=random) if continuous else choose(CONFIDENCES, shape, random)
    if draw(st.integers(0, 3)) == 0:
        broken = choose(BROKEN, shape, random)
        value = torch.where(torch.rand(shape, generator=random) < 0.15, broken, value)
    return value


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Bool of `shape`, from nothing masked to everything masked."""
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return torch.rand(shape, generator=generator(draw(st.integers(0, 2**32)))) < share


def tokens(shape: tuple[int, ...], random: torch.Generator, masks_among: bool) -> torch.Tensor:
    """Predicted tokens; with `masks_among`, the mask is among them."""
    token_ids = torch.randint(MASK, shape, generator=random)
    predicts_mask = torch.rand(shape, generator=random) < 0.15
    return torch.where(predicts_mask, MASK, token_ids) if masks_among else token_ids


def block_lengths() -> st.SearchStrategy[int | None]:
    return st.sampled_from([None, 1, 2, 3, 4, 8, 100])


@dataclass
class Rows:
    confidence: torch.Tensor
    mask_index: torch.Tensor


@st.composite
def rows(draw: st.DrawFn, constants: Constants) -> Rows:
    """Confidences and masks `[*, L]` with none, one or two leading dimensions, some of them empty or strided."""
    shape = (*draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 0)])), constants.size(1, 40))
    confidence, mask_index = draw(confidences(shape)), draw(masks(shape))
    if draw(st.booleans()):  # every other element of a larger tensor
        confidence = torch.stack([confidence, confidence + 1], -1)[..., 0]
        mask_index = torch.stack([mask_index, ~mask_index], -1)[..., 0]
    return Rows(confidence, mask_index)


@dataclass
class Prediction:
    input_ids: torch.Tensor
    token_ids: torch.Tensor
    confidence: torch.Tensor


@st.composite
def predictions(draw: st.DrawFn, constants: Constants, batch: int | None = None) -> Prediction:
    """A prediction of `[B, L]` states, as predict_tokens returns it."""
    shape = (draw(st.sampled_from([0, 1, 2, 5])) if batch is None else batch, constants.size(1, 40))
    masked, confidence = draw(masks(shape)), draw(confidences(shape))
    random = generator(draw(st.integers(0, 2**32)))
    input_ids = torch.where(masked, MASK, tokens(shape, random, False))
    token_ids = tokens(shape, random, draw(st.booleans()))
    return Prediction(
        input_ids, torch.where(masked, token_ids, input_ids), torch.where(masked, confidence, torch.tensor(-INF))
    )


@dataclass
class Verification:
    """What a decoder holds after a forward: drafts and the predictions at each of them."""

    drafts: torch.Tensor
    num_drafts: torch.Tensor
    token_ids: torch.Tensor
    confidence: torch.Tensor


@st.composite
def verifications(
    draw: st.DrawFn, constants: Constants, block_length: int | None, order: str, tokens_per_step: int
) -> Verification:
    """Drafts `[B, K, L]` built from one prediction, with predictions at each draft that agree with it most of the time.

    So chains of every length occur; a last part of the drafts may be inactive, and some predictions are broken.
    """
    from freedave_kernels.reference.build_drafts import build_drafts

    prediction = draw(predictions(constants))
    count = constants.size(1, 9)
    rule = (tokens_per_step, None, None, None, "threshold", order, block_length)
    drafts, num_drafts = build_drafts(
        prediction.input_ids, prediction.token_ids, prediction.confidence, MASK, count, *rule
    )
    random = generator(draw(st.integers(0, 2**32)))
    change = torch.rand(drafts.shape, generator=random) < draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    masked = drafts == MASK
    others = tokens(tuple(drafts.shape), random, draw(st.booleans()))
    token_ids = torch.where(change, others, prediction.token_ids[:, None])
    confidence = torch.where(change, draw(confidences(tuple(drafts.shape))), prediction.confidence[:, None])
    return Verification(
        drafts,
        num_drafts,
        torch.where(masked, token_ids, drafts),
        torch.where(masked, confidence, torch.tensor(-INF)),
    )
