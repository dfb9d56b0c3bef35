"""A model as people name it: dtype and device in words."""

from __future__ import annotations

from typing import Any

import torch

from freedave.models.checkpoint import load_model
from freedave.models.diffusion_lm import DiffusionLM

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_named(
    path: str, dtype: str, device: str, revision: str | None = None, *, tensor_parallel: bool = False
) -> DiffusionLM:
    """`freedave.load_model` with the dtype's name: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: an unknown name, or what `load_model` raises.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    named: Any = DTYPES[dtype]
    return load_model(path, dtype=named, device=device, revision=revision, tensor_parallel=tensor_parallel)


def default_device() -> str:
    """The first GPU that torch sees, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
