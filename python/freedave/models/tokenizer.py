"""The tokenizer of a checkpoint folder, from transformers' own classes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from freedave.models.config_reader import read_json
from freedave.models.errors import CheckpointError, first_line
from freedave.models.transformers_logging import only_errors


def load_tokenizer(folder: Path, twin: str | None = None) -> tuple[Any, str | None]:
    """(the tokenizer, with its chat template) or (None, why there is none).

    `twin` names the transformers class that equals a tokenizer which the family publishes as code. Code in the folder is
    never run: without a twin, tokenizer.json is used, and without that there is no tokenizer.

    Raises:
        CheckpointError: the tokenizer's files are broken.
    """
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    name = settings.get("tokenizer_class")
    whole = (folder / "tokenizer.json").is_file()
    if not settings and not whole:
        return None, "no tokenizer files"
    if name is not None and hasattr(transformers, name):
        tokenizer_class = transformers.AutoTokenizer
    elif twin is not None and (whole or (folder / "vocab.json").is_file()):
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
            return tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False), None
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
