"""Quantised weights: what config.json says of them, and the model as transformers' own loader makes it.

torchao's weights stay quantised in memory. Those of compressed-tensors are unpacked into dense ones while they are loaded, as
transformers does with them before they are used on a CPU and by default on a GPU.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.utils.import_utils import is_compressed_tensors_available, is_torchao_available

from freedave.models.config_reader import ConfigReader
from freedave.models.errors import WRAPPING, CheckpointError, first_line
from freedave.models.families.family import Family, same_name
from freedave.models.transformers_logging import only_errors

if TYPE_CHECKING:
    from freedave.models.description import Description
    from freedave.models.stored_weights import StoredWeights

KEY = "quantization_config"
INSTALL = {"torchao": "pip install torchao", "compressed-tensors": "pip install 'compressed-tensors>=0.15.0'"}
# The kinds of weights that were tried. Activations stay as they are in all of them: quantised by the largest of many rows,
# one draft would change what another one computes.
KINDS = {
    "torchao": ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"),
    "compressed-tensors": ("int-quantized", "float-quantized", "pack-quantized"),
}
# What a quantised tensor `*.weight` is stored as, and the name of the whole.
PARTS = {
    "torchao": re.compile(r"(?P<module>.+\.)_weight_(?:qdata|scale|zero_point)"),
    "compressed-tensors": re.compile(r"(?P<module>.+\.)weight_(?:packed|shape|scale|zero_point)"),
}
# Bytes of a number, of the types that only parts have.
WIDTHS = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Quantisation:
    """`method` (the library) and `kind` (the library's word for what it did) of a checkpoint's quantised weights; `declared`
    is what config.json says."""

    method: str
    kind: str
    declared: dict[str, Any]

    @property
    def unpacked(self) -> bool:
        """Whether the model in memory has dense weights."""
        return self.method == "compressed-tensors"

    def __str__(self) -> str:
        return f"{self.method}, {self.kind}" + (", unpacked while loading" if self.unpacked else "")

    def wholes(self, names: Iterable[str]) -> dict[str, str]:
        """Stored names that are parts of a quantised tensor -> the name of that tensor, which may be a stored one itself."""
        found = ((name, PARTS[self.method].fullmatch(name)) for name in names)
        return {name: f"{match['module']}weight" for name, match in found if match}

    def stored_bytes(self, stored: StoredWeights) -> dict[str, int]:
        """By the name of each quantised tensor, the bytes of its parts."""
        tensors = stored.tensors
        return {
            whole: sum(math.prod(tensors[part].shape) * WIDTHS.get(tensors[part].dtype, 8) for part in parts)
            for whole, parts in self._parts(tensors).items()
        }

    def incomplete(self, names: Iterable[str]) -> list[str]:
        """The quantised tensors that lack a part which others have."""
        parts = {
            whole: {name.removeprefix(whole.removesuffix("weight")) for name in those}
            for whole, those in self._parts(names).items()
        }
        every = set().union(*parts.values())
        return [f"{whole} lacks {', '.join(sorted(every - those))}" for whole, those in parts.items() if those != every]

    def _parts(self, names: Iterable[str]) -> dict[str, list[str]]:
        """By the name of each quantised tensor, the stored names of its parts."""
        parts: dict[str, list[str]] = defaultdict(list)
        for part, whole in self.wholes(names).items():
            parts[whole].append(part)
        for whole in parts.keys() & set(names):
            parts[whole].append(whole)
        return dict(sorted(parts.items()))


def declared_quantisation(reader: ConfigReader, family: Family) -> Quantisation | None:
    """How config.json says that the weights are quantised; None where they are not. What is not read is noted."""
    declared = reader.get(KEY)
    if declared in (None, False, {}):
        return None
    if family.source is not same_name:
        reader.unsupported(
            f"{KEY}: quantised weights are read in native layouts only, and {family.name} is published in another; convert "
            "the checkpoint that is not quantised (freedave convert), then quantise the converted folder with transformers",
            wrap=False,
        )
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if not isinstance(method, str) or method not in KINDS:
        reader.unsupported(f"{KEY}.quant_method is {method!r}, and only {' and '.join(KINDS)} are read")
        return None
    if method == "torchao":
        kind, problem = _of_torchao(declared)
    else:
        kind, problem = _of_compressed_tensors(declared, family)
    if problem is not None:
        reader.unsupported(f"{KEY} ({method}): {problem}")
    return Quantisation(method, kind, declared)


def _of_torchao(declared: dict[str, Any]) -> tuple[str, str | None]:
    """(the kind, what of it is not read)."""
    kinds = declared.get("quant_type")
    if isinstance(kinds, str):
        return (
            kinds,
            f"quant_type {kinds!r} is of an older torchao, which transformers does not load; quantise it again",
        )
    default = kinds.get("default") if isinstance(kinds, dict) and len(kinds) == 1 else None
    kind = default.get("_type") if isinstance(default, dict) else None
    if kind in KINDS["torchao"]:
        return kind, None
    return str(kind), f"quant_type is {kind}, and only {', '.join(KINDS['torchao'])} are read"


def _of_compressed_tensors(declared: dict[str, Any], family: Family) -> tuple[str, str | None]:
    """(the kind, what of it is not read)."""
    groups = declared.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        count = len(groups) if isinstance(groups, dict) else 0
        return "?", f"config_groups has {count} groups, and one that all quantised layers share is read"
    (group,) = groups.values()
    group = group if isinstance(group, dict) else {}
    kind = str(group.get("format") or declared.get("format"))
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return kind, "config_groups does not say how weights are quantised"
    if kind not in KINDS["compressed-tensors"]:
        return kind, f"the format is {kind}, and only {', '.join(KINDS['compressed-tensors'])} are read"
    if kind == "int-quantized" and "Moe" in family.native_class:
        return (
            kind,
            "int-quantized experts are not unpacked by transformers; pack-quantized and float-quantized ones are",
        )
    others = [key for key in ("input_activations", "output_activations") if group.get(key)]
    others += [key for key in ("kv_cache_scheme", "sparsity_config") if declared.get(key)]
    bits = weights.get("num_bits")
    kind = f"{kind} {weights.get('type')}{bits}"
    return kind, f"{' and '.join(others)}: only weights may be quantised, and not pruned" if others else None


def check_library(quantisation: Quantisation, folder: Any) -> None:
    """Raises a CheckpointError where the library that made the weights is not installed."""
    available = is_torchao_available() if quantisation.method == "torchao" else is_compressed_tensors_available()
    if not available:
        raise CheckpointError(
            f"{folder} has weights quantised by {quantisation.method}, which is not installed, or too old: "
            f"{INSTALL[quantisation.method]}"
        )


def load_quantised(description: Description, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    """The native model by transformers' own loader, on the CPU first: its files have been checked.

    Raises:
        CheckpointError: transformers cannot load it, or torchao's weights compute in another dtype than `dtype`.
    """
    quantisation, folder = description.quantisation, description.folder
    assert quantisation is not None
    config = description.config
    config.quantization_config = quantisation.declared | ({"dequantize": True} if quantisation.unpacked else {})
    model_class: Any = getattr(transformers, description.family.native_class)
    try:
        with only_errors():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library says of its own files
        raise CheckpointError(
            f"{folder}: transformers cannot load the weights ({quantisation}): {first_line(error)}. {WRAPPING}"
        ) from error
    if any(report.values()):
        raise CheckpointError.listing(
            f"{folder}: transformers cannot load the weights ({quantisation})",
            {kind: sorted(map(str, names)) for kind, names in report.items()},
        )
    _check_dtype(description, model, dtype)
    return model.to(device)


def _check_dtype(description: Description, model: nn.Module, dtype: torch.dtype) -> None:
    """torchao's weights were quantised in one type, which their products have, too, and are not converted."""
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter and parameter.dtype != dtype:
            raise CheckpointError(
                f"{description.folder}: the weights were quantised in {parameter.dtype} ({name} and others), and cannot be "
                f"used in {dtype}: load it with dtype={parameter.dtype}, or quantise a model in {dtype}"
            )
