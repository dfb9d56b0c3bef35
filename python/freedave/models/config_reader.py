"""The JSON files of a checkpoint folder, read with every problem noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freedave.models.errors import CheckpointError, first_line
from freedave.models.files import is_file

_REQUIRED: Any = object()


class ConfigReader:
    """config.json, generation_config.json and the tokenizer's settings.

    The typed getters note what is missing or wrong in `problems` and return a harmless value, so that one error
    (`raise_problems`) can list everything.

    Raises:
        CheckpointError: config.json is missing, or one of the files is not a JSON object.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "config.json"
        if not is_file(self.file):
            raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder")
        self.values = read_json(self.file)
        self.generation = read_json(folder / "generation_config.json", optional=True)
        self.tokenizer = read_json(folder / "tokenizer_config.json", optional=True)
        self.problems: list[str] = []

    def raise_problems(self) -> None:
        """Raises a CheckpointError that lists the problems, if there are any."""
        if self.problems:
            raise CheckpointError(f"{self.file}: {'; '.join(self.problems)}", self.problems)

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1) -> int:
        """An integer; null counts as absent."""
        return self.checked_integer(key, self._value(key, default), minimum=minimum)

    def checked_integer(self, key: str, value: Any, *, minimum: int = 1) -> int:
        """A value that was found elsewhere, as `integer` treats those of config.json."""
        if value is _REQUIRED:  # noted already
            return minimum
        if not isinstance(value, int) or isinstance(value, bool):
            self.problems.append(f"{key} must be an integer, got {value!r}")
            return minimum
        if value < minimum:
            self.problems.append(f"{key} must be at least {minimum}, got {value}")
        return max(minimum, value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number; null counts as absent."""
        return self._positive(key, self._value(key, default))

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false; null counts as absent."""
        value = self._value(key, default)
        if isinstance(value, bool):
            return value
        if value is not _REQUIRED:
            self.problems.append(f"{key} must be true or false, got {value!r}")
        return False

    def expect(self, key: str, supported: Any, *, absent: Any) -> None:
        """Notes a problem unless the value is `supported`; `absent` is what a missing key means to the published code."""
        value = self.values.get(key)
        if (absent if value is None else value) == supported:
            return
        said = json.dumps(value) if value is not None else f"missing, which means {json.dumps(absent)}"
        self.problems.append(f"{key} is {said}, and only {json.dumps(supported)} is supported")

    def rope_theta(self) -> float:
        """The rotary base, where older or newer transformers wrote it; only unscaled rotary embeddings are supported."""
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.values.get(key) or {}
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            if kind != "default":
                self.problems.append(f"{key} asks for {kind!r} rotary embeddings, and only unscaled ones are supported")
            elif key == "rope_parameters" and "rope_theta" in rope:
                return self._positive(f"{key}.rope_theta", rope["rope_theta"])
        return self.number("rope_theta")

    def special_token(self, name: str) -> int | None:
        """The id of the tokenizer's special token, such as "mask_token", where its files say it."""
        token = self.tokenizer.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            return None
        decoder = self.tokenizer.get("added_tokens_decoder")
        added = list(decoder.items()) if isinstance(decoder, dict) else []
        others = read_json(self.folder / "tokenizer.json", optional=True).get("added_tokens")
        added += [(entry.get("id"), entry) for entry in others or () if isinstance(entry, dict)]
        found = (index for index, entry in added if isinstance(entry, dict) and entry.get("content") == content)
        return next((int(index) for index in found if str(index).isdecimal()), None)

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
        if value is not _REQUIRED:
            self.problems.append(f"{key} must be a positive number, got {value!r}")
        return 1.0

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            self.problems.append(f"{key} missing")
        return default if value is None else value


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object; {} for an optional file that is not there."""
    if not is_file(file) and optional:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {first_line(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested too deeply to be read as JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values
