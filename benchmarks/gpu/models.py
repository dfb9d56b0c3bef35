"""Models of published shapes with random weights, on which the time of a step does not depend; made on the device."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu.machine import Machine
from freedave import DiffusionLM

CLASSES: dict[str, tuple[type[PreTrainedModel], type[Qwen3Config] | type[LlamaConfig]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
}
MOST_POSITIONS = 8192


@dataclass(frozen=True)
class Published:
    """A checkpoint's dimensions, and how it is decoded; `heads` query heads share `groups` key-value heads."""

    name: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_size: int
    vocab: int
    mask_token_id: int
    attention: str
    block_length: int
    cache: str

    def tiny(self) -> Published:
        """The same in small, for a dry run."""
        groups = 2 if self.groups < self.heads else 4
        sizes = {"layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "groups": groups, "head_size": 16}
        tokens = {"vocab": 500, "mask_token_id": 499}
        changes: dict[str, Any] = {**sizes, **tokens}
        return dataclasses.replace(self, **changes)


SDAR_8B = Published("SDAR-8B", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 151669, "block_causal", 4, "auto")
LLADA_8B = Published("LLaDA-8B", "llama", 32, 4096, 12288, 32, 32, 128, 126464, 126336, "full", 32, "dual")


def shape_of(published: Published, machine: Machine) -> Published:
    return published.tiny() if machine.dry else published


@functools.cache
def random_model(published: Published, device: torch.device) -> DiffusionLM:
    """In bfloat16; matrices normal with a deviation of 0.02, norms 1. Stays until the process ends."""
    model_class, config_class = CLASSES[published.architecture]
    config = config_class(
        vocab_size=published.vocab,
        hidden_size=published.hidden,
        intermediate_size=published.intermediate,
        num_hidden_layers=published.layers,
        num_attention_heads=published.heads,
        num_key_value_heads=published.groups,
        head_dim=published.head_size,
        max_position_embeddings=MOST_POSITIONS,
        tie_word_embeddings=False,
        # A random model would end anywhere.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        # transformers has done so already, but not every version does outside from_pretrained.
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 0.02)
    return DiffusionLM(
        model,
        published.mask_token_id,
        attention=published.attention,
        block_length=published.block_length,
        name=published.name,
    )


def weight_bytes(lm: DiffusionLM) -> int:
    """What every forward has to read: all weights but those of the embedding, of which it takes a few rows."""
    model: Any = lm.model
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        del parameters[id(embedding)]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def prompt(lm: DiffusionLM, length: int, seed: int) -> list[int]:
    """Random tokens, none of them the mask."""
    generator = torch.Generator().manual_seed(seed)
    assert lm.vocab_size is not None
    tokens = torch.randint(lm.vocab_size - 1, (length,), generator=generator)
    return (tokens + (tokens >= lm.mask_token_id)).tolist()
