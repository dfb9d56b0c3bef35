"""The safetensors files of a checkpoint folder: which file holds which tensor, and what is wrong with them.

Only headers are read here, so that everything can be checked before any weight is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from freedave.models.config_reader import read_json
from freedave.models.errors import CheckpointError, first_line
from freedave.models.files import is_file, not_a_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `dtype` as safetensors spells it ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class StoredWeights:
    """Headers of all weights of a folder: `tensors` by name, `problems` by kind, and what is `lost` to the latter.

    `lost` holds the names that an index places in a file which cannot be read; `lost_all` says that an unreadable file may
    hold anything, because there is no index.

    Raises:
        CheckpointError: there are no safetensors weights at all, they or the index are no files, or the index is not one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.problems: dict[str, list[str]] = defaultdict(list)
        self.lost: set[str] = set()
        self.lost_all = False
        if is_file(folder / SINGLE):  # as transformers: the single file, then the index
            self.lost_all = not self._read(folder / SINGLE)
        elif is_file(folder / INDEX):
            self._read_shards(read_json(folder / INDEX).get("weight_map"))
        else:
            raise CheckpointError(why_no_weights(folder) or _no_index(folder))

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in the order of their names."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def _read_shards(self, weight_map: Any) -> None:
        names_of: dict[str, list[str]] = defaultdict(list)
        for name, shard in weight_map.items() if isinstance(weight_map, dict) else ():
            names_of[str(shard)].append(name)
        if not names_of:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map, so it does not say where the weights are")
        for shard, names in sorted(names_of.items()):
            file = self.folder / shard
            if Path(shard).name != shard:
                self.problems["shards outside the folder"].append(shard)
                self.lost.update(names)
            elif not file.exists():  # nor what a dangling link of the hub's cache leads to
                self.problems["missing shards"].append(shard)
                self.lost.update(names)
            elif what := not_a_file(file):
                self.problems["damaged files"].append(f"{shard} ({what})")
                self.lost.update(names)
            elif not self._read(file):
                self.lost.update(names)
            else:
                absent = [name for name in names if name not in self.tensors or self.tensors[name].file != file]
                self.problems["not in the shard that the index names"] += [f"{name} ({shard})" for name in absent]
                self.lost.update(absent)

    def _read(self, file: Path) -> bool:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (it is not a dictionary)
                    if name in self.tensors:
                        self.problems["in two files"].append(f"{name} ({self.tensors[name].file.name}, {file.name})")
                    view = reader.get_slice(name)
                    self.tensors[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            self.problems["damaged files"].append(f"{file.name} ({_diagnosis(file, error)})")
            return False
        return True


def why_no_weights(folder: Path) -> str | None:
    """Why a folder holds no weights that could be read; None where there are some, whole or not."""
    if (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        return None
    return (
        f"{folder} has no .safetensors weights; other formats are not read, since they can run code. Where the publisher has "
        "no safetensors, transformers' save_pretrained writes them"
    )


def _no_index(folder: Path) -> str:
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"{folder} has {', '.join(others[:3])}, but neither {SINGLE} nor {INDEX}, which says what they hold"


def _diagnosis(file: Path, error: Exception) -> str:
    """What a file is that is not whole safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        begin = stream.read(8)
        if begin.startswith(b"version "):
            return "a git-lfs pointer instead of the weights; `git lfs pull` fetches them"
        if begin.startswith((b"PK", b"\x80")):
            return "a pickle, not safetensors"
        length = int.from_bytes(begin, "little")
        if len(begin) == 8 and 0 < length <= size - 8:
            try:
                header = json.loads(stream.read(length))
                expected = (
                    8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__")
                )
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                return f"not safetensors: {first_line(error)}"
            if size < expected:
                return f"truncated: {size} of {expected} bytes"
    return f"not safetensors: {first_line(error)}"
