"""What `generate` was asked for, checked against the model before anything runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from freedave.models.diffusion_lm import DiffusionLM
from freedave_kernels.arguments import ORDERS, expect_choice, expect_int, expect_threshold
from freedave_kernels.ops.draft_step import DRAFTINGS

CACHES = ("auto", "none", "prefix", "dual")


@dataclass(frozen=True)
class Settings:
    """A decode's settings, resolved: nothing is None that the model or the prompt decides."""

    max_new_tokens: int
    draft_steps: int
    lookahead_steps: int
    block_length: int
    tokens_per_step: int
    order: str
    threshold: float | None
    drafting: str
    cache: str
    """ "exact" or "none"."""
    eos_token_id: int | None
    first_block: int
    """Where the block with the first generated position begins."""
    sequence_length: int
    """Prompt and generated positions, up to the end of the last block."""

    def static(self) -> Settings:
        """The same decode, one step a forward."""
        return dataclasses.replace(self, draft_steps=1, lookahead_steps=1)


def check_prompt(lm: DiffusionLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The prompt `[P]` on the model's device."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
        kind = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 tensor, got {kind}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(
            f"input_ids must have shape [1, prompt], one sequence a call, got {tuple(input_ids.shape)}; "
            "decode several prompts in several calls"
        )
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token")
    prompt = input_ids[0].to(lm.device)
    if bool((prompt == lm.mask_token_id).any()):
        position = int((prompt == lm.mask_token_id).nonzero()[0])
        raise ValueError(f"the prompt holds the mask token (id {lm.mask_token_id}) at position {position}; remove it")
    if int(prompt.min()) < 0 or (lm.vocab_size is not None and int(prompt.max()) >= lm.vocab_size):
        raise ValueError(
            f"the prompt holds token ids from {int(prompt.min())} to {int(prompt.max())}, but the model's vocabulary has "
            f"{lm.vocab_size} tokens; was it tokenized for another model?"
        )
    return prompt


def resolve_settings(
    lm: DiffusionLM,
    prompt_length: int,
    max_new_tokens: int,
    draft_steps: int,
    block_length: int | None,
    tokens_per_step: int,
    order: str,
    threshold: float | None,
    drafting: str,
    cache: str,
    eos_token_id: int | None,
    lookahead_steps: int | None,
) -> Settings:
    """Checks `generate`'s arguments; raises `TypeError` or `ValueError` naming the argument."""
    expect_int("generate", "max_new_tokens", max_new_tokens, minimum=1)
    expect_int("generate", "draft_steps", draft_steps, minimum=1)
    expect_int("generate", "tokens_per_step", tokens_per_step, minimum=1)
    if block_length is None:
        block_length = lm.block_length or max_new_tokens
    expect_int("generate", "block_length", block_length, minimum=1)
    if lookahead_steps is not None:
        expect_int("generate", "lookahead_steps", lookahead_steps, minimum=1)
    expect_choice("generate", "order", order, ORDERS)
    expect_choice("generate", "drafting", drafting, DRAFTINGS)
    expect_choice("generate", "cache", cache, CACHES)
    expect_threshold("generate", threshold)
    if cache in ("prefix", "dual"):
        raise ValueError(
            f"cache={cache!r} is not available in this version; use 'auto': the exact cache for block-causal models, and no "
            "cache, which is exact as well, for full attention"
        )
    if eos_token_id is None:
        eos_token_id = lm.eos_token_id
    elif eos_token_id < 0 or (lm.vocab_size is not None and eos_token_id >= lm.vocab_size):
        raise ValueError(f"eos_token_id {eos_token_id} is outside the model's vocabulary of {lm.vocab_size} tokens")

    length = prompt_length + max_new_tokens
    first_block = prompt_length
    if lm.attention == "block_causal":
        first_block = prompt_length // block_length * block_length
        length = math.ceil(length / block_length) * block_length
    if lm.max_positions is not None and length > lm.max_positions:
        raise ValueError(
            f"the prompt ({prompt_length} tokens) and max_new_tokens ({max_new_tokens}) need {length} positions in blocks of "
            f"{block_length}, but the model has {lm.max_positions}; shorten one of them"
        )
    return Settings(
        max_new_tokens=max_new_tokens,
        draft_steps=draft_steps,
        lookahead_steps=min(lookahead_steps or draft_steps, draft_steps),
        block_length=block_length,
        tokens_per_step=tokens_per_step,
        order=order,
        threshold=threshold,
        drafting=drafting,
        cache="exact" if lm.attention == "block_causal" and cache == "auto" else "none",
        eos_token_id=eos_token_id,
        first_block=first_block,
        sequence_length=length,
    )
