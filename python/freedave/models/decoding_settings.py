"""How a checkpoint decodes (mask, ends of sequence, attention, blocks), and which of its files says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from freedave.models.block_length import Found, published_block_length
from freedave.models.config_reader import ConfigReader
from freedave.models.diffusion_lm import ATTENTIONS
from freedave.models.errors import CheckpointError
from freedave.models.families.family import Defaults

USUAL = "the usual one of the family"


@dataclass(frozen=True)
class LMArguments:
    """The arguments of `DiffusionLM` beside the model; in a native layout, config.json holds them by these names."""

    mask_token_id: int
    attention: str
    block_length: int | None
    logits_shift: bool
    eos_token_id: int | list[int] | None


@dataclass(frozen=True)
class Origins:
    """Where each of them was found, in words; `eos_token_ids`: of each end of sequence, in their order."""

    mask_token_id: str
    attention: str
    block_length: str
    eos_token_ids: dict[int, str]


def declared_settings(reader: ConfigReader, block_length: Found) -> tuple[LMArguments, Origins]:
    """A native layout: config.json says how to decode, since the architecture does not.

    Raises:
        CheckpointError: it does not.
    """
    attention = reader.values.get("attention")
    if "mask_token_id" not in reader.values or attention is None:
        missing = [key for key in ("mask_token_id", "attention") if reader.values.get(key) is None]
        raise CheckpointError(
            f"{reader.file}: {' and '.join(missing)} missing; a diffusion language model needs them (attention is one of "
            f"{', '.join(ATTENTIONS)}). If this is one, add them to config.json"
        )
    if attention not in ATTENTIONS:
        reader.problems.append(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    ends = dict.fromkeys(_token_ids(reader.values.get("eos_token_id")), "config.json")
    lm_arguments = LMArguments(
        mask_token_id=reader.integer("mask_token_id", minimum=0),
        attention=attention,
        block_length=block_length.length,
        logits_shift=reader.boolean("logits_shift", False),
        eos_token_id=_one_or_several(ends),
    )
    return lm_arguments, Origins("config.json", "config.json", block_length.origin, ends)


def published_settings(
    reader: ConfigReader, defaults: Defaults, block_length: Found, name: str
) -> tuple[LMArguments, Origins, str | None]:
    """A published family: the first of config.json, generation_config.json, the tokenizer and the family that knows; ends of
    sequence are all that the files name. Also a remark on what the files do not say."""
    files = {"config.json": reader.values, "generation_config.json": reader.generation}
    vocabulary = reader.integer("vocab_size")
    said: list[str | None] = []
    mask, mask_origin = _mask_token(reader, files)
    if mask is None and defaults.mask_token_id >= vocabulary:
        reader.problems.append(
            f"mask_token_id missing here, in generation_config.json and in the tokenizer, and the family's, "
            f"{defaults.mask_token_id}, is outside the vocabulary of {vocabulary} tokens"
        )
    elif mask is None:
        said.append(f"no mask_token_id: {defaults.mask_token_id} is used, the usual one of the family")
    # Each may name another one: SDAR's chat models end a turn with what only their tokenizer says.
    ends: dict[int, str] = {}
    places = {place: values.get("eos_token_id") for place, values in files.items()}
    for place, value in (places | {"the tokenizer": reader.special_token("eos_token")}).items():
        for token_id in _token_ids(value):
            ends.setdefault(token_id, place)
    if not ends and defaults.eos_token_id < vocabulary:
        ends = {defaults.eos_token_id: USUAL}
        said.append(f"no eos_token_id: {defaults.eos_token_id} is used, the usual one of the family")
    if isinstance(mask, int) and mask in ends:
        said.append(f"{mask} as the mask token and as an end of sequence, so that it can never be predicted")
    if defaults.block_length is not None:
        block_length, of_blocks = published_block_length(reader, block_length, defaults.block_length, name)
        said.append(of_blocks)
    lm_arguments = LMArguments(
        mask_token_id=defaults.mask_token_id
        if mask is None
        else reader.checked_integer("mask_token_id", mask, minimum=0),
        attention=defaults.attention,
        block_length=block_length.length,
        logits_shift=defaults.logits_shift,
        eos_token_id=_one_or_several(ends),
    )
    remark = "; ".join(part for part in said if part)
    origins = Origins(mask_origin, "the family's architecture", block_length.origin, ends)
    return lm_arguments, origins, f"{reader.folder}: its files name {remark}" if remark else None


def _mask_token(reader: ConfigReader, files: dict[str, dict[str, Any]]) -> tuple[Any, str]:
    """(what the first file that names a mask token says, which one that is); (None, `USUAL`) where none does."""
    reader.get("mask_token_id")
    for place, values in files.items():
        if values.get("mask_token_id") is not None:
            return values["mask_token_id"], place
    mask = reader.special_token("mask_token")
    return mask, USUAL if mask is None else "the tokenizer"


def _token_ids(value: Any) -> list[int]:
    """An id, or several, as published."""
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if isinstance(token_id, int) and not isinstance(token_id, bool)]


def _one_or_several(token_ids: dict[int, str]) -> int | list[int] | None:
    """As config.json holds them."""
    once = list(token_ids)
    return once[0] if len(once) == 1 else once or None
