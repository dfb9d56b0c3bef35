"""dInfer's parallel decoder beside its published rule in plain PyTorch, on random states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from freedave.integrations.dinfer import ThresholdParallelDecoder

MASK, VOCAB, STATES = 50, 64, 200


class TokenArray:
    """As dInfer hands tokens over: sliced like a tensor, which is `data`."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self.data[place]

    def __setitem__(self, place: Any, value: torch.Tensor) -> None:
        self.data[place] = value


def published(logits: torch.Tensor, block: torch.Tensor, threshold: float) -> torch.Tensor:
    """The block after a step, one sequence and position after the other."""
    found = block.clone()
    for b in range(len(block)):
        token = logits[b].float().argmax(-1)
        sure = logits[b].float().softmax(-1).gather(-1, token[:, None])[:, 0]
        open_here = (block[b] == MASK) & (token != MASK)
        if not open_here.any():
            continue
        least = min(threshold, float(sure[open_here].max()) - 1e-5)
        for i in range(block.shape[1]):
            if open_here[i] and sure[i] >= least:
                found[b, i] = token[i]
    return found


def state(seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits `[B, L, V]`, tokens `[B, 3 L]` and a threshold; now and then equal rows, a sure mask, or nothing masked."""
    draw = torch.Generator().manual_seed(seed)
    batch, length = 1 + seed % 4, (4, 8, 32)[seed % 3]
    logits = torch.randn(batch, length, VOCAB, generator=draw) * (1, 3, 10)[seed % 3]
    if seed % 5 == 0:
        logits[:, 1] = logits[:, 0]
    logits[..., MASK] += 8.0 * (torch.rand(batch, length, generator=draw) < 0.2)
    tokens = torch.randint(0, MASK, (batch, 3 * length), generator=draw)
    hidden = torch.rand(batch, length, generator=draw) < (0.0 if seed % 11 == 0 else 0.7)
    tokens[:, length : 2 * length][hidden] = MASK
    return logits.to((torch.float32, torch.bfloat16)[seed % 2]), tokens, (0.5, 0.9, 1.0)[seed // 3 % 3]


@pytest.mark.parametrize("blocks", ["one place", "places"])
def test_the_tokens_are_the_published_ones(blocks: str) -> None:
    changed = 0
    for seed in range(STATES):
        logits, tokens, threshold = state(seed)
        batch, length = logits.shape[:2]
        decoder = ThresholdParallelDecoder(0, threshold, mask_id=MASK)
        wanted = tokens.clone()
        wanted[:, length : 2 * length] = published(logits, tokens[:, length : 2 * length], threshold)
        x = TokenArray(tokens.clone())
        decoder.block_init(x[:, length : 2 * length], 1)
        if blocks == "one place":
            decoder.decode(logits, length, 2 * length, x)
        else:
            decoder.batch_decode(logits, torch.full((batch,), length), x, length)
        assert torch.equal(x.data, wanted), seed
        changed += int((wanted != tokens).sum())
    assert changed > STATES


def test_blocks_may_begin_anywhere() -> None:
    logits, tokens, threshold = state(7)
    length, begin = logits.shape[1], torch.tensor([0, 5, 3, 8])
    tokens[:] = MASK
    x = TokenArray(tokens.clone())
    ThresholdParallelDecoder(0, 2.0, mask_id=MASK).batch_decode(logits, begin, x, length, iter_threshold=threshold)
    for b, first in enumerate(begin.tolist()):
        mine = slice(first, first + length)
        assert torch.equal(x[b : b + 1, mine], published(logits[b : b + 1], tokens[b : b + 1, mine], threshold))
        assert (x.data[b, :first] == MASK).all() and (x.data[b, first + length :] == MASK).all()


def test_a_threshold_of_a_step_stands_before_the_decoders() -> None:
    logits, tokens, _ = state(6)
    length = logits.shape[1]
    x = tokens.clone()  # a tensor serves as well
    ThresholdParallelDecoder(0, 1.0, mask_id=MASK).decode(logits, length, 2 * length, x, iter_threshold=0.0)
    assert torch.equal(x[:, length : 2 * length], published(logits, tokens[:, length : 2 * length], 0.0))


@pytest.mark.parametrize("refused", [{"temperature": 0.7}, {"remasking": "random"}, {"use_float64": True}])
def test_what_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ThresholdParallelDecoder: {next(iter(refused))} must be"):
        ThresholdParallelDecoder(**{"temperature": 0, "threshold": 0.9, "mask_id": MASK} | refused)
