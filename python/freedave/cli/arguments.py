"""What can be given to each command, and what can be said of it before torch is imported: that takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from freedave.decode.options import Choice, DecodingOptions, Seed, Switch, WholeNumber, WholeNumberOrAuto
from freedave.picture import check_picture_path

# Written out, as the modules that they belong to import torch. tests/test_cli.py compares them.
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("block_causal", "full")

MOST = 2**31 - 1  # for every number: some libraries count in 32 bits
LAST_TOKEN_ID = 2**63 - 1  # of 64 bits; the model is asked later which ids it has


def whole_number(minimum: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
        if number > MOST:
            raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {number}")
        return number

    return parse


def whole_number_or_auto(text: str) -> int | str:
    """A type for argparse: a whole number of at least 1, or the word auto."""
    if text == "auto":
        return text
    try:
        int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a whole number, got {text!r}") from None
    return whole_number(1)(text)


def number(text: str) -> float:
    """A type for argparse: a number, which nan is not."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def share(text: str) -> float:
    """A type for argparse: a number between 0 and 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, got {text!r}")
    return value


def token_ids(text: str) -> list[int]:
    """A type for argparse: token ids between commas."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers like 1,2,3, got {text!r}") from None
    for token_id in ids:
        if not 0 <= token_id <= LAST_TOKEN_ID:
            raise argparse.ArgumentTypeError(f"{token_id} is no token id")
    return ids


def folder_of_tasks(text: str) -> str:
    """A type for argparse: a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no folder with task files at {text}")
    return text


def add_json_option(parser: Any) -> None:
    """Output for programs."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, and nothing else")


def add_model_options(parser: Any) -> None:
    """The model, and where and in which precision its weights are."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help='a checkpoint folder, a model in the Hugging Face cache, or "demo" for the embedded model',
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="auto is the checkpoint's; only float32 makes FreeDave identical to static decoding for certain "
        "(default: %(default)s)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where torch sees a GPU, else cpu)")
    group.add_argument("--revision", help="of a model in the Hugging Face cache (default: main)")


def add_decoding_options(parser: Any, max_new_tokens: str) -> None:
    """How to decode, as `DecodingOptions` says; `max_new_tokens` is the help of that option."""
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=whole_number(1), default=256, metavar="N", help=max_new_tokens)
    for option in fields(DecodingOptions):
        name, kind, text = f"--{option.name.replace('_', '-')}", option.metadata["kind"], option.metadata["help"]
        if option.default is not None:
            text += " (default: %(default)s)"
        given: dict[str, Any] = {"default": option.default, "help": text}
        group = decoding
        if option.name == "draft_steps":
            group = decoding.add_mutually_exclusive_group()
        if isinstance(kind, Choice):
            given["choices"] = kind.words
        elif isinstance(kind, Switch):
            given["action"] = argparse.BooleanOptionalAction
        else:
            types: dict[type, Callable[[str], Any]] = {
                WholeNumber: whole_number(1),
                Seed: whole_number(0),
                WholeNumberOrAuto: whole_number_or_auto,
            }
            given["type"] = types.get(type(kind), number)
            given["metavar"] = option.metadata["letter"]
        group.add_argument(name, **given)
        if option.name == "draft_steps":
            group.add_argument(
                "--static",
                dest="draft_steps",
                action="store_const",
                const=1,
                help="static decoding, the same as --draft-steps 1",
            )


def add_picture_option(parser: Any, default: tuple[str, ...], help: str) -> None:
    """Where to draw; checked before anything is decoded."""
    parser.add_argument("--picture", action="append", metavar="FILE", help=help)
    parser.set_defaults(check=check_pictures, default_pictures=default)


def check_pictures(arguments: argparse.Namespace) -> None:
    """Fills in the default, and raises ValueError for a picture that cannot be written."""
    arguments.picture = arguments.picture or list(arguments.default_pictures)
    for picture in arguments.picture:
        check_picture_path(picture)


def nothing_to_check(_: argparse.Namespace) -> None:
    """For commands whose arguments argparse checks alone."""


def add_demo(commands: Any) -> None:
    """`freedave demo`."""
    parser = commands.add_parser(
        "demo",
        help="decode held-out problems with the embedded model, statically and with FreeDave",
        description="Decode held-out problems with the embedded model: static decoding, FreeDave with as many drafts as is "
        "fastest, and with fixed numbers of nested (as published), recycled, pooled and pipelined drafts. Exit code 1 if "
        "any decode differs from static decoding.",
    )
    positive = whole_number(1)
    parser.add_argument("--problems", type=positive, default=25, metavar="N", help="a task (default: %(default)s)")
    parser.add_argument(
        "--draft-steps", type=whole_number(2), nargs="+", default=[8, 16], metavar="K", help="drafts (default: 8 16)"
    )
    parser.add_argument("--block-length", type=positive, default=16, metavar="L", help="(default: %(default)s)")
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="block_causal",
        help="the embedded model was trained for both (default: %(default)s with an exact cache; full: no cache)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch (default: torch's own choice)")
    add_picture_option(
        parser,
        ("demo.png", "demo.html"),
        help="where to draw the worked example, .png or .html; may be repeated (default: demo.png and demo.html)",
    )
    add_json_option(parser)


def add_generate(commands: Any) -> None:
    """`freedave generate`."""
    parser = commands.add_parser(
        "generate",
        help="decode a prompt",
        description="Decode a prompt. The text goes to standard output, the statistics to standard error.",
        epilog="example: freedave generate demo --prompt '48392+7715=' --check-lossless --picture decode.html",
    )
    add_model_options(parser)
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="each of the processes that torchrun has started holds its share of the weights: "
        "torchrun --nproc-per-node 2 -m freedave.cli generate MODEL --tensor-parallel ...",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-ids", type=token_ids, metavar="IDS", help="token ids instead of text: 1,2,3")

    add_decoding_options(parser, max_new_tokens="(default: %(default)s)")

    output = parser.add_argument_group("output")
    output.add_argument("--check-lossless", action="store_true", help="also decode statically and compare")
    output.add_argument(
        "-v", "--verbose", action="store_true", help="with --draft-steps auto: say what was chosen, and why"
    )
    add_picture_option(
        output,
        (),
        help="draw the decode order next to static decoding's, as .png or .html; may be repeated",
    )
    add_json_option(output)
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show tokens appearing in place, on a terminal (default: yes)",
    )


def add_evaluate(commands: Any) -> None:
    """`freedave evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="accuracy and speed on tasks of lm-evaluation-harness",
        description="Evaluate on tasks of lm-evaluation-harness: accuracy, and beside it what the decodes cost. Needs "
        "pip install 'freedave-kernels[lm-eval]'.",
        epilog="example: freedave evaluate demo --limit 10 --check-lossless. The harness's own command line, with all its "
        "options: python -m freedave.integrations.lm_eval --model freedave --model_args pretrained=demo --tasks gsm8k",
    )
    positive = whole_number(1)
    add_model_options(parser)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        default=["freedave_demo"],
        metavar="TASK",
        help="names, or YAML files (default: freedave_demo, the embedded model's four)",
    )
    tasks.add_argument(
        "--include-path", type=folder_of_tasks, metavar="DIR", help="a folder with task files of your own"
    )
    tasks.add_argument("--limit", type=positive, metavar="N", help="requests a task (default: all)")
    tasks.add_argument(
        "--num-fewshot", type=whole_number(0), metavar="N", help="worked examples in the prompt (default: the task's)"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="prompts as conversations, for chat models")
    tasks.add_argument(
        "--mc-num", type=positive, default=128, metavar="N", help="noise samples of a likelihood (default: 128)"
    )
    add_decoding_options(parser, max_new_tokens="where a task does not say (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="B", help="prompts a batch (default: %(default)s)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--check-lossless",
        nargs="?",
        type=share,
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="also decode statically and compare; 0.1: every tenth request (default without a number: all)",
    )
    output.add_argument("--output", metavar="FILE", help="write the harness's results, every answer included, as JSON")
    output.add_argument(
        "--json", action="store_true", help="the results without answers on standard output, and nothing else"
    )
    parser.set_defaults(check=check_evaluate)


def check_evaluate(arguments: argparse.Namespace) -> None:
    """An evaluation may take hours: what cannot be written is said first."""
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"cannot write {arguments.output!r}: there is no such folder")


def add_convert(commands: Any) -> None:
    """`freedave convert`."""
    parser = commands.add_parser(
        "convert",
        help="rewrite a published checkpoint in transformers' native layout",
        description="Rewrite a published checkpoint, of any family that is known, in the layout of its native transformers "
        "class, which loads without remote code. Nothing is downloaded or overwritten.",
        epilog="example: freedave convert GSAI-ML/LLaDA-8B-Instruct llada-native",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, or a model in the Hugging Face cache")
    parser.add_argument("destination", metavar="DST", help="a new folder, or an empty one")
    parser.add_argument("--revision", help="of a model in the Hugging Face cache (default: main)")
    parser.set_defaults(check=nothing_to_check)


def add_inspect(commands: Any) -> None:
    """`freedave inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="what a checkpoint is and what decoding it will use, without loading weights",
        description="Family; mask, ends of sequence and block length, and which file says so; keys that are not known; "
        "memory; options to start with. Reads no weights, and the folder may hold none yet.",
        epilog="example: freedave inspect JetLM/SDAR-8B-Chat-b16",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or a model in the Hugging Face cache")
    parser.add_argument("--revision", help="of a model in the Hugging Face cache (default: main)")
    add_json_option(parser)
    parser.set_defaults(check=nothing_to_check)


def add_info(commands: Any) -> None:
    """`freedave info`."""
    parser = commands.add_parser(
        "info",
        help="versions, backends, devices, and what is missing",
        description="Versions, the build, backends, devices, the embedded model; what is missing and how to get it.",
    )
    add_json_option(parser)
    parser.set_defaults(check=nothing_to_check)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "demo": add_demo,
    "generate": add_generate,
    "evaluate": add_evaluate,
    "convert": add_convert,
    "inspect": add_inspect,
    "info": add_info,
}
"""Each command's name, which is also its module's, and what adds its parser."""
