"""SDAR: `block_diffusion_generate` with the arguments of the published function, over our loop.

    from freedave.integrations.sdar import block_diffusion_generate

    prompt = tokenizer(text, return_tensors="pt")
    out = block_diffusion_generate(
        lm, prompt, mask_id=151669, block_length=4, denoising_steps=4, temperature=0, lossless=True
    )

Tokens and their order are those of the published function, but for these differences:

- The mask is never predicted, and is no part of the softmax.
- Confidences are float32 whatever the model's dtype, and equal ones go to the lowest position, where `torch.topk` takes any.
- What is drawn comes from the same softmax, but a position's noise is the same in all steps (`seed`); published, it is drawn
  anew. With `temperature=0`, which divides by zero there, it is the likeliest token.
- A step never changes a token that stands. Published, one that may fill more positions than are masked writes over others,
  those of the prompt included.
- Behind the first stopping token stand masks; published, the rest of its block stands there first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from freedave.decode.generate import generate as decode
from freedave.integers import as_int
from freedave.integrations.step_schedule import as_torch_compares, refuse, tokens_a_step
from freedave.models.diffusion_lm import DiffusionLM
from freedave_kernels.arguments import expect_choice

CALLER = "sdar.block_diffusion_generate"
DYNAMIC = "low_confidence_dynamic"
ENTROPY = "entropy_bounded"
ORDERS = {
    DYNAMIC: "confidence",
    "low_confidence_static": "confidence",
    ENTROPY: "confidence",
    "sequential": "left_to_right",
}


def block_diffusion_generate(
    model: DiffusionLM | torch.nn.Module,
    prompt: Mapping[str, torch.Tensor],
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = DYNAMIC,
    confidence_threshold: float = 0.85,
    stopping_criteria_idx: int | Sequence[int] | None = None,
    *,
    eb_threshold: float = 0.35,
    lossless: bool = False,
    draft_steps: int = 8,
    seed: int | None = None,
) -> torch.Tensor:
    """Decodes a prompt in blocks, aligned at position 0, whole blocks to the last.

    Args:
        model: what `freedave.load_model` returns, or any module that `DiffusionLM` takes, for which `mask_id` holds.
        prompt: `{"input_ids": [B, P] int64}`, as a tokenizer returns it; with its `attention_mask` where there is padding.
        gen_length, block_length: as published.
        denoising_steps: those of a block. Each must fill as many positions, a block's last one what is left; with
            "low_confidence_dynamic" and "entropy_bounded", one.
        temperature, top_k, top_p: what is drawn from, as published. A temperature of 0: the likeliest token is taken.
        remasking_strategy: "low_confidence_static" fills the most confident positions, "low_confidence_dynamic" all that are
            more confident than `confidence_threshold`, or else the most confident one, "sequential" the first ones;
            "entropy_bounded" (of SDAR's engine), with a temperature of 0, as many of the least entropy as have a sum of
            entropies below `eb_threshold`, or else the first of them.
        stopping_criteria_idx: the block in which one of these tokens is generated is the last one.
        lossless: draft-and-verify, with `draft_steps` drafts a forward: the same tokens, in fewer forwards.
        seed: of what is drawn. None: another one with each call, from torch's generator.

    Returns:
        `[B, T]` int64, T the whole blocks that hold prompt and answer; masks where nothing was decoded.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits.
    """
    expect_choice(CALLER, "remasking_strategy", remasking_strategy, tuple(ORDERS))
    gen_length = as_int(CALLER, "gen_length", gen_length, minimum=1)
    block_length = as_int(CALLER, "block_length", block_length, minimum=1)
    tokens_per_step = tokens_a_step(CALLER, denoising_steps, block_length, block_length, "denoising_steps")
    dynamic, entropic = remasking_strategy == DYNAMIC, remasking_strategy == ENTROPY
    if entropic:
        refuse(CALLER, temperature=(temperature, 0, "there are no entropies here where tokens are drawn"))
    if (dynamic or entropic) and tokens_per_step > 1:
        raise ValueError(
            f"{CALLER}: with {remasking_strategy!r}, a step that finds nothing sure enough fills one position here, and "
            f"{tokens_per_step} with denoising_steps={denoising_steps}: take {block_length}"
        )
    if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
        raise TypeError(f"{CALLER}: prompt must map 'input_ids' to token ids [B, P], got {type(prompt).__name__}")
    input_ids = prompt["input_ids"]
    length = input_ids.shape[-1] + gen_length
    out = decode(
        model if isinstance(model, DiffusionLM) else DiffusionLM(model, mask_id, block_length=block_length),
        input_ids,
        length + -length % block_length - input_ids.shape[-1],
        draft_steps if lossless else 1,
        block_length,
        tokens_per_step,
        ORDERS[remasking_strategy],
        threshold=as_torch_compares(confidence_threshold if dynamic else eb_threshold if entropic else None),
        rule="strict" if dynamic else "entropy_bound" if entropic else "threshold",
        measure="neg_entropy" if entropic else "prob",
        eos_token_id=() if stopping_criteria_idx is None else stopping_criteria_idx,
        attention_mask=prompt.get("attention_mask"),
        temperature=temperature,
        seed=seed,
        top_k=top_k or None,
        top_p=None if top_p == 1 else top_p,
    )
    generated = out.sequences[:, input_ids.shape[-1] :]
    generated[out.step_map < 0] = mask_id
    return out.sequences
