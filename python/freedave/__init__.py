"""Lossless parallel decoding of masked-diffusion language models.

    import freedave

    lm = freedave.load_model("demo")
    input_ids = lm.tokenizer("48392+7715=", return_tensors="pt").input_ids
    out = freedave.generate(lm, input_ids, max_new_tokens=96, draft_steps=8)

`generate` commits exactly what static decoding (`draft_steps=1`) commits, token for token and step for step, in fewer
forwards. The ops underneath are `freedave_kernels`.
"""

from freedave.decoding import Commit, DecodeOutput, DecodeStats, LosslessnessError, NonFiniteLogitsError, generate
from freedave.models.checkpoint import CheckpointError, load_model
from freedave.models.diffusion_lm import DiffusionLM

__all__ = [
    "CheckpointError",
    "Commit",
    "DecodeOutput",
    "DecodeStats",
    "DiffusionLM",
    "LosslessnessError",
    "NonFiniteLogitsError",
    "generate",
    "load_model",
]
