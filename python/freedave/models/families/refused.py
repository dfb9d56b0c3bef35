"""Families that are recognised and not read: no native class with this decoder computes what they were trained for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """A family by its config.json (any of `model_types`, or any of `architectures`), and why it is not read."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    reason: str


REFUSED = (
    Refused(
        "WeDLM",
        ("wedlm",),
        ("WeDLMForCausalLM",),
        "its attention is causal over reordered tokens (those that are filled come first, then the masked ones, each rotated "
        "by its true position), so that what a token sees depends on which others are filled, and it is decoded in a "
        "streaming window. The decoder here knows blocks, and attention that is block-causal or full",
    ),
    Refused(
        "Nemotron-Labs-Diffusion",
        ("nemotron_labs_diffusion", "nemotron_labs_diffusion_vlm"),
        ("NemotronLabsDiffusionModel",),
        "a finished block is stored by a causal forward, which also predicts the next block's first token, and only the "
        "block being decoded sees itself whole. The decoder here knows attention that is block-causal everywhere, or full",
    ),
)
