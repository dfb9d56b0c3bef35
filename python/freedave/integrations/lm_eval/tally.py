"""What the decodes of an evaluation cost, and how many of them were compared with static decoding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

METRICS = {
    "tokens_per_forward": True,
    "tokens_per_second": True,
    "identical_to_static": True,
}
"""The metrics, and whether more is better."""


@dataclass(frozen=True)
class DecodingTally:
    """Sums over requests.

    `tokens` are those of the answers, each one's end of sequence included. `seconds` are those of the decodes, without the
    static ones that they were compared with.
    """

    requests: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compared: int = 0
    identical: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one forward committed on average."""
        return self.tokens / max(self.forwards, 1)

    def __add__(self, other: DecodingTally) -> DecodingTally:
        return DecodingTally(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def metrics(self) -> dict[str, float]:
        """The metrics that there is something to say about."""
        if not self.forwards:
            return {}
        metrics = {
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens / self.seconds,
        }
        if self.compared:
            metrics["identical_to_static"] = self.identical / self.compared
        return metrics

    def as_json(self) -> dict[str, Any]:
        """Sums and metrics."""
        return {**dataclasses.asdict(self), **self.metrics()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DecodingTally:
        """The sums of `as_json`."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
