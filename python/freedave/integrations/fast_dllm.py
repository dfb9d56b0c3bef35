"""Fast-dLLM (for LLaDA): its three `generate` functions with the arguments of the published ones, over our loop.

    from freedave.integrations.fast_dllm import generate_with_dual_cache

    out, forwards = generate_with_dual_cache(lm, input_ids, steps=128, gen_length=128, block_length=32, threshold=0.9)

Tokens and their order are those of the published functions, but for these differences: the mask is never predicted, and is
no part of the softmax; confidences that float64 cannot tell apart, all of them 1.0, are told apart; with a `factor` they are
rounded to float32; and sequences of a batch do not wait for each other, so that one sequence's tokens do not depend on the
others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from freedave.decode.generate import generate as decode
from freedave.decode.output import Commit
from freedave.integrations.step_schedule import refuse, tokens_a_step
from freedave.models.diffusion_lm import DiffusionLM


def generate(
    model: DiffusionLM | torch.nn.Module,
    prompt: torch.Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    lossless: bool = False,
    draft_steps: int = 8,
) -> tuple[torch.Tensor, int]:
    """Decodes prompts in blocks; every forward computes whole sequences.

    Args:
        model: what `freedave.load_model` returns, or any module that `DiffusionLM` takes, for which `mask_id` holds.
        prompt: `[B, P]` int64, all of one length.
        steps, gen_length, block_length: as published. Each step must commit as many tokens, a block's last one what is left.
        threshold: a step commits every position at least this confident, and the most confident one, whatever `steps` says.
        factor: a step commits by Fast-dLLM's factor instead, whatever `threshold` and `steps` say: the n-th most confident
            position from `1 - factor / (n + 1)` on, as far as all before it pass; the first, and a last one, always.
        temperature, remasking: as they are by default; others are refused.
        step_callback: called with the number of the step, once a step is known to be right.
        lossless: draft-and-verify, with `draft_steps` drafts a forward: the same tokens, in fewer forwards.

    Returns:
        `[B, P + gen_length]` int64, and how many forwards it took. Nothing ends an answer early, as published.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits.
    """
    call = (model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor)
    return _decode("fast_dllm.generate", "none", *call, step_callback, draft_steps if lossless else 1)


def generate_with_prefix_cache(
    model: DiffusionLM | torch.nn.Module,
    prompt: torch.Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    lossless: bool = False,
    draft_steps: int = 8,
) -> tuple[torch.Tensor, int]:
    """`generate`, where each block begins with a forward of the whole sequence, and its other steps reuse the keys and values
    of what stands before it.
    """
    call = (model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor)
    caller = "fast_dllm.generate_with_prefix_cache"
    return _decode(caller, "prefix", *call, step_callback, draft_steps if lossless else 1)


def generate_with_dual_cache(
    model: DiffusionLM | torch.nn.Module,
    prompt: torch.Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    lossless: bool = False,
    draft_steps: int = 8,
) -> tuple[torch.Tensor, int]:
    """`generate`, where each block begins with a forward of the whole sequence, and its other steps reuse the keys and values
    of everything else.
    """
    call = (model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor)
    caller = "fast_dllm.generate_with_dual_cache"
    return _decode(caller, "dual", *call, step_callback, draft_steps if lossless else 1)


def _decode(
    caller: str,
    cache: str,
    model: DiffusionLM | torch.nn.Module,
    prompt: torch.Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int,
    threshold: float | None,
    factor: float | None,
    step_callback: Callable[[int], None] | None,
    draft_steps: int,
) -> tuple[torch.Tensor, int]:
    refuse(
        caller,
        temperature=(
            temperature,
            0,
            "the published function draws anew in each step; see freedave.generate(temperature=...)",
        ),
        remasking=(remasking, "low_confidence", "positions are ranked by confidence"),
    )
    bounded = threshold is not None or factor is not None
    tokens_per_step = tokens_a_step(caller, gen_length if bounded else steps, gen_length, block_length)
    lm = model if isinstance(model, DiffusionLM) else DiffusionLM(model, mask_id, attention="full")
    out = decode(
        lm,
        prompt,
        gen_length,
        draft_steps,
        block_length,
        tokens_per_step,
        measure="log_odds" if factor is None else "prob",
        threshold=threshold if factor is None else factor,
        rule="threshold" if factor is None else "factor",
        cache=cache,
        eos_token_id=(),
        on_step=None if step_callback is None else _Steps(step_callback),
    )
    return out.sequences, out.num_forwards


class _Steps:
    """Calls back once a static step, whose number it tells; of several sequences, the furthest counts."""

    def __init__(self, callback: Callable[[int], None]) -> None:
        self._callback = callback
        self._taken: dict[int, int] = {}
        self._told = 0

    def __call__(self, commit: Commit) -> None:
        taken = self._taken[commit.sequence] = self._taken.get(commit.sequence, 0) + commit.steps
        for step in range(self._told, taken):
            self._callback(step)
        self._told = max(self._told, taken)
