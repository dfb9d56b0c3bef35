"""Random models as applications have them, and prompts for them, where published functions are held against ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tiny_models import MASK


@functools.cache
def model_of(seed: int) -> Model:
    return Model(seed)


class Model(torch.nn.Module):
    """A random bidirectional model of two layers, as an application calls it. Like a trained one, it predicts no mask."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        config = transformers.Qwen3Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=48, max_position_embeddings=512, attn_implementation="eager", initializer_range=0.4,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = transformers.Qwen3ForCausalLM(config).eval()
        self.config = config
        self.sharpness = 1.0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
        if attention_mask is None:  # everything sees everything
            past = others.get("past_key_values")
            length = input_ids.shape[1] + (0 if past is None else past.get_seq_length())
            attention_mask = torch.zeros(1, 1, input_ids.shape[1], length)
        out = self.inner(input_ids, attention_mask=attention_mask, **others)
        out.logits[..., MASK] = -30.0
        out.logits *= self.sharpness
        return out


def prompts(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randint(MASK, (count, 4 + seed % 5), generator=torch.Generator().manual_seed(seed))
