"""transformers: `model.generate(..., custom_generate=freedave.custom_generate, draft_steps=8)`.

`generate` does its usual preparation (generation_config, special tokens, the prompt's attention mask, length) and then
calls `custom_generate` in the place of its own loop. What is asked for is honoured or refused, never ignored.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from freedave.decode.options import OPTION_NAMES, takes_options
from freedave.decode.output import Commit
from freedave.integrations.prompts import Answer, answer_prompts
from freedave.models.diffusion_lm import DiffusionLM

# What `generate` itself puts there; anything else came from the caller.
PREPARED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
# What `do_sample` draws from, by the option that stands for it here.
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
UNSUPPORTED = {
    "num_beams": (1, "there are no beams"),
    "output_scores": (False, "tokens are not committed from left to right"),
    "output_logits": (False, "tokens are not committed from left to right"),
    "output_attentions": (False, "drafts share forwards"),
    "output_hidden_states": (False, "drafts share forwards"),
    "cache_implementation": (None, "the decoder brings its own cache; see the argument `cache`"),
    "prompt_lookup_num_tokens": (None, "drafts come from the model itself; see `draft_steps`"),
}


@dataclass
class FreeDaveGenerateOutput(GenerateDecoderOnlyOutput):
    """With `return_dict_in_generate`: `sequences [B, prompt + new]`, and how they came about.

    `step_map` and `forward_map [B, new]` int64 as in `DecodeOutput`, -1 for padding; `num_forwards` and `seconds` are
    added up over the sequences.
    """

    step_map: torch.LongTensor | None = None
    forward_map: torch.LongTensor | None = None
    num_forwards: int | None = None
    seconds: float | None = None


@takes_options
def custom_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    mask_token_id: int | None = None,
    attention: str | None = None,
    logits_shift: bool | None = None,
    check_lossless: bool = False,
    on_step: Callable[[Commit], None] | None = None,
    **others: Any,
) -> torch.LongTensor | FreeDaveGenerateOutput:
    """The decoding loop of `model.generate(input_ids, custom_generate=custom_generate, ...)`.

    The model's attention is bidirectional until it returns. Calls from several threads take turns on a model; another forward
    of it, as `generate` without `custom_generate` makes them, must not run meanwhile.

    Args:
        model ... streamer: from transformers. `max_new_tokens`, `eos_token_id` (one or several), `pad_token_id`,
            `attention_mask` (left padding), `use_cache`, `return_dict_in_generate` and `streamer` are honoured. The streamer
            gets tokens in order, as soon as they and all before them are final. `do_sample` draws tokens with `temperature`
            (1 where none is given), `top_k` (transformers' own default is 50; 0: all), `top_p` and `min_p`; of
            `num_return_sequences` each has noise of its own.
        mask_token_id, attention, logits_shift: as in `DiffusionLM`; None, and no `block_length`, is what the model's config
            says, as `freedave convert` writes it.
        check_lossless, on_step: as in `freedave.generate`.
        others: those of `DecodingOptions`, where no `cache` is "auto", or "none" with `use_cache=False`; and
            what transformers prepares for the model.

    Returns:
        int64 `[B, prompt + new]`, each row ended by its first end of sequence and padded, cut to the longest; or
        `FreeDaveGenerateOutput`.

    Raises:
        ValueError: an argument that cannot be honoured (beams, logits processors, ...), or a bad one.
        LosslessnessError: `check_lossless` found a difference.
    """
    ours = _caller_of_generate()
    streamer = streamer if streamer is not None else ours.get("streamer")
    options = {name: others.pop(name) for name in OPTION_NAMES if name in others}
    processors = list(logits_processor or ())
    if generation_config.do_sample:
        _draw_as_configured(generation_config, processors, options)
    options["top_k"] = options.get("top_k") or None  # 0 is transformers' word for all
    _refuse(generation_config, processors, stopping_criteria, others, ours)
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"a streamer takes one sequence, got a batch of {input_ids.shape[0]}")
    if options.get("cache") is None:
        options["cache"] = "none" if generation_config.use_cache is False else "auto"
    ends = _as_list(generation_config._eos_token_tensor)
    prompts = _without_padding(input_ids, others.get("attention_mask"))
    with _as_diffusion_lm(model, mask_token_id, attention, options.get("block_length"), logits_shift, ends) as lm:
        stream = None if streamer is None else _Stream(streamer)
        answers = answer_prompts(
            lm,
            prompts,
            on_step=_both(stream, on_step),
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            check_lossless=check_lossless,
            **options,
        )
    if streamer is not None:
        streamer.end()
    difference = next((answer.difference for answer in answers if answer.difference is not None), None)
    if difference is not None:
        raise difference
    padding = _as_list(generation_config._pad_token_tensor)
    output = _output(input_ids, answers, ends, padding[0] if padding else 0)
    return output if generation_config.return_dict_in_generate else output.sequences


def _draw_as_configured(config: GenerationConfig, processors: list[Any], options: dict[str, Any]) -> None:
    """What `do_sample` draws with: arguments of `generate`, else its configuration's, whose processors are taken out."""
    for name, warper in WARPERS.items():
        configured = getattr(config, name)
        own = [each for each in processors if isinstance(each, warper)]
        if len(own) == 1 and getattr(own[0], name) == configured:
            processors.remove(own[0])
            if options.get(name) is None:
                options[name] = configured
    if options.get("temperature") is None:
        options["temperature"] = 1.0 if config.temperature is None else config.temperature
    if options["temperature"] == 0:
        raise ValueError("do_sample=True needs a temperature above 0, got 0")


def _refuse(
    config: GenerationConfig, processors: Any, criteria: Any, model_kwargs: dict[str, Any], caller: dict[str, Any]
) -> None:
    """Raises ValueError for what this decoder cannot do."""
    for name, (supported, reason) in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value != supported:
            raise ValueError(f"{name}={value!r} cannot be honoured by freedave.custom_generate: {reason}")
    if caller.get("assistant_model") is not None:
        raise ValueError(
            "assistant_model cannot be honoured by freedave.custom_generate: drafts come from the model itself"
        )
    if processors:
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise ValueError(f"logits processors cannot be honoured by freedave.custom_generate: {names}")
    others = [type(c).__name__ for c in criteria or () if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
    if others:
        raise ValueError(
            f"stopping criteria other than length and end of sequence cannot be honoured by freedave.custom_generate: "
            f"{', '.join(others)}"
        )
    filled = model_kwargs.get("past_key_values")
    if filled is not None and filled.get_seq_length() > 0:
        raise ValueError("past_key_values cannot be honoured by freedave.custom_generate: pass the whole prompt")
    unknown = sorted(name for name, value in model_kwargs.items() if name not in PREPARED and value is not None)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be honoured by freedave.custom_generate")
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is not None:
        length = positions.shape[-1]
        expected = torch.arange(length, device=positions.device) if mask is None else mask.long().cumsum(-1) - 1
        visible = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.bool().expand_as(positions)
        if bool(((positions != expected) & visible).any()):
            raise ValueError(
                "position_ids cannot be honoured by freedave.custom_generate: positions count from the prompt"
            )


def _without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts, without what stands before them."""
    if attention_mask is None:
        return [row.tolist() for row in input_ids]
    visible = attention_mask.bool()
    for row, mask in enumerate(visible):
        if not bool(mask.any()):
            raise ValueError(f"attention_mask: sequence {row} of the batch has no tokens")
        if not bool(mask[int(mask.nonzero()[0]) :].all()):
            raise ValueError(
                f"attention_mask: sequence {row} of the batch is not padded on the left only; set the tokenizer's "
                "padding_side='left'"
            )
    return [row[mask].tolist() for row, mask in zip(input_ids, visible, strict=True)]


@contextmanager
def _as_diffusion_lm(
    model: PreTrainedModel,
    mask_token_id: int | None,
    attention: str | None,
    block_length: int | None,
    logits_shift: bool | None,
    ends: Sequence[int],
) -> Iterator[DiffusionLM]:
    """The model as the decoder sees it; its attention implementation and mode are put back afterwards.

    They are the model's, not a thread's, so calls that share a model take turns.
    """
    config = model.config
    mask_token_id = getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
    attention = getattr(config, "attention", None) if attention is None else attention
    missing = [
        name for name, value in {"mask_token_id": mask_token_id, "attention": attention}.items() if value is None
    ]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: the model's config does not say, so pass it to generate (attention is "
            "'block_causal' or 'full')"
        )
    with _turn(model):
        implementation, training = config._attn_implementation, model.training
        experts = config._experts_implementation
        try:
            yield DiffusionLM(
                model,
                mask_token_id,  # type: ignore[arg-type]
                attention=attention,  # type: ignore[arg-type]
                block_length=getattr(config, "block_length", None) if block_length is None else block_length,
                logits_shift=bool(getattr(config, "logits_shift", False) if logits_shift is None else logits_shift),
                eos_token_id=ends or None,
            )
        finally:
            model.set_attn_implementation(implementation)
            model.set_experts_implementation(experts)
            model.train(training)


_turns: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def _turn(model: PreTrainedModel) -> threading.RLock:
    """The lock of a model; the thread that holds it may take it again (`on_step` may generate)."""
    with _turns_lock:
        return _turns.setdefault(model, threading.RLock())


class _Stream:
    """Hands tokens to a streamer once they, and all before them, are final."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._waiting: dict[int, int] = {}
        self._given = 0

    def __call__(self, commit: Commit) -> None:
        self._waiting.update(zip(commit.positions, commit.token_ids, strict=True))
        ready = [self._waiting.pop(position) for position in range(self._given, commit.final)]
        self._given = commit.final
        if ready:
            self._streamer.put(torch.tensor(ready))


def _both(
    first: Callable[[Commit], None] | None, second: Callable[[Commit], None] | None
) -> Callable[[Commit], None] | None:
    """One callback of two."""
    if first is None or second is None:
        return first or second

    def both(commit: Commit) -> None:
        first(commit)
        second(commit)

    return both


def _output(
    input_ids: torch.Tensor, answers: list[Answer], ends: Sequence[int], padding: int
) -> FreeDaveGenerateOutput:
    """Answers as transformers returns them."""
    lengths = [answer.length(ends) for answer in answers]
    longest = max(lengths)

    def rows(values: list[list[int]], filler: int) -> torch.Tensor:
        cut = [row[:length] + [filler] * (longest - length) for row, length in zip(values, lengths, strict=True)]
        return torch.tensor(cut, device=input_ids.device)

    new = rows([answer.token_ids for answer in answers], padding)
    return FreeDaveGenerateOutput(
        sequences=torch.cat([input_ids, new], dim=1),  # type: ignore[arg-type]
        step_map=rows([answer.step_map for answer in answers], -1),  # type: ignore[arg-type]
        forward_map=rows([answer.forward_map for answer in answers], -1),  # type: ignore[arg-type]
        num_forwards=sum(answer.num_forwards for answer in answers),
        seconds=sum(answer.seconds for answer in answers),
    )


def _as_list(tensor: torch.Tensor | None) -> list[int]:
    return [] if tensor is None else tensor.flatten().tolist()


def _caller_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` that called, {} where there is none.

    transformers 5.23 hands a callable only those of its keyword arguments that it does not know itself. `streamer` and
    `assistant_model` are lost: the one would wait forever for its end, the other would be ignored without a word.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}
