"""What a family of checkpoints is: the transformers class of its architecture, and what the published files call things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from freedave.models.config_reader import ConfigReader


@dataclass(frozen=True)
class Source:
    """Where a tensor of the native layout comes from: `rows` (None: all) of the published tensor `name` of that `shape`."""

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None


@dataclass(frozen=True)
class Defaults:
    """How a published family decodes; its files override all but the attention and the shift, which are the architecture.

    `draft_steps` is how many drafts to start with; `freedave inspect` and the README say so.
    """

    attention: str
    mask_token_id: int
    eos_token_id: int
    block_length: int | None = None
    logits_shift: bool = False
    draft_steps: int = 4


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: shown to people.
        model_type, architectures: how its config.json is recognised.
        native_class: the transformers class that computes the same.
        native_config: the arguments of that class's configuration; problems are noted in the reader.
        source: (name and shape of a tensor in the native layout, native configuration) -> the published tensor.
        harmless: keys of its config.json, beside those that `native_config` reads, that do not change what is computed.
        defaults: None for native layouts, whose config.json must say it all.
        tokenizer_class: the transformers class that equals a tokenizer which is published as code.
        warnings: (a part of the names of some checkpoints, what to warn of where one is loaded).
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    native_class: str
    native_config: Callable[[ConfigReader], dict[str, Any]]
    source: Callable[[str, tuple[int, ...], Any], Source]
    harmless: frozenset[str] = frozenset()
    defaults: Defaults | None = None
    tokenizer_class: str | None = None
    warnings: tuple[tuple[str, str], ...] = ()


def same_name(name: str, shape: tuple[int, ...], config: Any) -> Source:
    """The published tensors have the native names and shapes."""
    return Source(name, shape)
