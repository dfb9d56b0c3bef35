"""How long a checkpoint's blocks are: what its files say under any name, else its name, else what is usual in the family.

Published configurations of SDAR name no block length, though its checkpoints differ in it (SDAR-8B-Chat-b16), and another
one than the model was trained with gives worse text without any error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from freedave.models.config_reader import ConfigReader
from freedave.models.location import names_of

KEYS = ("block_length", "block_size", "block_len", "bd_size", "diffusion_block_size")
NAMED = re.compile(r"-b(4|8|16|32|64|128)(?![a-zA-Z0-9])")


class Found(NamedTuple):
    """A block length, None where there is none, and where it was found."""

    length: int | None
    origin: str


def stated_block_length(reader: ConfigReader) -> Found:
    """What config.json and generation_config.json say; notes a problem where two places disagree, or say it in a way that is
    not known here."""
    found: dict[str, Any] = {}
    for file, values in (("config.json", reader.values), ("generation_config.json", reader.generation)):
        for key in KEYS:
            if values.get(key) is not None:
                found[f"{key} of {file}"] = reader.checked_integer(key, values[key])
        for key in values:
            if "block" in key and key not in {*KEYS, *reader.understood} and values[key] not in (None, False):
                reader.problems.append(f"{key} of {file} speaks of blocks, and is not understood; is it {KEYS[0]}?")
    reader.understood.update(KEYS)
    for place, length in found.items():
        first, other = next(iter(found.items()))
        if length != other:
            reader.problems.append(f"{first}, {other}, and {place}, {length}, disagree")
    place, stated = next(iter(found.items()), ("no file says one", None))
    return Found(stated, place)


def published_block_length(reader: ConfigReader, stated: Found, usual: int, name: str) -> tuple[Found, str | None]:
    """(the block length of a block-causal family, what to warn of).

    `stated` by the files, else said by the checkpoint's name, else `usual` in the family. `name`: of the folder or model.
    """
    named = _in_names(reader.folder, name)
    if stated.length is not None:
        if named is None or named[0] == stated.length:
            return stated, None
        return stated, (f"{KEYS[0]} {stated.length}, which is used, though the name {named[1]} says {named[0]}")
    origin = reader.get("_name_or_path")
    named = named or _in(Path(origin).name if isinstance(origin, str) else "")
    if named is not None:
        return Found(named[0], f"the name {named[1]}"), (
            f"no {KEYS[0]}: {named[0]} is used, since the name {named[1]} says so"
        )
    return Found(usual, "the usual one of the family"), (
        f"no {KEYS[0]}: {usual} is used, the usual one of the family; if this model was trained with another, write it into "
        f'config.json ("{KEYS[0]}") or give it to `generate`'
    )


def _in_names(folder: Path, name: str) -> tuple[int, str] | None:
    return next((found for each in names_of(folder, name) if (found := _in(each))), None)


def _in(name: str) -> tuple[int, str] | None:
    match = NAMED.search(name)
    return None if match is None else (int(match[1]), name)
