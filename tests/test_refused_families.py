"""Families that are recognised by their config.json and refused with the reason."""

from __future__ import annotations

import re

import pytest
from published_layouts import write_published

import freedave

WEDLM = {"architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "mask_token_id": None, "qk_norm": True}
NEMOTRON = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "mask_token_id": 100,
}
NEMOTRON |= {
    "dlm_paradigm": "bidirectional",
    "block_size": 32,
    "rope_parameters": {"rope_type": "yarn", "factor": 0.25},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WEDLM, "WeDLM is not supported: its attention is causal over reordered tokens"),
        (WEDLM | {"model_type": "qwen3"}, "WeDLM is not supported"),
        (WEDLM | {"architectures": "WeDLMForCausalLM", "model_type": None}, "WeDLM is not supported"),
        (NEMOTRON, "Nemotron-Labs-Diffusion is not supported: a finished block is stored by a causal forward"),
        (
            NEMOTRON | {"architectures": None, "model_type": "nemotron_labs_diffusion_vlm"},
            "Nemotron-Labs-Diffusion is not",
        ),
    ],
    ids=str,
)
def test_families_that_are_recognised_and_refused(config, message, tmp_path):
    """By what their published configurations say; the weights are Qwen3's, or Ministral 3's, and would fit."""
    folder = write_published(tmp_path, "sdar", **config)[0]
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        freedave.load_model(folder)
