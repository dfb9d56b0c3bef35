"""CheckpointError: a checkpoint that cannot be loaded, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

WRAPPING = (
    "The published module itself, loaded with transformers, may be wrapped: "
    "freedave.DiffusionLM(model, mask_token_id=..., attention=..., block_length=...)"
)
SHOWN = 6  # names of a kind in the message; `problems` has the rest


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what is wrong with which file, in one line.

    `problems` lists every problem on its own, also those that the message counts only.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(" ".join(message.split()))
        self.problems = tuple(problems) or (str(self),)

    @classmethod
    def listing(cls, what: str, problems: Mapping[str, Iterable[str]]) -> CheckpointError:
        """`problems`: names by kind, such as {"missing keys": [...]}; kinds without names are left out."""
        kinds = {kind: list(names) for kind, names in problems.items()}
        kinds = {kind: names for kind, names in kinds.items() if names}
        message = "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds.items())
        return cls(f"{what}: {message}", [f"{kind}: {name}" for kind, names in kinds.items() for name in names])


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def first_line(error: BaseException) -> str:
    """What other libraries say, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
