"""Hypothesis strategies for decoder states: drafts, predictions and confidences, rich in ties and in broken values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

MASK = 7
INF = float("inf")

# Few distinct values, so that most rows have ties; -0.0 and 0.0 are equal; -inf and nan are never ranked.
CONFIDENCES = [0.125, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 0.0, -0.0, -3.5]
BROKEN = [-INF, float("nan")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(values: list[float], shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
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


def orders() -> st.SearchStrategy[str]:
    return st.sampled_from(["confidence", "left_to_right"])


def block_lengths() -> st.SearchStrategy[int | None]:
    return st.sampled_from([None, 1, 2, 3, 4, 8, 100])


def thresholds() -> st.SearchStrategy[float | None]:
    return st.sampled_from([None, None, -1.0, 0.0, 0.3, 0.5, 0.75, 1.0, 2.0])


@dataclass
class Rows:
    confidence: torch.Tensor
    mask_index: torch.Tensor


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Confidences and masks `[*, L]` with none, one or two leading dimensions, some of them empty or strided."""
    shape = (*draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 0)])), draw(st.integers(1, 40)))
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
def predictions(draw: st.DrawFn, batch: int | None = None, length: int | None = None) -> Prediction:
    """A prediction of `[B, L]` states, as predict_tokens returns it."""
    shape = (
        draw(st.sampled_from([0, 1, 2, 5])) if batch is None else batch,
        draw(st.integers(1, 40)) if length is None else length,
    )
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
def verifications(draw: st.DrawFn, block_length: int | None, order: str, tokens_per_step: int) -> Verification:
    """Drafts `[B, K, L]` built from one prediction, with predictions at each draft that agree with it most of the time.

    So chains of every length occur; a last part of the drafts may be inactive, and some predictions are broken.
    """
    from freedave_kernels.reference.build_drafts import build_drafts

    prediction = draw(predictions())
    count = draw(st.integers(1, 9))
    rule = (tokens_per_step, None, order, block_length)
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
