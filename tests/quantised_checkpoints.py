"""Checkpoints with quantised weights: by torchao, as transformers writes them, and in the files of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from published_layouts import write_published
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import freedave
from freedave.models.conversion import convert_checkpoint
from freedave.models.transformers_logging import only_errors

SINGLE = "model.safetensors"


def write_native(tmp_path: Path, family: str) -> Path:
    """A published checkpoint, converted."""
    return convert_checkpoint(write_published(tmp_path / "published", family)[0], tmp_path / "native").folder


def by_torchao(native: Path, target: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A converted folder, quantised as its user would do it."""
    import torchao.quantization

    arguments = {"Int8WeightOnlyConfig": {"version": 2}, "IntxWeightOnlyConfig": {"weight_dtype": torch.int4}}
    how = getattr(torchao.quantization, kind)(**arguments.get(kind, {}))
    with only_errors():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            native, dtype=dtype, quantization_config=transformers.TorchAoConfig(how, **options)
        )
        model.save_pretrained(target)
    return target


def scheme(kind: str, bits: int, **group: Any) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it."""
    weights = {"num_bits": bits, "type": "float" if kind == "float-quantized" else "int", "strategy": "channel"}
    weights |= {"symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None} | group},
    }


def by_compressed_tensors(source: Path, target: Path, kind: str, bits: int = 8) -> tuple[Path, dict[str, Tensor]]:
    """(a folder with the layers' linear weights quantised, a scale a row; all tensors as they are when unpacked)."""
    shutil.copytree(source, target)
    stored, dense = {}, {}
    for name, tensor in load_file(source / SINGLE).items():
        dense[name] = tensor
        if tensor.dim() != 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            stored[name] = tensor
            continue
        largest = 448.0 if kind == "float-quantized" else 2.0 ** (bits - 1) - 1
        scale = tensor.abs().amax(1, keepdim=True) / largest
        numbers = (tensor / scale).to(torch.float8_e4m3fn) if kind == "float-quantized" else (tensor / scale).round()
        dense[name], stored[f"{name}_scale"] = numbers.float() * scale, scale
        if kind == "pack-quantized":
            stored[f"{name}_packed"], stored[f"{name}_shape"] = packed(numbers, bits), torch.tensor(tensor.shape)
        else:
            stored[name] = numbers if kind == "float-quantized" else numbers.to(torch.int8)
    save_file(stored, target / SINGLE, {"format": "pt"})
    change_config(target, quantization_config=scheme(kind, bits))
    return target, dense


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers side by side in 32 bits each, the first ones lowest, from zero on."""
    unsigned = (numbers + 2 ** (bits - 1)).to(torch.int64).unflatten(1, (-1, 32 // bits))
    return (unsigned << torch.arange(0, 32, bits)).sum(2).to(torch.uint32).view(torch.int32)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The folder's tensors, changed; the header keeps what the library wrote there."""
    with safe_open(folder / SINGLE, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata)


def load(folder: Path, **options: Any) -> freedave.DiffusionLM:
    lm = freedave.load_model(folder, **options)
    lm.eos_token_id = None
    return lm


def decode(lm: freedave.DiffusionLM, executor: str, **options: Any) -> Tensor:
    """With drafts, compared with static decoding, which takes more forwards."""
    blocks = lm.block_length or 8
    options = {"max_new_tokens": 16, "draft_steps": 4, "check_lossless": True, "block_length": blocks} | options
    out = freedave.generate(lm, torch.arange(5)[None], executor=executor, **options)
    assert out.num_forwards < out.static.num_forwards
    return out.sequences
