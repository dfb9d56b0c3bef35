"""convert_checkpoint: a published checkpoint rewritten in the layout of its native transformers class."""

from __future__ import annotations

import json
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from freedave.models import weights
from freedave.models.config_reader import read_json
from freedave.models.description import Description, describe
from freedave.models.errors import CheckpointError
from freedave.models.location import locate
from freedave.models.sizes import check_sizes
from freedave.models.stored_weights import INDEX, SINGLE, StoredWeights
from freedave.models.tokenizer import load_tokenizer
from freedave.models.transformers_logging import only_errors

MAX_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Converted:
    """What was written: `no_tokenizer` says why there is no tokenizer, None if there is one."""

    folder: Path
    family: str
    native_class: str
    tensors: int
    bytes: int
    files: tuple[str, ...]
    no_tokenizer: str | None


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Converted:
    """Writes a checkpoint in its native layout, which transformers loads without remote code and `load_model` as it is.

    config.json is that of the native class, with `mask_token_id`, `attention`, `block_length`, `logits_shift` and
    `eos_token_id` beside it; full attention is also written as `is_causal: false`, which transformers obeys. Weights keep
    their type. Peak memory is one file of the destination and one, mapped, of the source.

    Args:
        source: as `load_model` takes it.
        destination: a folder that does not exist, or an empty one; it appears when all is written, or not at all.
        revision: of a model in the Hugging Face cache.
        max_file_bytes: weights are spread over files of at most this size (a larger tensor gets a file of its own).

    Warns as `load_model` does: the block length that is written may be a guess.

    Raises:
        CheckpointError: the source cannot be loaded, or the destination is in use.
    """
    target = Path(destination)
    _check_free(target)
    description = describe(locate(source, revision), str(source))
    if description.quantisation is not None:
        raise CheckpointError(
            f"{description.folder} has quantised weights ({description.quantisation}), which are not rewritten: convert the "
            "checkpoint that is not quantised, then quantise the converted folder with transformers"
        )
    stored = StoredWeights(description.folder)
    check_sizes(description, stored)
    tokenizer, why_none = load_tokenizer(description.folder, description.family.tokenizer_class)
    model = description.on_meta()
    description.diffusion_lm(model)
    tensors = weights.plan(description, model)
    weights.check(description, tensors, stored)
    weights.check_tied_head(description, tensors, stored)
    with _appearing(target) as folder:
        _write_config(folder, description, stored)
        files = _write_weights(folder, tensors, stored, max_file_bytes)
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)
    for remark in description.remarks:
        warnings.warn(remark, stacklevel=2)
    return Converted(
        folder=target,
        family=description.family.name,
        native_class=description.family.native_class,
        tensors=len(tensors),
        bytes=sum((target / file).stat().st_size for file in files),
        files=tuple(files),
        no_tokenizer=why_none,
    )


def _check_free(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty, and nothing is overwritten; give a new folder")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a new folder")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block is left, and vanishes on an error."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        folder.replace(target)  # over an empty folder, too, and over nothing else
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_config(folder: Path, description: Description, stored: StoredWeights) -> None:
    config = description.config
    for key, value in asdict(description.lm_arguments).items():
        setattr(config, key, value)
    if description.lm_arguments.attention == "full":
        config.is_causal = False
    config.dtype = weights.FLOATS[_usual_type(stored)]
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("auto_map", None)  # it would name code that is not there
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _usual_type(stored: StoredWeights) -> str:
    """The type of most weights; a few, such as the experts' selection bias, may have another."""
    types = [tensor.dtype for tensor in stored.tensors.values()]
    return max(sorted(set(types)), key=types.count)


def _write_weights(
    folder: Path, tensors: list[weights.NativeTensor], stored: StoredWeights, max_file_bytes: int
) -> list[str]:
    """Files in the order of the source's, so that one of them is mapped at a time."""
    tensors = sorted(tensors, key=lambda tensor: (stored.tensors[tensor.source.name].file, tensor.source.name))
    groups: list[list[weights.NativeTensor]] = []
    room, total = 0, 0
    for tensor in tensors:
        size = _bytes(tensor, stored)
        if size > room or not groups:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(tensor)
        room -= size
        total += size
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [SINGLE]
    for file, group in zip(files, groups, strict=True):
        save_file(_collect(group, stored), folder / file, {"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read it
    if len(groups) > 1:
        weight_map = {tensor.name: file for file, group in zip(files, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _bytes(tensor: weights.NativeTensor, stored: StoredWeights) -> int:
    source = stored.tensors[tensor.source.name]
    rows = tensor.source.rows
    shape = source.shape if rows is None else (rows.stop - rows.start, *source.shape[1:])
    return torch.Size(shape).numel() * weights.FLOATS[source.dtype].itemsize


def _collect(group: list[weights.NativeTensor], stored: StoredWeights) -> dict[str, torch.Tensor]:
    collected = {}
    for file in sorted({stored.tensors[tensor.source.name].file for tensor in group}):
        with safe_open(file, framework="pt") as reader:
            for tensor in group:
                if stored.tensors[tensor.source.name].file == file:
                    # A copy, so that the source is unmapped when it is closed.
                    collected[tensor.name] = weights.read(reader, tensor.source).clone()
    return collected


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    with only_errors():
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    # Code that is not there, nor needed; and how this tokenizer was loaded, which transformers writes down as well.
    for key in ("auto_map", "is_local", "local_files_only"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
