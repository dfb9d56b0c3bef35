"""The parts of a captured step alone, each in a graph of its own: where the step's time goes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.stepper import Stepper
from benchmarks.record import Record
from freedave.compiled_layers import compiled_layers
from freedave.graph_executor import GraphExecutor, Shape
from freedave.window_attention import layer_buffers
from freedave_kernels import draft_attention

REPLAYS = 15


def measure(record: Record, machine: Machine, case: str, stepper: Stepper, name: str) -> None:
    """`name`: the shape whose parts are measured, in the midst of a decode."""
    executor, shape = stepper.executor, stepper.shape(name)
    with torch.inference_mode():
        calls = {
            "backbone, layers compiled" if executor._compile else "backbone": backbone(executor, shape),
            "projection and predict_tokens": predictions(executor, shape),
            f"draft_attention of {len(executor._modules)} layers": attention(executor, shape),
        }
        for what, call in calls.items():
            replay = machine.replayed(call, 1)
            spent = machine.back_to_back(replay, REPLAYS, between=lambda: None)
            record.put("part_of_step", f"    {what:<40}{spent:8.3f} ms", case=case, part=what, shape=name, ms=spent)


def backbone(executor: GraphExecutor, shape: Shape) -> Callable[[], object]:
    """The features of every draft, without what follows; compiled as in the step."""
    window = executor._steps[shape].window

    def call() -> object:
        drafts = executor._taken(executor.drafts, shape)[:, : shape.drafts, : shape.window]
        with layer_buffers(executor._modules, executor._stored, window):
            if not executor._compile:
                return executor._forward(shape, drafts)
            with compiled_layers(executor._lm.model):
                return executor._forward(shape, drafts)

    return call


def predictions(executor: GraphExecutor, shape: Shape) -> Callable[[], object]:
    """Logits of all rows, all of them masked, and predictions."""
    lm = executor._lm
    rows = shape.rows * shape.drafts * shape.window
    model = lm.model
    features = torch.randn(rows, model.config.hidden_size, device=lm.device, dtype=executor._dtype)
    masked = torch.full((rows,), lm.mask_token_id, device=lm.device)
    return lambda: executor._predict(features, masked)


def attention(executor: GraphExecutor, shape: Shape) -> Callable[[], object]:
    """All layers' attention, each over its own buffers, with what the step's rows see."""
    window, stored = executor._steps[shape].window, executor._stored
    heads = executor._lm.model.config.num_attention_heads
    size = (shape.rows, shape.drafts, shape.forward, heads, executor._layout[1])
    query = torch.randn(size, device=executor._lm.device).to(executor._dtype)
    begin = executor.start.clamp(min=0)
    ranges = torch.stack([torch.zeros_like(begin), begin], -1)[:, None].int()
    block_length = executor._size if executor._lm.attention == "block_causal" else None

    def call() -> object:
        return [
            draft_attention(query, *layer, ranges, block_length=block_length)
            for layer in zip(*window, *stored, strict=True)
        ]

    return call
