"""load_model: a published or native checkpoint as a `DiffusionLM`, by transformers' own classes; its code is never run."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Literal

import torch

from freedave.models import weights
from freedave.models.config_reader import read_json
from freedave.models.description import describe
from freedave.models.diffusion_lm import DiffusionLM
from freedave.models.errors import CheckpointError, first_line
from freedave.models.location import locate
from freedave.models.quantisation import check_library, load_quantised
from freedave.models.sizes import check_sizes
from freedave.models.stored_weights import StoredWeights
from freedave.models.tensor_parallel import join, own_device, shard
from freedave.models.tokenizer import load_tokenizer

__all__ = ["CheckpointError", "load_model"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what `predict_tokens` takes


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    tensor_parallel: bool = False,
) -> DiffusionLM:
    """Loads a diffusion language model.

    Published checkpoints of LLaDA (8B, 1.5, MoE), Dream, SDAR, SDAR-MoE, TraDo, Stable-DiffCoder, Fast-dLLM v2 and LLaDA2
    are recognised by config.json and renamed while their safetensors files are streamed: peak memory is the model and one
    file. Mask token, end of sequence and block length come from config.json, generation_config.json or the tokenizer, else
    from the family. Native transformers layouts (qwen2, qwen3, qwen3_moe, llama, glm4_moe) must say in config.json
    `mask_token_id` and `attention` ("block_causal" or "full"), for block-causal models `block_length`; `logits_shift` and
    `eos_token_id` are optional. Weights that torchao or compressed-tensors quantised are loaded by transformers, in layouts
    with native names. Nothing is downloaded, and no code of a checkpoint is run.

    Args:
        path: a checkpoint folder, the name of a model in the Hugging Face cache ("GSAI-ML/LLaDA-8B-Instruct"), or "demo"
            for the model that ships with this package.
        dtype: of the weights; "auto" is the one that config.json names (float32 where it names none). Losslessness is exact
            in float32; see `generate(check_lossless=True)` for others.
        device: where the weights go.
        revision: branch, tag or commit of a model in the Hugging Face cache; None is "main".
        tensor_parallel: this is one of several processes that were started together (torchrun), and loads its share of the
            weights: heads, MLP and vocabulary. `generate` then returns the same in all of them, and has to be called in all
            of them, with the same arguments. "cuda" is each process's own GPU.

    Warns of a block length, mask or end token that no file names, so that the checkpoint's name ("-b16") or what is usual in
    the family decides, and of keys in config.json that are not known.

    Returns the model with its tokenizer; the tokenizer is None where the folder has none (for one that exists as code only,
    with a warning).

    Raises:
        CheckpointError (a ValueError): missing folder or file, unknown family, missing, unexpected, misshapen or damaged
            weights; all that is wrong is listed, and nothing is loaded. A library that quantised them is not installed.
        TypeError, ValueError: a dtype or device that cannot be used, or tensor_parallel in a process that was started alone.
    """
    if tensor_parallel:
        device = own_device(device)
    where = _usable(torch.float32 if dtype == "auto" else dtype, device)
    folder = locate(path, revision)
    description = describe(folder, str(path))
    if dtype == "auto":
        dtype = _published_dtype(folder)
    if description.quantisation is not None:
        if tensor_parallel:
            raise CheckpointError(f"{folder}: tensor_parallel does not divide quantised weights; load them whole")
        check_library(description.quantisation, folder)
    stored = StoredWeights(folder)
    check_sizes(description, stored)
    tokenizer, why_none = load_tokenizer(folder, description.family.tokenizer_class)
    description.config.dtype = dtype
    model = description.on_meta()
    description.diffusion_lm(model)  # refuses before any weight is read
    tensors = weights.plan(description, model)
    weights.check(description, tensors, stored)
    weights.check_tied_head(description, tensors, stored)
    if tensor_parallel:
        parts = shard(model, join(where))
        tensors = [dataclasses.replace(tensor, part=parts.get(tensor.parameter, ())) for tensor in tensors]
    if description.quantisation is None:
        weights.stream(model, tensors, stored, dtype, where)
    else:
        model = load_quantised(description, dtype, where)
    lm = description.diffusion_lm(model, tokenizer, str(path))  # again: some choices follow from where the weights are
    for remark in description.remarks:
        warnings.warn(remark, stacklevel=2)
    if tokenizer is None and (folder / "tokenizer_config.json").is_file():
        warnings.warn(f"{folder} was loaded without a tokenizer: {why_none}", stacklevel=2)
    return lm


def _usable(dtype: torch.dtype, device: str | torch.device) -> torch.device:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be {', '.join(map(str, DTYPES))}, got {dtype!r}")
    try:
        torch.empty(0, dtype=dtype, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # an unknown device, or a build of torch without it
        raise ValueError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error


def _published_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json names, under the key of older or newer transformers."""
    values = read_json(folder / "config.json")
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise CheckpointError(
            f"{folder / 'config.json'} names the dtype {name!r}; load it as one of {known} instead of 'auto'"
        )
    return dtype
