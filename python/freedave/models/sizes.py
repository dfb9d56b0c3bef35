"""What config.json claims against what the weights' headers hold, before anything is built of that size."""

from __future__ import annotations

import math
import re
from typing import Any

from freedave.models.description import Description
from freedave.models.errors import CheckpointError
from freedave.models.families import Family
from freedave.models.stored_weights import StoredWeights

LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def check_sizes(description: Description, stored: StoredWeights) -> None:
    """Compares the numbers of layers and experts with the stored names, and the other sizes with the headers.

    Raises:
        CheckpointError: config.json claims more layers or experts than the names have, or a tensor that is larger than all
            stored ones together; or no name can be read, so that nothing can be compared.
    """
    family = description.family
    if stored.lost_all:
        raise _refusal(family, stored, {})
    _check_count(family, "layers", description.layers, LAYER, stored)  # before a configuration lists them, too
    config = description.config
    if _first(config, sparse=True) is not None:
        _check_count(family, "experts", _experts(config), EXPERT, stored)
    if stored.lost:
        return
    everything = sum(math.prod(tensor.shape) for tensor in stored.tensors.values())
    wrong = []
    for name, shape in _largest(config).items():
        source = family.source(name, shape, config)
        found = stored.tensors.get(source.name)
        if math.prod(source.shape) > everything and found is not None:
            wrong.append(f"{source.name} is {list(found.shape)}, by config.json {list(source.shape)}")
    if wrong:
        raise _refusal(family, stored, {"wrong shapes": wrong})


def _check_count(family: Family, what: str, count: int, pattern: re.Pattern[str], stored: StoredWeights) -> None:
    found = {match[1] for name in stored.tensors.keys() | stored.lost if (match := pattern.search(name))}
    if count > len(found):
        raise _refusal(
            family, stored, {"missing keys": [f"{count} {what} by config.json, {len(found)} in the weights"]}
        )


def _refusal(family: Family, stored: StoredWeights, problems: dict[str, list[str]]) -> CheckpointError:
    what = f"{stored.folder}: the weights cannot be loaded as {family.name}"
    return CheckpointError.listing(what, {**stored.problems, **problems})


def _experts(config: Any) -> int:
    """How many experts a layer has that has any; the native configurations have two names for it."""
    return getattr(config, "n_routed_experts", 0) or getattr(config, "num_experts", 0)


def _first(config: Any, *, sparse: bool) -> int | None:
    """The first layer with experts, or the first without; None where there is none."""
    for layer in range(config.num_hidden_layers):
        if hasattr(config, "first_k_dense_replace"):
            has_experts = layer >= config.first_k_dense_replace
        elif _experts(config):
            has_experts = (layer + 1) % config.decoder_sparse_step == 0 and layer not in config.mlp_only_layers
        else:
            has_experts = False
        if has_experts == sparse:
            return layer
    return None


def _largest(config: Any) -> dict[str, tuple[int, ...]]:
    """Tensors in which every size of a native configuration shows."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.layers.0.self_attn.q_proj.weight": (heads * head_dim, width),
        "model.layers.0.self_attn.k_proj.weight": (config.num_key_value_heads * head_dim, width),
    }
    dense, sparse = _first(config, sparse=False), _first(config, sparse=True)
    if dense is not None:
        shapes[f"model.layers.{dense}.mlp.gate_proj.weight"] = (config.intermediate_size, width)
    if sparse is not None:
        prefix, inner = f"model.layers.{sparse}.mlp", config.moe_intermediate_size
        shapes[f"{prefix}.experts.0.gate_proj.weight"] = (inner, width)
        if getattr(config, "n_shared_experts", 0):
            shapes[f"{prefix}.shared_experts.gate_proj.weight"] = (inner * config.n_shared_experts, width)
    return shapes
