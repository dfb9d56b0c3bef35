"""Tensor parallelism: which layers of a native model are divided among processes, and what of each file a process reads.

transformers' own plan says which layers are divided (`base_model_tp_plan`, what its `tp_plan="auto"` means). The layers are
those of `freedave.forward.shards`, whose sums have the same bits whatever else is in a forward.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from typing import Any

import torch
import torch.distributed as dist

from freedave.forward.shards import Ranks, ShardedEmbedding, ShardedHead, SummedLinear, vocabulary_bounds
from freedave.models.errors import CheckpointError

Part = tuple[slice, ...]

# Whatever else a plan says: norms that each process holds whole.
_WHOLE = "replicated_with_grad_allreduce"
_NOT_STARTED = (
    "tensor_parallel needs one process a shard, started together: torchrun --nproc-per-node 2 program.py (or call "
    "torch.distributed.init_process_group first)"
)


def own_device(device: str | torch.device) -> str | torch.device:
    """Of processes on one machine, each has the GPU of its number, where "cuda" was asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if str(device) == "cuda" and "LOCAL_RANK" in os.environ else device


def join(device: torch.device) -> Ranks:
    """This process among those that were started together; begins torch.distributed's default group where there is none.

    Raises:
        ValueError: it was started alone, or this build of torch has no torch.distributed.
    """
    if not dist.is_available():
        raise ValueError("tensor_parallel: this build of torch has no torch.distributed")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError(_NOT_STARTED)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def shard(model: Any, ranks: Ranks) -> dict[str, Part]:
    """Gives a native model on the meta device the layers of one process; returns which part of each parameter they hold.

    Parameters that are not named are whole.

    Raises:
        CheckpointError: it cannot be divided among so many processes; says why, and nothing was changed.
    """
    layers = _planned(model, ranks)
    parts: dict[str, Part] = {}
    for name, style in layers.items():
        linear = model.get_submodule(name)
        if style == "rowwise":
            model.set_submodule(name, SummedLinear(linear, ranks))
            parts[f"{name}.weight"] = (slice(None), ranks.share(linear.in_features))
            continue
        rows = ranks.share(linear.out_features)
        biased = linear.bias is not None
        own = torch.nn.Linear(
            linear.in_features, rows.stop - rows.start, bias=biased, device="meta", dtype=linear.weight.dtype
        )
        model.set_submodule(name, own)
        parts[f"{name}.weight"] = parts[f"{name}.bias"] = (rows,)
    bounds = vocabulary_bounds(model.config.vocab_size, ranks.count)
    vocabulary = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    model.set_input_embeddings(ShardedEmbedding(model.get_input_embeddings(), ranks))
    model.set_output_embeddings(ShardedHead(model.get_output_embeddings(), ranks))
    parts["model.embed_tokens.weight"] = parts["lm_head.weight"] = (vocabulary,)
    model.freedave_ranks = ranks
    return parts


def _planned(model: Any, ranks: Ranks) -> dict[str, str]:
    """The linear layers to be divided: "colwise" by their outputs, or "rowwise" by their inputs."""
    config, kind = model.config, type(model).__name__
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    prefix = f"{model.base_model_prefix}."
    layers: dict[str, str] = {}
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+\.", ".*.", name.removeprefix(prefix)))
        if style in (None, _WHOLE):
            continue
        if style not in ("colwise", "rowwise") or type(module) is not torch.nn.Linear:
            raise CheckpointError(
                f"tensor_parallel: {kind} has {name} ({type(module).__name__}, {style}), which cannot be divided among "
                "processes; mixtures of experts are loaded whole"
            )
        layers[name] = style
    if not layers:
        raise CheckpointError(f"tensor_parallel: transformers has no plan of how to divide a {kind}")
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "features of the MLP (intermediate_size)": config.intermediate_size,
    }
    uneven = [f"{size} {what}" for what, size in sizes.items() if size % ranks.count]
    if uneven:
        most = math.gcd(*sizes.values())
        possible = ", ".join(str(count) for count in range(1, most + 1) if most % count == 0)
        raise CheckpointError(
            f"tensor_parallel: {ranks.count} processes cannot share {', '.join(uneven)} evenly; of these numbers of "
            f"processes each can: {possible}"
        )
    bounds = vocabulary_bounds(config.vocab_size, ranks.count)
    if any(first == end for first, end in itertools.pairwise(bounds)):
        raise CheckpointError(
            f"tensor_parallel: a vocabulary of {config.vocab_size} is too small for {ranks.count} processes"
        )
    return layers
