"""load_model: a checkpoint folder as a `DiffusionLM`, by native classes and safetensors; its code is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from freedave.models.diffusion_lm import ATTENTIONS, DiffusionLM

DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"

# Families whose published or converted weights are exactly one of transformers' own classes.
NATIVE_CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what is wrong with which file."""


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiffusionLM:
    """Loads a diffusion language model.

    Args:
        path: a checkpoint folder in native transformers layout, or "demo" for the model that ships with this package.
            Its config.json must hold `model_type` ("qwen2", "qwen3" or "llama"), `mask_token_id` and `attention`
            ("block_causal" or "full"), and for block-causal models `block_length`; `logits_shift` and `eos_token_id` are
            optional. Weights are safetensors. A tokenizer is loaded where there is one.
        dtype: of the weights. Losslessness is exact in float32; see `generate(check_lossless=True)` for others.
        device: where the weights go.

    Raises:
        CheckpointError (a ValueError): missing folder or file, unknown family, missing or unexpected weights.
    """
    folder = DEMO_CHECKPOINT if str(path) == "demo" else Path(path)
    config = _read_config(folder)
    model = _load_weights(folder, config, dtype).to(device)
    try:
        return DiffusionLM(
            model,
            config["mask_token_id"],
            attention=config["attention"],
            block_length=config.get("block_length"),
            logits_shift=config.get("logits_shift", False),
            eos_token_id=config.get("eos_token_id"),
            tokenizer=_load_tokenizer(folder),
            name=str(path),
        )
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder at {folder}; give a local folder, or 'demo' for the embedded model"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    family = config.get("model_type")
    if family not in NATIVE_CLASSES:
        raise CheckpointError(
            f"{file}: unknown model family {family!r}; this version loads native checkpoints of {', '.join(NATIVE_CLASSES)}"
        )
    missing = [key for key in ("mask_token_id", "attention") if key not in config]
    if missing:
        raise CheckpointError(
            f"{file}: {' and '.join(missing)} missing; a diffusion language model needs them (attention is one of "
            f"{', '.join(ATTENTIONS)}). If this is one, add them to config.json"
        )
    if not isinstance(config["mask_token_id"], int):
        raise CheckpointError(f"{file}: mask_token_id must be an integer, got {config['mask_token_id']!r}")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no .safetensors weights; other formats are not read, since they can run code"
        )
    return config


def _load_weights(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    model_class = getattr(transformers, NATIVE_CLASSES[config["model_type"]])
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what transformers would warn about, the report below turns into errors
    logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only so that the report names them
        )
    except Exception as error:  # safetensors, JSON and shape errors come in many types
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {first_line}") from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    problems = [f"{kind.replace('_', ' ')}: {_some(report[kind])}" for kind in REPORTED if report.get(kind)]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json ({'; '.join(problems)})")
    return model


REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _some(entries: Any) -> str:
    """The first few names; a wrong shape comes as (name, shape in the file, shape by config.json)."""
    names = sorted(
        f"{entry[0]} is {list(entry[1])}, by config.json {list(entry[2])}" if isinstance(entry, tuple) else str(entry)
        for entry in entries
    )
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def _load_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
