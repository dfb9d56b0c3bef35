"""`freedave inspect`: what a checkpoint is, what decoding it will use and why, without loading its weights."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import Any

from freedave.cli.reporting import write, write_json
from freedave.models.inspection import Inspection, Setting, inspect_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Inspect, and say what was found."""
    found = inspect_checkpoint(arguments.model, revision=arguments.revision)
    if arguments.json:
        write_json(asdict(found) | {"folder": str(found.folder)})
    else:
        write(report(found, arguments.model, arguments.revision))
    return 0


def report(found: Inspection, model: str, revision: str | None) -> str:
    """For people: a line for each question."""
    logits = "logits shifted by one" if found.logits_shift else "logits aligned"
    block, native = found.block_length, found.family == found.native_class
    lines = {
        "folder": str(found.folder),
        "family": found.family if native else f"{found.family}, computed by {found.native_class}",
        "attention": f"{described(found.attention)}, {logits}",
        "mask": described(found.mask),
        "ends": ", ".join(described(end) for end in found.ends) or "none: every answer is as long as is asked for",
        "block": "the whole answer, unless another length is asked for" if block.value is None else described(block),
        "positions": str(found.max_positions),
        "tokenizer": found.tokenizer or f"none: {found.no_tokenizer}",
        "keys ignored": ", ".join(found.unknown_keys) or "none",
        "weights": weights(found),
        **({} if found.quantisation is None else {"quantised": found.quantisation}),
        "memory": memory(found),
        "start with": shlex.join(command(found, model, revision)),
    }
    text = [f"{name:<14} {line}" for name, line in lines.items()]
    return "\n".join([*text, *(f"{'warning':<14} {remark}" for remark in found.remarks)])


def described(setting: Setting) -> str:
    """A value, the token that it is, and where it was found."""
    token = "" if setting.token is None else f" {setting.token}"
    return f"{setting.value}{token} ({setting.origin})"


def weights(found: Inspection) -> str:
    """What is in the folder."""
    count = f"{found.parameters / 1e9:.2f} billion parameters"
    if found.parameters < 1e8:
        count = f"{found.parameters / 1e6:.2f} million parameters"
    if found.stored is None:
        return f"{count}; {found.no_weights}"
    files = "1 file" if found.stored.files == 1 else f"{found.stored.files} files"
    return f"{count}; {found.stored.tensors} tensors in {files}, {size(found.stored.bytes)}"


def memory(found: Inspection) -> str:
    """What loading and decoding take, before activations."""
    parts = [
        f"{dtype}: {size(needed['weights'])}, and {size(needed['keys_and_values'])} for each 1,000 positions"
        for dtype, needed in found.memory.items()
    ]
    if found.stored is not None:
        parts.append(f"while loading: {size(found.stored.largest_file)} more")
    return "; ".join(parts)


def size(count: int) -> str:
    """Three digits are enough, also of a tiny model."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def command(found: Inspection, model: str, revision: str | None) -> list[str]:
    """The suggested options, on a command line."""
    words: list[Any] = [
        "freedave",
        "generate",
        model,
        *(["--revision", revision] if revision else []),
        "--prompt",
        "...",
    ]
    for name, value in found.suggested.items():
        words += [f"--{name.replace('_', '-')}", value]
    return [str(word) for word in words]
