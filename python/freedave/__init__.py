"""Lossless parallel decoding of masked-diffusion language models.

    import freedave

    lm = freedave.load_model("demo")
    input_ids = lm.tokenizer("48392+7715=", return_tensors="pt").input_ids
    out = freedave.generate(lm, input_ids, max_new_tokens=96, draft_steps=8)

`generate` commits exactly what static decoding (`draft_steps=1`) commits, token for token and step for step, in fewer
forwards. The ops underneath are `freedave_kernels`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freedave.decoding import Commit as Commit
    from freedave.decoding import DecodeOutput as DecodeOutput
    from freedave.decoding import DecodeStats as DecodeStats
    from freedave.decoding import LosslessnessError as LosslessnessError
    from freedave.decoding import NonFiniteLogitsError as NonFiniteLogitsError
    from freedave.decoding import generate as generate
    from freedave.integrations.transformers import custom_generate as custom_generate
    from freedave.models.checkpoint import CheckpointError as CheckpointError
    from freedave.models.checkpoint import load_model as load_model
    from freedave.models.diffusion_lm import DiffusionLM as DiffusionLM

# In this mode the bits of a product's row do not depend on the number of rows, on which lossless decoding in float32 rests.
# MKL reads it with the first product of the process; where it has no such mode for a processor, it takes the nearest.
MKL_MODE = "AVX512,STRICT"
os.environ.setdefault("MKL_CBWR", MKL_MODE)

# Imported on first use: transformers takes seconds, and `freedave --help` needs none of it.
_HOMES = {
    "CheckpointError": "freedave.models.checkpoint",
    "Commit": "freedave.decoding",
    "DecodeOutput": "freedave.decoding",
    "DecodeStats": "freedave.decoding",
    "DiffusionLM": "freedave.models.diffusion_lm",
    "LosslessnessError": "freedave.decoding",
    "NonFiniteLogitsError": "freedave.decoding",
    "custom_generate": "freedave.integrations.transformers",
    "generate": "freedave.decoding",
    "load_model": "freedave.models.checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'freedave' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        message = f"{error}: `freedave.{name}` needs pip install 'freedave-kernels[decode]'"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
