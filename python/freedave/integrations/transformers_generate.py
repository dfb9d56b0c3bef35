"""FreeDave as a decoding method of transformers: `model.generate(..., custom_generate=freedave.custom_generate)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils.generic import ModelOutput

from freedave.decoding import generate
from freedave.models.diffusion_lm import DiffusionLM
from freedave.output import Commit, DecodeStats


@dataclass
class FreeDaveGenerateOutput(ModelOutput):
    """What `model.generate(custom_generate=freedave.custom_generate, return_dict_in_generate=True)` returns.

    The fields are those of `freedave.DecodeOutput`; `sequences` has the name that transformers gives it.
    """

    sequences: torch.Tensor | None = None
    step_map: torch.Tensor | None = None
    forward_map: torch.Tensor | None = None
    num_forwards: int | None = None
    stats: DecodeStats | None = None


def custom_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    mask_token_id: int | None = None,
    attention: str | None = None,
    block_length: int | None = None,
    logits_shift: bool | None = None,
    draft_steps: int = 8,
    lookahead_steps: int | None = None,
    tokens_per_step: int = 1,
    order: str = "confidence",
    threshold: float | None = None,
    drafting: str = "recycled",
    cache: str = "auto",
    stop_sequences: Sequence[Sequence[int]] = (),
    check_lossless: bool = False,
    on_step: Callable[[Commit], None] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | FreeDaveGenerateOutput:
    """Decodes a masked-diffusion model through transformers' own `generate`:

        model.generate(**inputs, max_new_tokens=256, custom_generate=freedave.custom_generate, draft_steps=8)

    Args:
        model: a transformers model that was trained to fill masks.
        input_ids: `[B, P]` int64, the prompts.
        logits_processor, stopping_criteria, generation_config: what transformers makes of its arguments. Taken from there:
            `max_new_tokens` or `max_length`, `eos_token_id`, `return_dict_in_generate`.
        mask_token_id, attention, block_length, logits_shift: what the model is (`DiffusionLM`). None: what its config says
            under the same names, which is where `freedave convert` writes them.
        draft_steps, lookahead_steps, tokens_per_step, order, threshold, drafting, cache, stop_sequences, check_lossless,
        on_step: as in `freedave.generate`.
        model_kwargs: `attention_mask [B, P]` marks padding; transformers' other preparations are not needed.

    Returns:
        `sequences [B, P + new]`, or `FreeDaveGenerateOutput` with `return_dict_in_generate`.

    The model's attention implementation and training mode are those of before once this returns. A `streamer` does not get
    here: transformers keeps it from functions like this one, so use `on_step`.

    Raises:
        ValueError: a model without a mask token, or settings that change what is decoded in a way that this method does not:
            sampling, beams, several sequences a prompt, logits processors, other stopping criteria, a filled cache.
        What `freedave.generate` raises.
    """
    config = generation_config or model.generation_config
    _refuse_what_cannot_be_honoured(config, logits_processor, stopping_criteria, model_kwargs)
    described = _description(model, mask_token_id, attention, block_length, logits_shift)
    new_tokens = _new_tokens(config, input_ids.shape[1])
    ends = config.eos_token_id
    with _as_it_was(model):
        out = generate(
            DiffusionLM(model, **described),
            input_ids,
            max_new_tokens=new_tokens,
            draft_steps=draft_steps,
            lookahead_steps=lookahead_steps,
            tokens_per_step=tokens_per_step,
            order=order,
            threshold=threshold,
            drafting=drafting,
            cache=cache,
            eos_token_id=[] if ends is None else ends,
            stop_sequences=stop_sequences,
            check_lossless=check_lossless,
            on_step=on_step,
            attention_mask=model_kwargs.get("attention_mask"),
        )
    if not config.return_dict_in_generate:
        return out.sequences
    return FreeDaveGenerateOutput(
        sequences=out.sequences,
        step_map=out.step_map,
        forward_map=out.forward_map,
        num_forwards=out.num_forwards,
        stats=out.stats,
    )


def _refuse_what_cannot_be_honoured(
    config: GenerationConfig,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    model_kwargs: dict[str, Any],
) -> None:
    for name, neutral in (("do_sample", False), ("num_beams", 1), ("num_return_sequences", 1)):
        value = getattr(config, name)
        if value not in (None, neutral):
            raise ValueError(
                f"custom_generate: {name}={value!r}, but FreeDave decodes greedily; use {name}={neutral!r}"
            )
    names = sorted({type(processor).__name__ for processor in logits_processor or ()})
    if names:
        raise ValueError(
            f"custom_generate: logits processors ({', '.join(names)}) change the logits of one next token, and a diffusion "
            "model predicts every masked position; reset the settings that ask for them"
        )
    known = (MaxLengthCriteria, EosTokenCriteria)
    names = sorted({type(each).__name__ for each in stopping_criteria or () if not isinstance(each, known)})
    if names:
        raise ValueError(
            f"custom_generate: stopping criteria ({', '.join(names)}) look at one token after the other; use eos_token_id, "
            "max_new_tokens or stop_sequences"
        )
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise ValueError(
            "custom_generate: past_key_values holds tokens already, but a decode makes its own cache; drop it"
        )


def _description(
    model: PreTrainedModel,
    mask_token_id: int | None,
    attention: str | None,
    block_length: int | None,
    logits_shift: bool | None,
) -> dict[str, Any]:
    """`DiffusionLM`'s arguments, from the call or else from the model's config."""
    given = {
        "mask_token_id": mask_token_id,
        "attention": attention,
        "block_length": block_length,
        "logits_shift": logits_shift,
    }
    described = {name: getattr(model.config, name, None) if value is None else value for name, value in given.items()}
    if described["mask_token_id"] is None:
        raise ValueError(
            f"custom_generate: the config of this {type(model).__name__} names no mask_token_id; pass it, and attention and "
            "block_length with it, or save the model with `freedave convert`"
        )
    return {name: value for name, value in described.items() if value is not None}


def _new_tokens(config: GenerationConfig, prompt_length: int) -> int:
    if config.max_length is not None and config.max_length > prompt_length:
        return config.max_length - prompt_length
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    raise ValueError(
        f"custom_generate: max_length is {config.max_length} and the prompts have {prompt_length} tokens; set max_new_tokens"
    )


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Puts the attention implementation and the training mode back."""
    implementation, training = model.config._attn_implementation, model.training
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(implementation)
