"""What a `Decoder` has done since it was made: the figures that an engine watches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DecoderMetrics:
    """None of the counts ever falls.

    `forwards`: steps that were polled. `tokens`: what they committed, without what was known to stand behind an answer's end.
    `accepted[n]`: how often a forward took a sequence `n` static steps further. `added`, `finished`, `failed` (their logits
    were not finite) and `dropped`: sequences; those that are being decoded are the others. `positions_computed`: token
    positions that went through the model. `forward_seconds`: in all forwards, as the host sees it.
    """

    forwards: int = 0
    tokens: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    added: int = 0
    finished: int = 0
    failed: int = 0
    dropped: int = 0
    positions_computed: int = 0
    forward_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Of the whole batch."""
        return self.tokens / max(self.forwards, 1)

    @property
    def mean_accepted(self) -> float:
        """Static steps that a forward took a sequence further."""
        return sum(steps * times for steps, times in self.accepted.items()) / max(self.accepted.total(), 1)
