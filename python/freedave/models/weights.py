"""From the tensors of a checkpoint to those of a native model: the plan, its check, and the streaming.

Three names for one weight: what the publisher called it (a *source*), what the native class calls it in its own files, and
the parameter of the model, which may be a stack of many of the latter (experts).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from freedave.models.description import Description
from freedave.models.errors import CheckpointError
from freedave.models.families import Source
from freedave.models.stored_weights import StoredTensor, StoredWeights

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Older transformers stored what follows from rope_theta.
DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class NativeTensor:
    """A tensor of the native class's own files, its source, and the part of the model that it is.

    `part`: what of it this process holds, where the model is divided among several.
    """

    name: str
    source: Source
    parameter: str
    index: tuple[int | slice, ...] = ()
    part: tuple[slice, ...] = ()


def plan(description: Description, model: nn.Module) -> list[NativeTensor]:
    """What a native model (on the meta device will do) is made of. Tied weights have no tensor of their own."""
    tied: Any = model.all_tied_weights_keys
    tensors = []
    for parameter, tensor in model.state_dict().items():
        if parameter in tied:
            continue
        for name, index, shape in _in_files(parameter, tuple(tensor.shape)):
            source = description.family.source(name, shape, description.config)
            tensors.append(NativeTensor(name, source, parameter, index))
    return tensors


def _in_files(parameter: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int | slice, ...], tuple[int, ...]]]:
    """(name in files, part of the parameter, shape); experts are stacked in the model and apart in files."""
    experts, separator, stack = parameter.rpartition(".experts.")
    if not separator:
        return [(parameter, (), shape)]
    prefix = experts + separator
    if stack == "down_proj":
        return [(f"{prefix}{expert}.down_proj.weight", (expert,), shape[1:]) for expert in range(shape[0])]
    width = shape[1] // 2
    halves = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
    return [
        (f"{prefix}{expert}.{name}.weight", (expert, rows), (width, *shape[2:]))
        for expert in range(shape[0])
        for name, rows in halves.items()
    ]


def check(description: Description, tensors: list[NativeTensor], weights: StoredWeights) -> None:
    """Compares the plan with the headers; raises a CheckpointError that lists everything that does not fit."""
    expected = {tensor.source.name: tensor.source.shape for tensor in tensors}
    tied_head = _tied_head(description)
    quantisation = description.quantisation
    wholes = {} if quantisation is None else quantisation.wholes(weights.tensors)
    quantised = set(wholes.values())  # of any shape and type; transformers' loader knows them
    names = (weights.tensors.keys() - wholes.keys()) | quantised
    problems: dict[str, list[str]] = {kind: list(names) for kind, names in weights.problems.items()}
    if not weights.lost_all:
        problems["missing keys"] = sorted(expected.keys() - names - weights.lost)
    problems["unexpected keys"] = sorted(
        name
        for name in names - expected.keys()
        if not name.endswith(DERIVED) and (tied_head is None or name != tied_head.name)
    )
    whole = (expected.keys() & weights.tensors.keys()) - quantised
    shared = [(name, weights.tensors[name]) for name in sorted(whole)]
    problems["wrong shapes"] = [
        f"{name} is {list(stored.shape)}, by config.json {list(expected[name])}"
        for name, stored in shared
        if stored.shape != expected[name]
    ]
    if quantisation is not None:
        problems["incomplete quantised weights"] = quantisation.incomplete(weights.tensors)
    problems["stored in a type that is not supported"] = [
        f"{name} ({stored.dtype})" for name, stored in shared if stored.dtype not in FLOATS
    ]
    if any(problems.values()):
        raise _refusal(description, weights, problems)


def check_tied_head(description: Description, tensors: list[NativeTensor], weights: StoredWeights) -> None:
    """Reads a head that is stored although config.json ties it to the embedding; raises a CheckpointError if they differ."""
    tied_head = _tied_head(description)
    embedding = next(tensor.source.name for tensor in tensors if tensor.name == "model.embed_tokens.weight")
    if tied_head is None or not {tied_head.name, embedding} <= weights.tensors.keys():
        return
    if not _equal(weights.tensors, tied_head.name, embedding):
        problem = f"{tied_head.name} and {embedding}"
        raise _refusal(description, weights, {"tied by config.json, but not equal": [problem]})


def _refusal(description: Description, weights: StoredWeights, problems: dict[str, list[str]]) -> CheckpointError:
    return CheckpointError.listing(
        f"{weights.folder}: the weights cannot be loaded as {description.family.name}", problems
    )


def _tied_head(description: Description) -> Source | None:
    config = description.config
    if not config.tie_word_embeddings:
        return None
    return description.family.source("lm_head.weight", (config.vocab_size, config.hidden_size), config)


def _equal(tensors: dict[str, StoredTensor], one: str, other: str) -> bool:
    with safe_open(tensors[one].file, "pt") as first, safe_open(tensors[other].file, "pt") as second:
        return torch.equal(first.get_tensor(one), second.get_tensor(other))


def stream(
    model: Any, tensors: list[NativeTensor], weights: StoredWeights, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives a model on the meta device its weights, one file at a time: memory for the model and one mapped file."""
    wanted: dict[Path, list[NativeTensor]] = defaultdict(list)
    for tensor in tensors:
        wanted[weights.tensors[tensor.source.name].file].append(tensor)
    on_meta = model.state_dict()
    # The experts' selection bias, which the native class keeps exact in every model.
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    loaded: dict[str, torch.Tensor] = {}
    for file, parts in sorted(wanted.items()):
        with safe_open(file, framework="pt") as reader:  # closing it unmaps the file
            for part in parts:
                if part.parameter not in loaded:
                    shape, name = on_meta[part.parameter].shape, part.parameter
                    exact = bool(kept) and name.endswith(kept)
                    loaded[name] = torch.empty(shape, dtype=torch.float32 if exact else dtype, device=device)
                loaded[part.parameter][part.index].copy_(read(reader, part.source, part.part))
    model.load_state_dict(loaded, strict=False, assign=True)
    model.tie_weights()
    # What no file holds: the rotary frequencies, which follow from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"weights of {type(model).__name__} were left out of the plan: {', '.join(left)}")


def read(reader: Any, source: Source, part: tuple[slice, ...] = ()) -> torch.Tensor:
    """A source's rows, or a part of them, from an open file."""
    if source.rows is None:
        return reader.get_slice(source.name)[part] if part else reader.get_tensor(source.name)
    rows = reader.get_slice(source.name)[source.rows]
    return rows[part] if part else rows
