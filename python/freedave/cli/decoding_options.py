"""The options that `freedave generate` and `freedave evaluate` share: which model, and how it decodes."""

from __future__ import annotations

import argparse
from typing import Any

from freedave.settings import DECODING_OPTIONS


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
        help="auto (the checkpoint's), float32, bfloat16 or float16; only float32 makes FreeDave identical to static "
        "decoding for certain (default: %(default)s)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where torch sees a GPU, else cpu)")
    group.add_argument("--revision", help="of a model in the Hugging Face cache (default: main)")


def add_decoding_options(parser: Any, max_new_tokens: str) -> None:
    """How to decode; `max_new_tokens` is the help of that option."""
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help=max_new_tokens)
    drafts = decoding.add_mutually_exclusive_group()
    drafts.add_argument("--draft-steps", type=int, default=8, metavar="K", help="drafts a forward (default: 8)")
    drafts.add_argument(
        "--static",
        dest="draft_steps",
        action="store_const",
        const=1,
        help="static decoding, the same as --draft-steps 1",
    )
    decoding.add_argument("--block-length", type=int, metavar="L", help="(default: the model's)")
    decoding.add_argument("--tokens-per-step", type=int, default=1, metavar="N", help="(default: %(default)s)")
    decoding.add_argument("--order", default="confidence", help="confidence or left_to_right (default: %(default)s)")
    decoding.add_argument("--threshold", type=float, metavar="P", help="a step commits all tokens this confident")
    decoding.add_argument("--drafting", default="recycled", help="recycled or nested (default: %(default)s)")
    decoding.add_argument(
        "--lookahead-steps",
        type=int,
        metavar="N",
        help="compute only what each draft's next N steps can need: 1 is fastest on a CPU (default: K, fewest forwards)",
    )
    decoding.add_argument(
        "--cache",
        default="auto",
        help="auto (exact for block-causal models, none for full attention), none, prefix or dual (default: %(default)s)",
    )
    decoding.add_argument(
        "--executor",
        default="auto",
        help="planned (computes least), graph (launches least) or auto: graph on a GPU (default: %(default)s)",
    )
    decoding.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the graph executor's layers go through torch.compile (default: on a GPU)",
    )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The decoding options as arguments of `freedave.generate`, which checks them, without `max_new_tokens`."""
    return {name: getattr(arguments, name) for name in DECODING_OPTIONS}
