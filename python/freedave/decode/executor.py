"""What runs the forwards of a `Decoder`: an executor, of which there are two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from freedave.decode.sequence import Sequence
from freedave.decode.settings import Settings
from freedave_kernels.contract import RecordLayout


@dataclass(frozen=True)
class Found:
    """What a step found out about a sequence: a row of `DraftStep.record`, over a window of `window` positions.

    The row may end behind draft 0 where the other drafts stay on the device. With `Settings.log_probs`, those of the window
    stand at its end (`log_probs.read_behind`).
    """

    sequence: Sequence
    record: list[int]
    layout: RecordLayout
    window: int


class Executor(Protocol):
    """Runs the forwards of a batch of sequences and holds what they leave on the device."""

    positions_computed: int
    """Tokens that the model has computed."""

    @property
    def forward_seconds(self) -> float:
        """What all forwards took, as the host sees it."""

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value buffers."""

    @property
    def shapes(self) -> dict[str, int]:
        """How often each fixed shape ran."""

    @property
    def drafts_chosen(self) -> dict[str, int]:
        """How often each number of drafts, and lookahead where there is a choice, was chosen; empty where none is."""

    @property
    def drafts_reason(self) -> str:
        """Why, in a sentence."""

    def enter(self, index: int, slot: int, prompt: list[int], settings: Settings, key: int = 0) -> Sequence:
        """A new sequence in a free slot; its noise follows from `key`, where tokens are drawn."""

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, or was dropped; its slot is free. Not while a step is under way."""

    def launch(self, sequences: list[Sequence]) -> None:
        """Starts a step of sequences in order of arrival: one forward each, or a part of a prompt, or nothing."""

    def read(self) -> list[Found]:
        """What the step found out, which waits for it; sequences without a prediction in it are left out."""

    def advance(self, found: Found, forward: int) -> list[int]:
        """Commits that, and moves the sequence's window; returns the positions that were committed."""

    def settle(self) -> None:
        """All sequences that go on have advanced: the cache keeps what it keeps of the step."""
