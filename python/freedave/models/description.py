"""What a checkpoint folder holds, as its JSON files say: the family, the native configuration, how it decodes."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from freedave.models.block_length import stated_block_length
from freedave.models.config_keys import check_keys
from freedave.models.config_reader import ConfigReader
from freedave.models.decoding_settings import LMArguments, Origins, declared_settings, published_settings
from freedave.models.diffusion_lm import DiffusionLM
from freedave.models.errors import WRAPPING, CheckpointError, first_line
from freedave.models.families import FAMILIES, REFUSED, Family
from freedave.models.location import names_of
from freedave.models.quantisation import Quantisation, declared_quantisation
from freedave.models.transformers_logging import only_errors

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Description:
    """A checkpoint that was recognised; `arguments` are those of the native configuration, from which nothing was made yet;
    `origins` says where each of `lm_arguments` was found, `remarks` are what whoever loads it should be warned of."""

    folder: Path
    family: Family
    arguments: dict[str, Any]
    lm_arguments: LMArguments
    origins: Origins
    unknown_keys: tuple[str, ...]
    remarks: tuple[str, ...]
    quantisation: Quantisation | None = None

    @property
    def layers(self) -> int:
        """How many layers config.json claims; 0 where the native configuration's own default is meant."""
        return self.arguments.get("num_hidden_layers") or 0

    @functools.cached_property
    def config(self) -> Any:
        """The configuration of the native class.

        Raises:
            CheckpointError: it is none, or no model can have it.
        """
        file, native = self.folder / "config.json", self.family.defaults is None
        config_class = getattr(transformers, self.family.native_class).config_class
        problems = _impossible(self.arguments, getattr(config_class, "head_dim", None))
        if problems:
            raise CheckpointError(f"{file}: {'; '.join(problems)}", problems)
        try:
            with only_errors():
                # config.json of a native layout is taken as it is, under the names that any transformers version wrote.
                config = config_class.from_dict(self.arguments) if native else config_class(**self.arguments)
        except Exception as error:  # wrong types raise what the configuration's own validation likes
            raise CheckpointError(
                f"{file} is not the configuration of a {self.family.native_class}: {first_line(error.__cause__ or error)}"
            ) from error
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
            if window is None or window < positions:
                raise CheckpointError(
                    f"{file}: use_sliding_window or layer_types asks for other layers than full attention (sliding_window "
                    f"{window} of {positions} positions), and only full attention is computed"
                )
            config.layer_types = ["full_attention"] * config.num_hidden_layers  # the window holds every position
        config.architectures = [self.family.native_class]
        return config

    def on_meta(self) -> transformers.PreTrainedModel:
        """The native model without memory for its weights."""
        model_class = getattr(transformers, self.family.native_class)
        try:
            with torch.device("meta"), only_errors():
                return model_class(self.config)
        except Exception as error:  # impossible sizes fail in many ways
            raise CheckpointError(
                f"{self.folder / 'config.json'} does not describe a {self.family.native_class}: {first_line(error)}"
            ) from error

    def diffusion_lm(self, model: Any, tokenizer: Any = None, name: str | None = None) -> DiffusionLM:
        """The model, with or without its weights, as a `DiffusionLM`; a CheckpointError if it cannot decode like that."""
        try:
            return DiffusionLM(model, **asdict(self.lm_arguments), tokenizer=tokenizer, name=name)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from error


def describe(folder: Path, name: str | None = None) -> Description:
    """Recognises a checkpoint.

    Args:
        folder: with config.json.
        name: what it was asked for as, which may say how long its blocks are ("JetLM/SDAR-8B-Chat-b16").

    Raises:
        CheckpointError: no or broken config.json, unknown family, and all that is missing, wrong or unsupported in it. What
            only the native configuration can tell is said when `config` is asked for.
    """
    for file in ADAPTER:
        if os.path.lexists(folder / file):
            raise CheckpointError(
                f"{folder} has {file}, of an adapter, which would not be applied; merge it into the weights (peft's "
                "merge_and_unload does), or move it away and put it on the loaded model: "
                "peft.PeftModel.from_pretrained(lm.model, path)"
            )
    reader = ConfigReader(folder)
    family = _recognise(reader)
    arguments = family.native_config(reader)
    quantisation = declared_quantisation(reader, family)
    block_length = stated_block_length(reader)
    remarks = []
    if family.defaults is None:
        lm_arguments, origins = declared_settings(reader, block_length)
    else:
        kinds = reader.get("layer_types")
        if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
            reader.refuse("layer_types", "only full attention is computed")
        lm_arguments, origins, remark = published_settings(reader, family.defaults, block_length, name or folder.name)
        remarks.append(remark)
    names = (*names_of(folder, name or ""), Path(str(reader.get("_name_or_path") or "")).name)
    remarks += [f"{folder}: {text}" for part, text in family.warnings if any(part in each for each in names)]
    unknown = check_keys(reader, family.harmless)
    if unknown:
        remarks.append(f"{reader.file} has keys that are not known here, and were ignored: {', '.join(unknown)}")
    reader.raise_problems()
    said = tuple(remark for remark in (*remarks, *reader.remarks) if remark)
    return Description(folder, family, arguments, lm_arguments, origins, unknown, said, quantisation)


def _impossible(arguments: dict[str, Any], default_head_dim: int | None) -> list[str]:
    """Sizes that fit no attention, which some versions of transformers notice only when they compute."""
    problems: list[str] = []
    width, heads = arguments.get("hidden_size"), arguments.get("num_attention_heads")
    if width is None or heads is None:  # a native layout that leaves them to the native configuration
        return problems
    groups = arguments.get("num_key_value_heads") or heads
    head_dim = arguments.get("head_dim") or default_head_dim or width // heads
    rotated = int(head_dim * (arguments.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
    if rotated % 2:
        problems.append(
            f"heads of {head_dim} features (head_dim, or width {width} / {heads} heads) cannot be rotated: rotary embeddings "
            f"turn pairs of features, and {rotated} is odd"
        )
    if heads % groups:
        problems.append(f"{heads} attention heads cannot share {groups} key-value heads evenly")
    return problems


def _recognise(reader: ConfigReader) -> Family:
    model_type, architectures = reader.values.get("model_type"), reader.values.get("architectures")
    architectures = architectures if isinstance(architectures, list) else [architectures] if architectures else []
    for refused in REFUSED:
        if model_type in refused.model_types or any(name in refused.architectures for name in architectures):
            raise CheckpointError(f"{reader.file}: {refused.name} is not supported: {refused.reason}")
    candidates = [family for family in FAMILIES if family.model_type == model_type]
    if not candidates:
        known = ", ".join(f"{family.model_type} ({family.name})" for family in FAMILIES)
        raise CheckpointError(f"{reader.file}: unknown model family {model_type!r}; known are {known}. {WRAPPING}")
    if not architectures:
        return candidates[-1]
    for family in candidates:
        if any(name in family.architectures for name in architectures):
            return family
    supported = " or ".join(name for family in candidates for name in family.architectures)
    raise CheckpointError(
        f"{reader.file}: the model_type {model_type!r} of {' or '.join(family.name for family in candidates)}, but the "
        f"architecture {', '.join(map(str, architectures))} is not {supported}; it is not supported. {WRAPPING}"
    )
