"""The JSON files of a checkpoint folder, read with every problem noted."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freedave.integers import LARGEST
from freedave.models.errors import WRAPPING, CheckpointError, first_line
from freedave.models.files import is_file

_REQUIRED: Any = object()


class ConfigReader:
    """config.json, generation_config.json and the tokenizer's settings.

    The typed getters note what is missing or wrong in `problems` and return a harmless value, so that one error
    (`raise_problems`) can list everything. `remarks` are what whoever loads the checkpoint should be warned of.

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
        self.understood: set[str] = set()
        self.problems = [f"{key} is {value}, not a number" for key, value in _not_finite(self.values)]
        self.remarks: list[str] = []
        self._can_be_wrapped: list[bool] = []

    def raise_problems(self) -> None:
        """Raises a CheckpointError that lists the problems, if there are any."""
        if self.problems:
            hint = f". {WRAPPING}" if self._can_be_wrapped and all(self._can_be_wrapped) else ""
            raise CheckpointError(f"{self.file}: {'; '.join(self.problems)}{hint}", self.problems)

    def get(self, key: str) -> Any:
        """A value of config.json, None where it is missing or null; from here on the key counts as understood."""
        self.understood.add(key)
        return self.values.get(key)

    def refuse(self, key: str, reason: str, *, wrap: bool = True) -> None:
        """Notes that a key's value is not supported; `wrap`: wrapping the published module would help."""
        self.unsupported(f"{key} is {json.dumps(self.values[key])}: {reason}", wrap=wrap)

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
        if value > LARGEST:
            self.problems.append(f"{key} must be at most {LARGEST}, got a number of {len(str(value))} digits")
        return min(max(minimum, value), LARGEST)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number; null counts as absent."""
        return self.positive(key, self._value(key, default))

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
        value = self.get(key)
        if (absent if value is None else value) == supported:
            return
        said = json.dumps(value) if value is not None else f"missing, which means {json.dumps(absent)}"
        self.unsupported(f"{key} is {said}, and only {json.dumps(supported)} is supported")

    def unsupported(self, problem: str, *, wrap: bool = True) -> None:
        """Notes what is not supported; `wrap`: wrapping the published module would help."""
        self.problems.append(problem)
        self._can_be_wrapped.append(wrap)

    def special_token(self, name: str) -> int | None:
        """The id of the tokenizer's special token, such as "mask_token", where its files say it."""
        token = self.tokenizer.get(name) or read_json(self.folder / "special_tokens_map.json", optional=True).get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            return None
        decoder = self.tokenizer.get("added_tokens_decoder")
        added = list(decoder.items()) if isinstance(decoder, dict) else []
        others = read_json(self.folder / "tokenizer.json", optional=True).get("added_tokens")
        added += [(entry.get("id"), entry) for entry in others or () if isinstance(entry, dict)]
        found = (index for index, entry in added if isinstance(entry, dict) and entry.get("content") == content)
        return next((int(index) for index in found if str(index).isdecimal()), None)

    def positive(self, key: str, value: Any) -> float:
        """A value that was found elsewhere, as `number` treats those of config.json."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return float(value)
        noted = value is _REQUIRED or (isinstance(value, float) and not math.isfinite(value))
        if not noted:
            self.problems.append(f"{key} must be a positive number, got {value!r}")
        return 1.0

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is _REQUIRED:
            self.problems.append(f"{key} missing")
        return default if value is None else value


def _not_finite(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Where JSON holds Infinity or NaN, which Python reads; also inside of objects such as rope_parameters."""
    for key, value in values.items():
        inside = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        for place, entry in inside.items():
            if isinstance(entry, float) and not math.isfinite(entry):
                yield place, entry


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
