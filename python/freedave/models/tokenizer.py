"""The tokenizer of a checkpoint folder, from transformers' own classes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from freedave.models.config_reader import read_json
from freedave.models.errors import CheckpointError, first_line
from freedave.models.files import is_file
from freedave.models.transformers_logging import only_errors

# What transformers opens without a look at what it is.
FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(folder: Path, twin: str | None = None) -> tuple[Any, str | None]:
    """(the tokenizer, with its chat template) or (None, why there is none).

    `twin` names the transformers class that equals a tokenizer which the family publishes as code. Code in the folder is
    never run: without a twin, tokenizer.json is used, and without that there is no tokenizer.

    Raises:
        CheckpointError: the tokenizer's files are broken.
    """
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    name = settings.get("tokenizer_class")
    there = {file for file in FILES if is_file(folder / file)}
    whole = "tokenizer.json" in there
    if not settings and not whole:
        return None, "no tokenizer files"
    if isinstance(name, str) and hasattr(transformers, name):
        tokenizer_class: Any = transformers.AutoTokenizer
    elif twin is not None and (whole or "vocab.json" in there):
        tokenizer_class = getattr(transformers, twin)
    elif whole:
        tokenizer_class = transformers.PreTrainedTokenizerFast
    else:
        return (
            None,
            f"its tokenizer, {name}, is code in the checkpoint, which is never run, and there is no tokenizer.json",
        )
    try:
        with only_errors():  # transformers remarks that a twin has another name than the file says
            tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    _check_added_tokens(folder, tokenizer, settings.get("added_tokens_decoder"))
    return tokenizer, None


def _check_added_tokens(folder: Path, tokenizer: Any, declared: Any) -> None:
    """The tokenizers library numbers added tokens itself; where the vocabulary is not the whole one, differently."""
    indices: dict[str, set[str]] = {}
    for index, entry in declared.items() if isinstance(declared, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            indices.setdefault(entry["content"], set()).add(index)
    for content, known in indices.items():
        found = tokenizer.convert_tokens_to_ids(content)
        if str(found) not in known:
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be loaded: it gives {content!r} the id {found}, and tokenizer_config.json "
                f"says {' or '.join(sorted(known))}; is the vocabulary complete?"
            )
