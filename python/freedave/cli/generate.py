"""`freedave generate`: decode one prompt with a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from freedave.cli.reporting import show_remarks, write, write_json
from freedave.cli.streaming import ProgressBar, StreamingText, Watcher, can_redraw
from freedave.decode.generate import generate
from freedave.decode.options import OPTION_NAMES
from freedave.decode.output import DecodeOutput, LosslessnessError
from freedave.integrations.loading import default_device, load_named
from freedave.models.diffusion_lm import DiffusionLM
from freedave.picture import Trace, decode_picture, first_block_of, token_texts


@dataclass(frozen=True)
class Decoded:
    """What there is to report: the decode, and how it compares with static decoding where that was asked for."""

    arguments: argparse.Namespace
    lm: DiffusionLM
    prompt_ids: list[int]
    output: DecodeOutput
    static: DecodeOutput | None
    difference: LosslessnessError | None

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens up to the first end of sequence."""
        token_ids: list[int] = self.output.sequences[0, len(self.prompt_ids) :].tolist()
        ends = [token_ids.index(end) for end in self.lm.eos_token_ids if end in token_ids]
        return token_ids[: min(ends, default=len(token_ids))]

    @property
    def text(self) -> str:
        """The generated text, or the token ids where there is no tokenizer."""
        return decode_text(self.lm, self.token_ids)

    @property
    def name(self) -> str:
        """What the decode is called next to static decoding."""
        steps, drafting = self.arguments.draft_steps, self.arguments.drafting
        if steps == 1:
            return "static decoding"
        return f"FreeDave, {drafting} drafts" if steps == "auto" else f"FreeDave, {steps} {drafting} drafts"


def run(arguments: argparse.Namespace) -> int:
    """Decode, print, draw; the exit code."""
    device = arguments.device or default_device()
    if not arguments.tensor_parallel:
        lm = load_named(arguments.model, arguments.dtype, device, arguments.revision)
        return decode_and_report(lm, arguments, speaks=True)
    try:
        lm = load_named(arguments.model, arguments.dtype, device, arguments.revision, tensor_parallel=True)
        return decode_and_report(lm, arguments, speaks=dist.get_rank() == 0)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def decode_and_report(lm: DiffusionLM, arguments: argparse.Namespace, *, speaks: bool) -> int:
    """Decodes; only one of several processes `speaks`, for all of them."""
    prompt_ids = encode_prompt(lm, arguments)
    if not speaks:
        decode(lm, prompt_ids, arguments, quiet=True)
        return 0
    show_remarks()
    decoded = decode(lm, prompt_ids, arguments)
    for picture in arguments.picture:
        draw(picture, decoded)
    if arguments.json:
        write_json(as_json(decoded), allow_nan=False)
    else:
        report(decoded)
    if decoded.difference is not None:
        raise explained(decoded.difference, dtype_of(lm))
    return 0


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The decoding options as arguments of `freedave.generate`, which checks them, without `max_new_tokens`."""
    return {name: getattr(arguments, name) for name in OPTION_NAMES}


def dtype_of(lm: DiffusionLM) -> str:
    """The name of the weights' dtype."""
    return str(next(lm.model.parameters()).dtype).removeprefix("torch.")


def explained(difference: LosslessnessError, dtype: str) -> LosslessnessError:
    """What to do about a difference, where rounding may be the reason."""
    if dtype == "float32":
        return difference
    remedy = f"in {dtype} a near tie can round to either side; --dtype float32 rules that out"
    return LosslessnessError(f"{difference} ({remedy})", difference.output, difference.static)


def encode_prompt(lm: DiffusionLM, arguments: argparse.Namespace) -> list[int]:
    """The prompt as token ids; raises ValueError for one that the tokenizer cannot write."""
    if arguments.prompt_ids is not None:
        return list(arguments.prompt_ids)
    if lm.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer: give the prompt as --prompt-ids 1,2,3")
    unknown = [c for c in dict.fromkeys(arguments.prompt) if not knows(lm.tokenizer, c)]
    if unknown:
        raise ValueError(f"the tokenizer of {arguments.model} does not know {', '.join(map(repr, unknown))}")
    return list(lm.tokenizer(arguments.prompt)["input_ids"])


def knows(tokenizer: Any, character: str) -> bool:
    """Whether the tokenizer can write a character: neither an error, nor nothing, nor the unknown token."""
    try:
        token_ids = tokenizer(character, add_special_tokens=False)["input_ids"]
    except Exception:  # the tokenizers library raises plain Exception where there is no unknown token
        return False
    # White space may be normalised away, which loses nothing.
    return tokenizer.unk_token_id not in token_ids and (bool(token_ids) or character.isspace())


def decode_text(lm: DiffusionLM, token_ids: list[int]) -> str:
    """Token ids as text, or as numbers where there is no tokenizer."""
    if lm.tokenizer is None:
        return "".join(f"{token_id} " for token_id in token_ids)
    return str(lm.tokenizer.decode(token_ids))


def decode(lm: DiffusionLM, prompt_ids: list[int], arguments: argparse.Namespace, *, quiet: bool = False) -> Decoded:
    """Decode with the settings of the command line, shown while it runs; statically too where they are compared."""
    input_ids = torch.tensor([prompt_ids], dtype=torch.int64)
    settings = {"max_new_tokens": arguments.max_new_tokens, **options_of(arguments)}
    compared = bool(arguments.check_lossless or arguments.picture)
    if compared:
        # What is slow once, a process's first forward or a shape's first step, would fall on the first of the two decodes.
        shapes = arguments.executor == "graph" or lm.device.type == "cuda"
        generate(lm, input_ids, **(settings if shapes else settings | {"max_new_tokens": 1}))
    with contextlib.nullcontext() if quiet else watch(lm, arguments) as watcher:
        try:
            output = generate(lm, input_ids, **settings, on_step=watcher, check_lossless=compared)
        except LosslessnessError as error:
            return Decoded(arguments, lm, prompt_ids, error.output, error.static, error)
    return Decoded(arguments, lm, prompt_ids, output, output.static, None)


def watch(lm: DiffusionLM, arguments: argparse.Namespace) -> Watcher:
    """Text in place where standard output is a terminal that can redraw, else a progress bar."""
    if arguments.stream and not arguments.json and can_redraw(sys.stdout):
        return StreamingText(
            arguments.max_new_tokens, lambda token_ids: decode_text(lm, token_ids), eos_token_ids=lm.eos_token_ids
        )
    return ProgressBar(arguments.max_new_tokens)


def draw(picture: str, decoded: Decoded) -> None:
    """The picture: static decoding and, if it was not static itself, the decode."""
    assert decoded.static is not None
    lm, arguments = decoded.lm, decoded.arguments
    block_length = arguments.block_length or lm.block_length or arguments.max_new_tokens
    traces = [Trace.of("static decoding", lm, decoded.static)]
    if arguments.draft_steps != 1:
        traces.append(Trace.of(decoded.name, lm, decoded.output))
    decode_picture(
        picture,
        traces,
        prompt_tokens=token_texts(lm, decoded.prompt_ids),
        first_block=first_block_of(lm, len(decoded.prompt_ids), block_length),
        block_length=block_length,
        title=lm.name,
    )


def report(decoded: Decoded) -> None:
    """The text on standard output; statistics on standard error, so that the text can be piped."""
    write(decoded.text)
    stats = decoded.output.stats
    lines = [
        f"{stats.tokens} tokens in {decoded.output.num_forwards} forwards: {stats.tokens_per_forward:.1f} tokens per "
        f"forward, {stats.total_seconds:.2f} s ({stats.forward_seconds:.2f} s in the model, "
        f"{stats.other_seconds:.2f} s outside it)"
    ]
    if decoded.static is not None:
        lines.append(
            f"identical to static decoding: {'yes' if decoded.difference is None else 'NO'} "
            f"(static {decoded.static.num_forwards} forwards, FreeDave {decoded.output.num_forwards})"
        )
    if decoded.arguments.verbose and stats.drafts_reason:
        lines.append(f"drafts: {stats.drafts_reason}")
    if decoded.arguments.picture:
        lines.append(f"pictures: {', '.join(decoded.arguments.picture)}")
    print("\n".join(lines), file=sys.stderr)


def as_json(decoded: Decoded) -> dict[str, Any]:
    """Everything there is to know about the decode, for programs."""
    output, static, arguments = decoded.output, decoded.static, decoded.arguments
    return {
        "model": decoded.lm.name,
        "prompt_ids": decoded.prompt_ids,
        "text": decoded.text,
        "token_ids": decoded.token_ids,
        "step_map": output.step_map[0].tolist(),
        "forward_map": output.forward_map[0].tolist(),
        **costs(output),
        "dtype": dtype_of(decoded.lm),
        "device": str(decoded.lm.device),
        "settings": {"max_new_tokens": arguments.max_new_tokens, **options_of(arguments)},
        "static": None if static is None else {"identical": decoded.difference is None, **costs(static)},
        "pictures": arguments.picture,
    }


def costs(output: DecodeOutput) -> dict[str, Any]:
    """Forwards, tokens and seconds of one decode."""
    stats = output.stats
    return {
        "num_forwards": output.num_forwards,
        **dataclasses.asdict(stats),
        "tokens_per_forward": stats.tokens_per_forward,
        "other_seconds": stats.other_seconds,
    }
