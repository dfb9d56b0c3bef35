"""The parts of a captured step alone, each in a graph of its own: where the step's time goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stepper import Stepper
from benchmarks.record import Record
from freedave.decode.graph_executor import GraphExecutor
from freedave.decode.shapes import Shape
from freedave.forward.window_attention import WindowAttention
from freedave_kernels import draft_attention

REPLAYS = 15


def measure(record: Record, machine: Machine, case: str, stepper: Stepper, name: str) -> None:
    """`name`: the shape whose parts are measured, in the midst of a decode with an exact or a dual cache."""
    executor, shape = stepper.executor, stepper.shape(name)
    with torch.inference_mode():
        seen = attention_of(executor, shape)
        calls = {
            "backbone, layers compiled" if executor.steps.layers else "backbone": backbone(executor, shape, seen),
            "projection and predict_tokens": predictions(executor, shape),
            f"draft_attention of {executor.state.layers} layers": attention(executor, shape, seen),
        }
        for what, call in calls.items():
            replay = machine.replayed(call, 1)
            spent = machine.back_to_back(replay, REPLAYS, between=lambda: None)
            record.put("part_of_step", f"    {what:<40}{spent:8.3f} ms", case=case, part=what, shape=name, ms=spent)


def attention_of(executor: GraphExecutor, shape: Shape) -> WindowAttention:
    """What the step's rows attend to."""
    lm, settings = executor._lm, executor._settings
    start, length = executor.state.start, executor.state.length
    end = torch.minimum(start + settings.block_length, length) if settings.cache == "dual" else length
    bounds = [torch.zeros_like(start), start, end, length]
    return WindowAttention(
        drafts=shape.drafts,
        ranges=torch.stack(bounds, -1).view(-1, 2, 2).int(),
        window_start=start,
        slots=None,
        num_drafts=executor.state.num_drafts.clamp(max=shape.drafts),
        window_lengths=(end - start).clamp(0, shape.forward),
        block_length=settings.block_length if lm.attention == "block_causal" else None,
    )


def backbone(executor: GraphExecutor, shape: Shape, seen: WindowAttention) -> Callable[[], object]:
    """The features of every draft, without what follows; compiled as in the step."""
    lm, window = executor._lm, executor.steps.steps[shape].window
    tokens = executor.state.drafts[:, : shape.drafts, : shape.window].clamp(min=0).flatten(0, 1)
    positions = executor.state.start[:, None] + torch.arange(shape.forward, device=lm.device)
    positions = positions[:, None].expand(-1, shape.drafts, -1).flatten(0, 1)

    def call() -> object:
        compiled = nullcontext() if executor.steps.layers is None else executor.steps.layers.instead()
        with executor.state.lent(window), compiled:
            return lm.window_features(tokens, positions, None, seen)

    return call


def predictions(executor: GraphExecutor, shape: Shape) -> Callable[[], object]:
    """Logits of all rows, all of them masked, and predictions."""
    lm = executor._lm
    rows = shape.rows * shape.drafts * shape.window
    config: Any = lm.model.config
    features = torch.randn(rows, config.hidden_size, device=lm.device).to(executor.state.dtype)
    masked = torch.full((rows,), lm.mask_token_id, device=lm.device)
    return lambda: executor.step.predict(features, masked)


def attention(executor: GraphExecutor, shape: Shape, seen: WindowAttention) -> Callable[[], object]:
    """All layers' attention, each over its own buffers."""
    window, stored = executor.steps.steps[shape].window, executor.state.stored
    config: Any = executor._lm.model.config
    size = (shape.rows, shape.drafts, shape.forward, config.num_attention_heads, window[0].shape[-1])
    query = torch.randn(size, device=executor._lm.device).to(executor.state.dtype)

    def call() -> object:
        return [
            draft_attention(
                query,
                key,
                value,
                stored_key,
                stored_value,
                seen.ranges,
                window_start=seen.window_start,
                num_drafts=seen.num_drafts,
                window_lengths=seen.window_lengths,
                block_length=seen.block_length,
            )
            for key, value, stored_key, stored_value in zip(*window, *stored, strict=True)
        ]

    return call
