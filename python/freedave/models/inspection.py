"""inspect_checkpoint: what loading a checkpoint would make of it, and why, without reading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freedave.models import weights
from freedave.models.description import Description, describe
from freedave.models.errors import CheckpointError
from freedave.models.location import locate
from freedave.models.sizes import check_sizes
from freedave.models.stored_weights import StoredWeights, why_no_weights
from freedave.models.tokenizer import load_tokenizer

# More than any model has: without weights, nothing else says how many there are, and each is built.
MOST_LAYERS = 1000
FEATURE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Setting:
    """A value, where it was found, and, of a token id, how the tokenizer writes it (None: there is no tokenizer)."""

    value: Any
    origin: str
    token: str | None = None


@dataclass(frozen=True)
class Stored:
    """The weights in the folder: how many tensors and files, of how many bytes."""

    tensors: int
    files: int
    bytes: int
    largest_file: int


@dataclass(frozen=True)
class Inspection:
    """What `load_model` would use.

    `no_tokenizer` and `no_weights` say why there are none (None: there are). `memory` is bytes by dtype: of the weights, and
    of the keys and values of a thousand positions. `suggested` are options of `generate` to start with, which nobody has
    tuned on published weights. `remarks` are what `load_model` would warn of. `quantisation` says which library quantised
    the weights, and how.
    """

    folder: Path
    family: str
    native_class: str
    attention: Setting
    logits_shift: bool
    mask: Setting
    ends: tuple[Setting, ...]
    block_length: Setting
    unknown_keys: tuple[str, ...]
    max_positions: int
    tokenizer: str | None
    no_tokenizer: str | None
    stored: Stored | None
    no_weights: str | None
    parameters: int
    memory: dict[str, dict[str, int]]
    suggested: dict[str, Any]
    remarks: tuple[str, ...]
    quantisation: str | None = None


def inspect_checkpoint(path: str | Path, *, revision: str | None = None) -> Inspection:
    """Reads the JSON files, the tokenizer and the headers of the weights of a checkpoint, which may have no weights yet.

    Args:
        path, revision: as `load_model` takes them.

    Raises:
        CheckpointError: what `load_model` would raise, but for missing weights, and for a stored head that differs from the
            embedding to which config.json ties it.
    """
    folder = locate(path, revision)
    description = describe(folder, str(path))
    no_weights = why_no_weights(folder)
    stored = None if no_weights else StoredWeights(folder)
    if stored is not None:
        check_sizes(description, stored)
    elif description.layers > MOST_LAYERS:
        raise CheckpointError(f"{folder / 'config.json'} claims {description.layers} layers")
    tokenizer, no_tokenizer = load_tokenizer(folder, description.family.tokenizer_class)
    model = description.on_meta()
    lm = description.diffusion_lm(model)
    if stored is not None:
        weights.check(description, weights.plan(description, model), stored)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said, origins = description.lm_arguments, description.origins
    return Inspection(
        folder=folder,
        family=description.family.name,
        native_class=description.family.native_class,
        attention=Setting(said.attention, origins.attention),
        logits_shift=said.logits_shift,
        mask=Setting(said.mask_token_id, origins.mask_token_id, _token(tokenizer, said.mask_token_id)),
        ends=tuple(Setting(end, origins.eos_token_ids[end], _token(tokenizer, end)) for end in lm.eos_token_ids),
        block_length=Setting(said.block_length, origins.block_length),
        unknown_keys=description.unknown_keys,
        max_positions=description.config.max_position_embeddings,
        tokenizer=None if tokenizer is None else type(tokenizer).__name__,
        no_tokenizer=no_tokenizer,
        stored=None if stored is None else _stored(stored),
        no_weights=no_weights,
        parameters=parameters,
        memory=_memory(description, model, stored),
        suggested=_suggested(description),
        remarks=description.remarks,
        quantisation=None if description.quantisation is None else str(description.quantisation),
    )


def _token(tokenizer: Any, token_id: int) -> str | None:
    return None if tokenizer is None else tokenizer.convert_ids_to_tokens(token_id)


def _stored(stored: StoredWeights) -> Stored:
    sizes = [file.stat().st_size for file in stored.files]
    return Stored(len(stored.tensors), len(sizes), sum(sizes), max(sizes))


def _memory(description: Description, model: Any, stored: StoredWeights | None) -> dict[str, dict[str, int]]:
    config, quantisation = description.config, description.quantisation
    kept: dict[str, int] = {}  # in any dtype, bytes of what stays quantised
    if stored is not None and quantisation is not None and not quantisation.unpacked:
        kept = quantisation.stored_bytes(stored)
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in kept)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    features = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return {
        dtype: {"weights": sum(kept.values()) + dense * size, "keys_and_values": 1000 * features * size}
        for dtype, size in FEATURE_BYTES.items()
    }


def _suggested(description: Description) -> dict[str, Any]:
    """With full attention a cache is an approximation, and blocks are a matter of choice."""
    defaults, said = description.family.defaults, description.lm_arguments
    options: dict[str, Any] = {"draft_steps": "auto" if defaults is None else defaults.draft_steps}
    if said.attention == "full":
        options |= {"cache": "dual", "block_length": said.block_length or 32}
    return options
