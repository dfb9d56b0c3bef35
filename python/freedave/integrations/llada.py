"""LLaDA: `generate` with the arguments of the published function, over our loop.

    from freedave.integrations.llada import generate

    out = generate(lm, input_ids, steps=128, gen_length=128, block_length=32, lossless=True)

Tokens and their order are those of the published function, but for these differences: the mask is never predicted, and is
no part of the softmax; and confidences that float64 cannot tell apart, all of them 1.0, are told apart.
"""

from __future__ import annotations

import torch

from freedave.decode.generate import generate as decode
from freedave.integrations.step_schedule import refuse, tokens_a_step
from freedave.models.diffusion_lm import DiffusionLM

DRAWS = "the published function draws anew in each step; see freedave.generate(temperature=...)"


def generate(
    model: DiffusionLM | torch.nn.Module,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    lossless: bool = False,
    draft_steps: int = 8,
) -> torch.Tensor:
    """Decodes prompts in blocks, each in as many steps, the most confident positions first.

    Args:
        model: what `freedave.load_model` returns, or any module that `DiffusionLM` takes, for which `mask_id` holds.
        prompt: `[B, P]` int64. attention_mask: `[B, P]`, 0 at padding, which may stand on the left or on the right.
        steps, gen_length, block_length: as published. Each step must commit as many tokens, a block's last one what is left.
        temperature, cfg_scale, remasking, logits_eos_inf, confidence_eos_eot_inf: as they are by default; others are refused.
        lossless: draft-and-verify, with `draft_steps` drafts a forward: the same tokens, in fewer forwards.

    Returns:
        `[B, P + gen_length]` int64. Nothing ends an answer early, as published.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits.
    """
    caller = "llada.generate"
    refuse(
        caller,
        temperature=(temperature, 0, DRAWS),
        cfg_scale=(cfg_scale, 0, "there is no guidance"),
        remasking=(remasking, "low_confidence", "positions are ranked by confidence"),
        logits_eos_inf=(logits_eos_inf, False, "the end token is a token like others"),
        confidence_eos_eot_inf=(confidence_eos_eot_inf, False, "the end token is a token like others"),
    )
    tokens_per_step = tokens_a_step(caller, steps, gen_length, block_length)
    lm = model if isinstance(model, DiffusionLM) else DiffusionLM(model, mask_id, attention="full")
    out = decode(
        lm,
        prompt,
        gen_length,
        draft_steps if lossless else 1,
        block_length,
        tokens_per_step,
        measure="log_odds",
        cache="none",
        eos_token_id=(),
        attention_mask=attention_mask,
    )
    return out.sequences
