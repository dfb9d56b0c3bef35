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

from freedave.mkl_mode import MKL_MODE

if TYPE_CHECKING:
    from freedave.decode.decoder import Decoder as Decoder
    from freedave.decode.generate import generate as generate
    from freedave.decode.output import Commit as Commit
    from freedave.decode.output import DecodeOutput as DecodeOutput
    from freedave.decode.output import DecodeStats as DecodeStats
    from freedave.decode.output import LosslessnessError as LosslessnessError
    from freedave.decode.output import NonFiniteLogitsError as NonFiniteLogitsError
    from freedave.integrations.transformers import custom_generate as custom_generate
    from freedave.models.checkpoint import load_model as load_model
    from freedave.models.diffusion_lm import DiffusionLM as DiffusionLM
    from freedave.models.errors import CheckpointError as CheckpointError

# MKL reads it once, with the first product of the process.
os.environ.setdefault("MKL_CBWR", MKL_MODE)

# Imported on first use: transformers takes seconds, and `freedave --help` needs none of it.
_HOMES = {
    "CheckpointError": "freedave.models.errors",
    "Commit": "freedave.decode.output",
    "DecodeOutput": "freedave.decode.output",
    "DecodeStats": "freedave.decode.output",
    "Decoder": "freedave.decode.decoder",
    "DiffusionLM": "freedave.models.diffusion_lm",
    "LosslessnessError": "freedave.decode.output",
    "NonFiniteLogitsError": "freedave.decode.output",
    "custom_generate": "freedave.integrations.transformers",
    "generate": "freedave.decode.generate",
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
