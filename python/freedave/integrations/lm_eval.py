"""lm-evaluation-harness: `freedave evaluate --model_args pretrained=...,draft_steps=8 --tasks ...`.

Importing this module registers the model "freedave" with lm-eval, whose own command line, which `main` hands over to, then
knows `--model freedave`. Beside the scores stand what the decodes cost, and, with `check_lossless=True`, how many of them
were identical to static decoding.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import freedave
from freedave.integrations.likelihood import log_likelihood_bound
from freedave.models.placement import named_dtype, usable_device

# What a task may ask of a generation that greedy decoding does as well, or that lm-eval itself takes care of.
_UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass
class Generated:
    """What the decodes of an evaluation took. `compared`: requests that were also decoded statically; `identical`: those of
    them that came out the same, token for token and step for step.
    """

    requests: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    compared: int = 0
    identical: int = 0

    def summary(self) -> dict[str, float]:
        """The counts and what follows from them, for programs."""
        numbers: dict[str, float] = asdict(self)
        numbers["tokens_per_forward"] = self.tokens / max(self.forwards, 1)
        numbers["tokens_per_second"] = self.tokens / self.seconds if self.seconds else 0.0
        if self.compared:
            numbers["identical_rate"] = self.identical / self.compared
        return numbers

    def __str__(self) -> str:
        numbers = self.summary()
        text = (
            f"freedave: {self.requests} requests, {self.tokens} tokens in {self.forwards} forwards: "
            f"{numbers['tokens_per_forward']:.2f} tokens per forward, {numbers['tokens_per_second']:.1f} tokens/s"
        )
        if self.compared:
            text += f"; {self.identical} of {self.compared} identical to static decoding"
        return text


@register_model("freedave")
class FreeDaveLM(TemplateLM):
    """A masked-diffusion model for lm-eval.

    Args (those of `--model_args`):
        pretrained: what `freedave.load_model` takes: a checkpoint folder, a cached model, or "demo".
        draft_steps, block_length, tokens_per_step, threshold, drafting, cache, lookahead_steps: as in `freedave.generate`.
        check_lossless: also decode statically, and report how many requests came out identical.
        max_gen_toks: tokens to generate where a task does not say.
        mc_num: noise samples of a likelihood (`log_likelihood_bound`). check_greedy: decode each continuation as well, to
            say whether it is the greedy one; costs a decode a request, and only some metrics use it.
        batch_size: prompts decoded together, and noise samples a forward. dtype, device: of the weights.

    Likelihoods are lower bounds, as in LLaDA's published evaluation (arXiv:2502.09992): a diffusion model has no others.

    Raises:
        ValueError: no tokenizer; a request that asks for sampling, or has a generation argument this model does not know.
    """

    latest: FreeDaveLM | None = None  # for `main`, which has lm-eval make the model

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        draft_steps: int = 8,
        block_length: int | None = None,
        tokens_per_step: int = 1,
        threshold: float | None = None,
        drafting: str = "recycled",
        cache: str = "auto",
        lookahead_steps: int | None = None,
        check_lossless: bool = False,
        max_gen_toks: int = 256,
        mc_num: int = 128,
        check_greedy: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.lm = freedave.load_model(str(pretrained), dtype=named_dtype(dtype), device=usable_device(device or "cpu"))
        if self.lm.tokenizer is None:
            raise ValueError(f"{pretrained}: no tokenizer, and an evaluation is made of text")
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise ValueError(f"batch_size must be a number, got {batch_size!r}: it is not searched for here") from None
        self.max_gen_toks = max_gen_toks
        self.generated = Generated()
        self._mc_num = mc_num
        self._check_greedy = check_greedy
        self._check_lossless = check_lossless
        self._settings: dict[str, Any] = {
            "draft_steps": draft_steps,
            "block_length": block_length,
            "tokens_per_step": tokens_per_step,
            "threshold": threshold,
            "drafting": drafting,
            "cache": cache,
            "lookahead_steps": lookahead_steps,
        }
        FreeDaveLM.latest = self

    # What lm-eval asks about the model.

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return self.lm.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """An end of sequence; it also stands before a text that has no context."""
        end = self.lm.eos_token_id
        return self.tokenizer.eos_token_id if end is None else end

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.lm.max_positions or 2048

    def get_model_info(self) -> dict[str, Any]:
        """Part of `results["config"]`, which lm-eval writes after the decodes."""
        return {"freedave": {"model": self.lm.name, **self._settings, **self.generated.summary()}}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text as token ids; special tokens as the tokenizer likes them unless told otherwise."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained on it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # The three kinds of requests.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes prompts, `batch_size` at a time; texts end before the first of their `until` strings."""
        answers: dict[int, str] = {}
        asked = [(index, *self._generation(request)) for index, request in enumerate(requests)]
        # Prompts with the same settings decode together; long ones first, so that what takes most memory runs first.
        asked.sort(key=lambda request: (request[2:], -len(request[1])))
        for (until, count), group in itertools.groupby(asked, key=lambda request: request[2:]):
            for batch in _batches(list(group), self.batch_size):
                texts = self._decode([prompt for _, prompt, *_ in batch], list(until), count)
                answers.update(zip([index for index, *_ in batch], texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for _texts, context, continuation in requests:
            context = context[max(0, len(context) + len(continuation) - self._room()) :]
            bound = log_likelihood_bound(
                self.lm, context, continuation, samples=self._mc_num, batch_size=max(self.batch_size, 16)
            )
            results.append((bound, self._check_greedy and self._is_greedy(context, continuation)))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Bounds on whole texts, in windows where they are longer than the model."""
        results = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._room() - 1,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            checked, self._check_greedy = self._check_greedy, False
            results.append(sum(bound for bound, _ in self._loglikelihood_tokens(parts)))
            self._check_greedy = checked
        return results

    def _room(self) -> int:
        """Positions for a text, so that its last block fits."""
        block = self.lm.block_length if self.lm.attention == "block_causal" else None
        return self.max_length // (block or 1) * (block or 1)

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        out = freedave.generate(
            self.lm,
            torch.tensor([context], device=self.lm.device),
            max_new_tokens=len(continuation),
            eos_token_id=[],
            **self._settings,
        )
        return bool(out.sequences[0, len(context) :].tolist() == continuation)

    def _generation(self, request: Instance) -> tuple[list[int], tuple[str, ...], int]:
        """A request's prompt, its `until` strings and how many tokens to generate."""
        context, arguments = request.args
        arguments = normalize_gen_kwargs(arguments, default_max_gen_toks=self.max_gen_toks)
        if arguments.get("do_sample") or arguments.get("temperature"):
            raise ValueError(
                f"a request asks for sampling ({arguments}), and FreeDave decodes greedily; pass --gen_kwargs "
                "do_sample=False,temperature=0"
            )
        unknown = sorted(arguments.keys() - _UNDERSTOOD)
        if unknown:
            raise ValueError(f"generation arguments {', '.join(unknown)} are not known here; drop them from the task")
        count = int(arguments["max_gen_toks"])
        prompt = self.tok_encode(context)
        room = self._room() - count
        if room < 1:
            raise ValueError(f"max_gen_toks {count} leaves no room for a prompt in {self.max_length} positions")
        return prompt[-room:], tuple(word for word in arguments["until"] if word), count

    def _decode(self, prompts: list[list[int]], until: list[str], count: int) -> list[str]:
        width = max(map(len, prompts))
        padded = [[self.eot_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        differing = 0
        try:
            out = freedave.generate(
                self.lm,
                torch.tensor(padded, device=self.lm.device),
                max_new_tokens=count,
                attention_mask=torch.tensor(visible, device=self.lm.device),
                stop_sequences=self._stop_sequences(until),
                check_lossless=self._check_lossless,
                **self._settings,
            )
        except freedave.LosslessnessError as error:
            out = error.output
            differing = int(
                (
                    (out.sequences != error.static.sequences).any(1) | (out.step_map != error.static.step_map).any(1)
                ).sum()
            )
        total = self.generated
        total.requests += len(prompts)
        total.tokens += out.stats.tokens
        total.forwards += out.num_forwards
        total.seconds += out.stats.total_seconds
        if self._check_lossless:
            total.compared += len(prompts)
            total.identical += len(prompts) - differing
        return [self._text(row, until) for row in out.sequences[:, width:].tolist()]

    def _stop_sequences(self, until: list[str]) -> list[list[int]]:
        """Token sequences that decode to an `until` string, so that decoding stops there; the text is cut either way."""
        sequences = []
        for word in until:
            try:
                tokens = self.tok_encode(word, add_special_tokens=False)
            except (
                Exception
            ):  # of the tokenizers library, where a character has no token: it cannot be generated either
                continue
            if tokens and self.tokenizer.decode(tokens) == word:
                sequences.append(tokens)
        return sequences

    def _text(self, token_ids: list[int], until: list[str]) -> str:
        ends = [token_ids.index(end) for end in self.lm.eos_token_ids if end in token_ids]
        text: str = self.tokenizer.decode(token_ids[: min(ends, default=len(token_ids))], skip_special_tokens=True)
        for word in until:
            text = text.split(word)[0]
        return text


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def main(arguments: Sequence[str]) -> int:
    """lm-eval's own command line with the model "freedave", and a summary of the decodes on standard error."""
    from lm_eval.__main__ import cli_evaluate

    command = list(arguments)
    # lm-eval's own defaults are another model, and a GPU whether there is one or not.
    for option, value in (("--model", "freedave"), ("--device", "cuda" if torch.cuda.is_available() else "cpu")):
        if not any(word == option or word.startswith(f"{option}=") for word in command):
            command += [option, value]
    before, sys.argv = sys.argv, ["lm_eval", "run", *command]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    if FreeDaveLM.latest is not None and FreeDaveLM.latest.generated.requests:
        print(FreeDaveLM.latest.generated, file=sys.stderr)
        print(json.dumps({"freedave": FreeDaveLM.latest.generated.summary()}))
    return 0
