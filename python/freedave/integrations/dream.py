"""Dream: `diffusion_generate` as a function, with the arguments of the published method.

    from freedave.integrations.dream import diffusion_generate

    out = diffusion_generate(lm, input_ids, max_new_tokens=256, steps=256, alg="entropy", lossless=True)

A step fills as many positions as the published schedule says, which differs from step to step. One that fills nothing, with
which the schedule begins as a rule, takes no forward.

Tokens and their order are those of the published method, but for these differences: the mask is never predicted, and is no
part of the softmax; equal confidences go to the lowest position, where `torch.topk` takes any; and in 16 bits, "topk_margin"
and "entropy" rank by float32. ("maskgit_plus" ranks by probabilities in the logits' dtype, as published.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from freedave.decode.settings import check_prompts
from freedave.integers import as_int
from freedave.integrations.step_schedule import refuse
from freedave.integrations.uneven_steps import decode_unevenly, expect_predicted, ranked
from freedave.models.diffusion_lm import DiffusionLM
from freedave_kernels.arguments import expect_choice
from freedave_kernels.contract import MAX_DRAFTS

CALLER = "dream.diffusion_generate"
MEASURES = {"maskgit_plus": "prob", "topk_margin": "margin", "entropy": "neg_entropy"}
DEFAULT_LENGTH = 20  # of an answer, where nobody says

# What the published configuration holds, and what is asked of it here.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None, "max_length": None, "steps": 512, "eps": 1e-3, "alg": "origin", "alg_temp": None,
    "temperature": 0.0, "top_p": None, "top_k": None, "num_return_sequences": 1, "mask_token_id": 151666,
    "return_dict_in_generate": False, "output_history": False,
}  # fmt: skip

LogitsHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
TokensHook = Callable[[int | None, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class DreamModelOutput:
    """`sequences [B, P + new]` int64, and with `output_history` the same after each step."""

    sequences: torch.Tensor
    history: list[torch.Tensor] | None = None


def diffusion_generate(
    model: DiffusionLM | torch.nn.Module,
    inputs: torch.Tensor,
    generation_config: Any = None,
    *,
    attention_mask: torch.Tensor | None = None,
    generation_tokens_hook_func: TokensHook | None = None,
    generation_logits_hook_func: LogitsHook | None = None,
    lossless: bool = False,
    draft_steps: int = 8,
    **settings: Any,
) -> torch.Tensor | DreamModelOutput:
    """Fills all positions of an answer, in any order, in `steps` steps.

    Args:
        model: what `freedave.load_model` returns (full attention), or any module that `DiffusionLM` takes, whose logits are
            then shifted, as Dream's are.
        inputs: `[B, P]` int64. attention_mask: `[B, P]`, 0 at padding, which may stand on the left or on the right.
        generation_config: an object with attributes of the names below.
        settings: these, which come before it: `max_new_tokens`, or `max_length` with the prompt's; `steps`, `eps`; `alg`:
            "maskgit_plus", "topk_margin" or "entropy"; `return_dict_in_generate`, `output_history`, `mask_token_id`; and
            `temperature`, `alg_temp`, `top_p`, `top_k`, `num_return_sequences`, as they are by default.
        generation_tokens_hook_func: called with the step (None before the first), all tokens `[B, P + new]` and the logits;
            returns the tokens to go on with, of which those of the prompt stay.
        generation_logits_hook_func: called with the step, the tokens before it and their logits `[B, P + new, V]`, row i of
            which predicts position i; returns logits. Hooks see whole steps of whole batches: no drafts and no padding.
        lossless: draft-and-verify, with `draft_steps` drafts a forward: the same tokens, in fewer forwards.

    Returns:
        `[B, P + new]` int64, or `DreamModelOutput`. Nothing ends an answer early, as published.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits.
    """
    chosen = _settings(generation_config, settings)
    draft_steps = as_int(CALLER, "draft_steps", draft_steps, minimum=1) if lossless else 1
    if draft_steps > MAX_DRAFTS:
        raise ValueError(f"{CALLER}: draft_steps must be at most {MAX_DRAFTS}, got {draft_steps}")
    lm = model
    if not isinstance(lm, DiffusionLM):
        lm = DiffusionLM(lm, chosen["mask_token_id"], attention="full", logits_shift=True)
    if lm.attention != "full":
        raise ValueError(f"{CALLER}: {lm.name} has block-causal attention, and this is for full attention")
    prompts = check_prompts(lm, inputs, attention_mask)
    lengths = {len(prompt) for prompt in prompts}
    new = _new_tokens(chosen, inputs.shape[1], "max_length" in settings)
    if lm.max_positions is not None and max(lengths) + new > lm.max_positions:
        raise ValueError(f"{CALLER}: {max(lengths) + new} positions are needed, but the model has {lm.max_positions}")
    hooks = (generation_tokens_hook_func, generation_logits_hook_func)
    hooked = hooks != (None, None)
    if hooked and (lossless or lengths != {inputs.shape[1]}):
        raise ValueError(f"{CALLER}: hooks see whole steps of whole batches: call it without lossless and padding")

    schedule = Schedule(chosen["steps"], chosen["eps"])
    measure = MEASURES[chosen["alg"]]
    given = inputs.to(lm.device)
    states = given.new_full((schedule.steps, len(given), new), lm.mask_token_id)  # after each step
    for length in lengths:  # those of a length together, without padding: every position sees every other one
        members = [b for b, prompt in enumerate(prompts) if len(prompt) == length]
        start = torch.tensor([prompts[b] for b in members], device=lm.device)
        if hooked:
            states = _with_hooks(lm, start, states, schedule, measure, *hooks)
            continue
        counts = schedule.counts(new)
        taken = [step for step, count in enumerate(counts) if count]
        answers, step_map = decode_unevenly(lm, start, [counts[step] for step in taken], draft_steps, measure)
        for n, step in enumerate(taken):
            states[step:, members] = torch.where(step_map <= n, answers, lm.mask_token_id)
    history = [torch.cat([given, state], 1) for state in (states if chosen["output_history"] else states[-1:])]
    if not chosen["return_dict_in_generate"]:
        return history[-1]
    return DreamModelOutput(history[-1], history if chosen["output_history"] else None)


class Schedule:
    """How many positions each step fills, in float32 as published. The last step fills all that are left."""

    def __init__(self, steps: int, eps: float) -> None:
        self.steps = steps
        self._times = torch.linspace(1, eps, steps + 1)

    def count(self, step: int, masked: float) -> int:
        """Of a step before which `masked` positions of a sequence, on average, are masked."""
        if step == self.steps - 1:
            return int(masked)
        share = 1 - self._times[step + 1] / self._times[step]
        return int(torch.tensor(masked, dtype=torch.float32) * share)

    def counts(self, positions: int) -> list[int]:
        """Of all steps, which together fill so many positions."""
        counts: list[int] = []
        for step in range(self.steps):
            counts.append(self.count(step, positions - sum(counts)))
        return counts


@torch.inference_mode()
def _with_hooks(
    lm: DiffusionLM,
    start: torch.Tensor,
    states: torch.Tensor,
    schedule: Schedule,
    measure: str,
    tokens_hook: TokensHook | None,
    logits_hook: LogitsHook | None,
) -> torch.Tensor:
    """Fills `states`, one step a forward. Hooks may fill and empty positions, so each step counts those that are masked."""
    begin = start.shape[1]
    tokens = torch.cat([start, states[0]], 1)
    rows = torch.arange(tokens.numel(), device=lm.device).view(tokens.shape)
    if lm.logits_shift:
        rows = torch.cat([rows[:, :1], rows[:, :-1]], 1)
    if tokens_hook is not None:
        tokens = tokens_hook(None, tokens, None)
    for step in range(schedule.steps):
        tokens = torch.cat([start, tokens[:, begin:]], 1)
        logits = lm.logits(tokens, rows.flatten()).unflatten(0, tokens.shape)
        if logits_hook is not None:
            logits = logits_hook(step, tokens, logits)
        state = tokens[:, begin:]
        masked = state == lm.mask_token_id
        token_ids, rank = ranked(lm, logits[:, begin:][masked], state, masked, measure)
        expect_predicted(masked, rank)
        count = schedule.count(step, int(masked.sum()) / len(start))
        tokens = torch.cat([start, torch.where(rank < count, token_ids, state)], 1)
        if tokens_hook is not None:
            tokens = tokens_hook(step, tokens, logits)
        states[step] = tokens[:, begin:]
    return states


def _settings(generation_config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings: given by name, else by the configuration, else by default."""
    unknown = settings.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"{CALLER}: no such setting: {', '.join(sorted(unknown))}; there are {', '.join(DEFAULTS)}")
    chosen = {name: settings.get(name, getattr(generation_config, name, value)) for name, value in DEFAULTS.items()}
    draws = "the published method draws anew in each step; see freedave.generate(temperature=...)"
    refuse(
        CALLER,
        temperature=(chosen["temperature"] or 0.0, 0.0, draws),
        alg_temp=(chosen["alg_temp"] or 0.0, 0.0, draws),
        top_p=(1.0 if chosen["top_p"] is None else chosen["top_p"], 1.0, "nothing is drawn"),
        top_k=(chosen["top_k"], None, "nothing is drawn"),
        num_return_sequences=(
            chosen["num_return_sequences"] or 1,
            1,
            "nothing is drawn, so that all would be the same",
        ),
    )
    if chosen["alg"] == "origin":
        raise ValueError(f"{CALLER}: alg='origin' fills positions at random; take one of {', '.join(MEASURES)}")
    expect_choice(CALLER, "alg", chosen["alg"], tuple(MEASURES))
    chosen["steps"] = as_int(CALLER, "steps", chosen["steps"], minimum=1)
    if not 0 <= chosen["eps"] < 1:
        raise ValueError(f"{CALLER}: eps must be at least 0 and below 1, got {chosen['eps']!r}")
    return chosen


def _new_tokens(chosen: dict[str, Any], prompt_length: int, by_name: bool) -> int:
    """How many positions an answer has. A `max_length` of 20 that is not given by name is the configuration's default."""
    new, length = chosen["max_new_tokens"], chosen["max_length"]
    if new is None:
        default = length is None or (length == DEFAULT_LENGTH and not by_name)
        new = (
            DEFAULT_LENGTH
            if default
            else as_int(CALLER, "max_length", length, minimum=prompt_length + 1) - prompt_length
        )
    return as_int(CALLER, "max_new_tokens", new, minimum=1)
