"""The model that lm-evaluation-harness asks: answers by `freedave.generate`, likelihoods by their bound."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from freedave.decode.options import OPTION_NAMES, DecodingOptions, takes_options
from freedave.decode.settings import resolve_settings
from freedave.integrations.likelihood import log_likelihood_bound
from freedave.integrations.lm_eval.tally import DecodingTally
from freedave.integrations.loading import default_device, load_named
from freedave.integrations.prompts import Answer, answer_prompts
from freedave.models.diffusion_lm import DiffusionLM

DEFAULT_MAX_LENGTH = 2048  # the harness's own, for models that do not say

logger = logging.getLogger(__name__)


class MonteCarlo(TypedDict):
    """How a likelihood is sampled."""

    samples: int
    batch_size: int
    seed: int


@register_model("freedave")
class FreeDaveLM(TemplateLM):
    """A masked-diffusion model as the harness sees it.

    Args:
        pretrained: a checkpoint as `load_model` takes it ("demo" is embedded), or a `DiffusionLM`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: None is the first GPU, or the CPU where there is none.
        revision: of a model in the Hugging Face cache.
        batch_size: prompts of one batch; prompts of similar length go together.
        max_batch_size: taken for the harness's sake; there is no automatic batch size.
        max_gen_toks: tokens to generate where a task does not say.
        max_length: None is the model's own; longer prompts lose their beginning.
        check_lossless: decode statically as well: True is every request, 0.1 every tenth.
        mc_num: noise samples of a likelihood; where a text has fewer subsets, it is exact.
        mc_batch_size: noise samples a forward.
        mc_seed: of these samples.
        options: those of `DecodingOptions`; a task's `generation_kwargs` may hold them too, and `do_sample` there is a
            temperature of 1 where none is given. A request that is repeated is drawn anew: batches have seeds of their own.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    @takes_options
    def __init__(
        self,
        pretrained: str | DiffusionLM,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        check_lossless: bool | float = False,
        mc_num: int = 128,
        mc_batch_size: int = 16,
        mc_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        numbers = {
            "batch_size": batch_size,
            "max_gen_toks": max_gen_toks,
            "mc_num": mc_num,
            "mc_batch_size": mc_batch_size,
        }
        for name, value in numbers.items():
            if not str(value).isdecimal() or int(value) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(check_lossless, str) or not 0 <= check_lossless <= 1:
            raise ValueError(f"check_lossless must be True, False or a share between 0 and 1, got {check_lossless!r}")
        if isinstance(pretrained, DiffusionLM):
            self.lm = pretrained
        else:
            self.lm = load_named(pretrained, dtype, _usable_device(device), revision)
        if self.lm.tokenizer is None:
            raise ValueError(f"{self.lm.name} has no tokenizer, and the tasks of the harness are texts")
        self.tokenizer = self.lm.tokenizer
        self._device = self.lm.device
        self._batch_size = int(batch_size)
        self._max_gen_toks = int(max_gen_toks)
        self._max_length = max_length or self.lm.max_positions or DEFAULT_MAX_LENGTH
        self._mc = MonteCarlo(samples=int(mc_num), batch_size=int(mc_batch_size), seed=mc_seed)
        self._lossless_share = float(check_lossless)
        self._options = dataclasses.asdict(DecodingOptions(**options))
        resolve_settings(self.lm, prompt_length=1, max_new_tokens=1, **self._options)  # refused now, not after hours
        self._ends = list(self.lm.eos_token_ids)
        self.tallies: dict[str, DecodingTally] = defaultdict(DecodingTally)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> FreeDaveLM:
        """As the harness makes it from `--model_args`: there, an unknown argument or one of another type is a wrong value.

        Raises:
            ValueError: naming the argument.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        try:
            return cls(**arg_dict, **given)
        except TypeError as error:
            raise ValueError(f"--model_args: {error}") from error

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FreeDaveLM:
        """The same from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ------------------------------------------------------------------------------------------------------ what it says

    def get_model_info(self) -> dict[str, Any]:
        """For the "config" of the results: the model, the settings, and what each task's decodes cost."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.lm.model.parameters()),
            "model_dtype": str(next(self.lm.model.parameters()).dtype),
            "freedave": {
                "model": self.lm.name,
                "attention": self.lm.attention,
                **self._options,
                "likelihood": self._mc,
                "decoding": {task: tally.as_json() for task, tally in self.tallies.items()},
            },
        }

    # -------------------------------------------------------------------------------------------------------- tokenizing

    @property
    def eot_token_id(self) -> int:
        """The end of sequence; also the context of a text that has none."""
        if not self._ends:
            raise ValueError(
                f"{self.lm.name} has no end of sequence token, which a text without a context needs before it"
            )
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Positions, prompt and answer together."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's cache of requests."""
        return str(self.lm.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text as token ids; special tokens as the tokenizer likes, but no second beginning of sequence."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        try:
            return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])
        except Exception as error:  # the tokenizers library raises plain Exception for a character it cannot write
            raise ValueError(f"the tokenizer of {self.lm.name} cannot write {string[-60:]!r}: {error}") from error

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was trained to see it."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.lm.name} has no chat template; leave out --apply_chat_template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -------------------------------------------------------------------------------------------------------- generating

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, up to the first of its `until` strings."""
        prepared = [self._prepare(request) for request in requests]
        texts = [""] * len(requests)
        checked = set(_every_nth(len(requests), self._lossless_share))
        with tqdm(total=len(requests), desc="decoding", unit=" answers", disable=disable_tqdm or None) as bar:
            for batch in self._batches(prepared, checked):
                prompts, (_, settings, until) = [prepared[i][0] for i in batch], prepared[batch[0]]
                compared = batch[0] in checked
                if settings["seed"] is not None:
                    settings = settings | {"seed": (settings["seed"] + batch[0]) % 2**63}
                answers = answer_prompts(self.lm, prompts, check_lossless=compared, **settings)
                for i, answer in zip(batch, answers, strict=True):
                    texts[i] = self._text(answer, until)
                    self._tally(requests[i], answer, compared)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                total = sum(self.tallies.values(), DecodingTally())
                bar.set_postfix_str(f"{total.tokens_per_forward:.1f} tokens per forward", refresh=False)
                bar.update(len(batch))
        return texts

    def _prepare(self, request: Instance) -> tuple[list[int], dict[str, Any], list[str]]:
        """(prompt, settings of its decode, strings that end it).

        Raises:
            ValueError: what its task asks for cannot be done, or is of a wrong type; names the task.
        """
        context, generation = request.args
        try:
            new, settings, until = self._settings_of(generation)
            resolve_settings(self.lm, 1, new, **{name: settings[name] for name in OPTION_NAMES})
        except (TypeError, AttributeError, ValueError) as error:  # a task's file can hold anything
            raise ValueError(f"task {request.task_name}: generation_kwargs {generation!r}: {error}") from error
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        return self._cut(prompt, new), settings, until

    def _settings_of(self, generation: dict[str, Any]) -> tuple[int, dict[str, Any], list[str]]:
        """(how many new tokens, settings of the decode, strings that end it)."""
        sampling, until = generation.get("do_sample", False), generation.get("until")
        if not isinstance(sampling, bool):
            raise TypeError(f"do_sample must be true or false, got {sampling!r}")
        if until and not all(isinstance(text, str) for text in (until if isinstance(until, list) else [until])):
            raise TypeError(f"until must be a string or a list of strings, got {until!r}")
        settings = dict(normalize_gen_kwargs(generation, self._max_gen_toks))
        sampling, temperature = settings.pop("do_sample"), settings.pop("temperature", None)
        if sampling:
            settings["temperature"] = 1.0 if temperature is None else temperature
            if temperature == 0:
                raise ValueError("do_sample needs a temperature above 0, got 0")
        until = handle_stop_sequences(settings.pop("until", None), eos=self.tokenizer.eos_token)
        new = settings.pop("max_gen_toks")
        unknown = sorted(set(settings) - set(OPTION_NAMES))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} cannot be honoured; known are until, max_gen_toks and {', '.join(OPTION_NAMES)}"
            )
        settings = {**self._options, **settings, "max_new_tokens": new, "stop_sequences": self._stop_sequences(until)}
        return new, settings, until

    def _stop_sequences(self, until: list[str]) -> list[list[int]]:
        """What ends a decode early: `until` as tokens, where those are that text again.

        In an answer it may be written with other tokens; then the decode goes on, and its text is cut all the same.
        """
        found = []
        for text in until:
            try:
                token_ids = self.tok_encode(text, add_special_tokens=False)
            except ValueError:  # a text that the tokenizer cannot write does not come up
                continue
            if token_ids and text in self.tokenizer.decode(token_ids):
                found.append(token_ids)
        return found

    def _cut(self, prompt: list[int], new: int) -> list[int]:
        """A prompt that leaves room for its answer: the end of one that is too long."""
        room = self._max_length - new
        if room < 1:
            raise ValueError(
                f"max_gen_toks {new} leaves no room for a prompt: the model has {self._max_length} positions"
            )
        if len(prompt) > room:
            logger.warning(
                "a prompt of %d tokens is cut to its last %d, to leave room for the answer", len(prompt), room
            )
        return prompt[-room:]

    def _batches(self, prepared: Sequence[tuple[list[int], dict, list[str]]], checked: set[int]) -> Iterator[list[int]]:
        """Indices of requests with the same settings, longest prompts first (what does not fit, does not fit at once)."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, (_, settings, until) in enumerate(prepared):
            groups[repr((sorted(settings.items()), until, i in checked))].append(i)
        for group in groups.values():
            group.sort(key=lambda i: -len(prepared[i][0]))
            for first in range(0, len(group), self._batch_size):
                yield group[first : first + self._batch_size]

    def _text(self, answer: Answer, until: list[str]) -> str:
        text = str(self.tokenizer.decode(answer.before_end(self._ends), skip_special_tokens=True))
        return postprocess_generated_text(text, until, None)

    def _tally(self, request: Instance, answer: Answer, compared: bool) -> None:
        self.tallies[request.task_name or ""] += DecodingTally(
            requests=1,
            forwards=answer.num_forwards,
            tokens=answer.tokens,
            seconds=answer.seconds,
            compared=int(compared),
            identical=int(compared and answer.difference is None),
        )

    # ------------------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(bound on the log-likelihood of the continuation, whether greedy decoding writes it) for each pair."""
        results = []
        for request, context, continuation in tqdm(
            requests, desc="likelihoods", unit=" texts", disable=disable_tqdm or None
        ):
            kept = self._cut(context, len(continuation))
            bound = log_likelihood_bound(self.lm, kept, continuation, **self._mc)
            settings = {**self._options, "max_new_tokens": len(continuation), "eos_token_id": []}
            (answer,) = answer_prompts(self.lm, [kept], **settings)
            results.append((bound, answer.token_ids == continuation))
            self.cache_hook.add_partial("loglikelihood", request, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound for whole texts; those longer than the model has positions are added up in windows."""
        results: list[float] = []
        for request in tqdm(requests, desc="likelihoods", unit=" texts", disable=disable_tqdm or None):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,  # a window is the text's tokens, and the one before them comes on top
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            results.append(sum(log_likelihood_bound(self.lm, *pair, **self._mc) for pair in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results


def _usable_device(device: str | None) -> str:
    """The harness's command line says cuda:0 where its user said nothing, also where there is no GPU."""
    if device == "cuda:0" and not torch.cuda.is_available():
        logger.warning("there is no GPU that torch sees: running on the CPU")
        return "cpu"
    return device or default_device()


def _every_nth(count: int, share: float) -> Iterable[int]:
    """Evenly spread indices, `share` of `count`; at least one where there is a share at all."""
    chosen = max(round(count * share), 1) if share else 0
    return (i * count // chosen for i in range(min(chosen, count)))
