"""What a decode returns: sequences, steps, statistics; and what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from freedave.forward.reproducible_products import difference


class NonFiniteLogitsError(RuntimeError):
    """The model produced NaN or infinite logits at a position that had to be decoded.

    `sequences` are the indices of those it happened to. Where `generate` raises it, `output` holds what was decoded: the
    other sequences are whole; of a broken one, what was committed before, with the mask token and step -1 everywhere else.
    """

    def __init__(self, message: str, sequences: Sequence[int] = (), output: DecodeOutput | None = None) -> None:
        super().__init__(message)
        self.sequences = tuple(sequences)
        self.output = output


class LosslessnessError(RuntimeError):
    """A decode differs from static decoding; `.output` and `.static` hold both."""

    def __init__(self, message: str, output: DecodeOutput, static: DecodeOutput) -> None:
        super().__init__(message)
        self.output = output
        self.static = static


@dataclass(frozen=True)
class Commit:
    """What one forward committed of one sequence, as `on_step` receives it.

    Positions count from the sequence's first generated one; `sequence` is its index in the batch, `forward` counts the
    forwards of the whole batch. `length` is how long the answer can still be: `total`, and less once an end token or a stop
    sequence is committed, which may stand before positions of its block that earlier commits reported: those are no part of
    the answer. `tokens` counts what is committed of the answer. The answer's first `final` tokens are all committed, and no
    later commit changes or takes back one of them: they can be handed on. `log_probs`: where they are asked for, how
    probable each token was as it was committed. A sequence that breaks (`NonFiniteLogitsError`) is
    reported once more, finished and without positions.
    """

    forward: int
    steps: int
    positions: list[int]
    token_ids: list[int]
    step_of: list[int]
    tokens: int
    total: int
    finished: bool
    length: int
    final: int
    sequence: int = 0
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Differences:
    """How many of `positions` generated positions hold other tokens, and were committed at other static steps."""

    tokens: int
    steps: int
    positions: int


@dataclass
class DecodeStats:
    """Where forwards and time went.

    `accepted_lengths`: static steps committed by each forward, of all its sequences together; `accepted_by_sequence` those
    of each sequence, one entry for each forward that it took part in. `positions_computed`: token positions that went
    through the model in all forwards, the compute that was spent. Seconds are wall time, without that of `on_step`; the
    forward is the model's, with the vocabulary projection and the cache. `cache_bytes`: the key-value buffers, which hold
    every sequence once. `shapes`: how often each fixed shape of the graph executor ran. `drafts_chosen`: with
    `draft_steps="auto"` on the planned executor, how often each number of drafts and lookahead was chosen, and
    `drafts_reason`, a sentence: why. `own_static`: with
    `measure_own_static`, what differs from static decoding in its own shapes: 0 in float32; in 16 bits near ties round to
    either side.
    """

    accepted_lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    positions_computed: int = 0
    forward_seconds: float = 0.0
    total_seconds: float = 0.0
    accepted_by_sequence: list[list[int]] = field(default_factory=list)
    cache_bytes: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    drafts_chosen: dict[str, int] = field(default_factory=dict)
    drafts_reason: str = ""
    own_static: Differences | None = None

    @property
    def other_seconds(self) -> float:
        """Time outside the forward: ranking, drafting, verifying, committing and the loop itself."""
        return self.total_seconds - self.forward_seconds

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(len(self.accepted_lengths), 1)

    @property
    def forwards_by_sequence(self) -> list[int]:
        """How many forwards each sequence took part in."""
        return [len(accepted) for accepted in self.accepted_by_sequence]


@dataclass
class DecodeOutput:
    """A finished decode of B sequences. New positions are counted from the end of the prompt.

    `sequences [B, prompt + new]` int64: the prompts as they were given, padding included, then what was generated. An answer
    keeps the end token or the stop sequence that ends it; what follows is the first `eos_token_id`, or the mask token where
    there is none. `step_map [B, new]` int64: the static step at which each position was
    committed, -1 for never. `forward_map [B, new]` int64: the forward whose result committed it. `num_forwards`: forwards of
    the whole batch, prompts included. `log_probs [B, new]` float32, where they are asked for: the log-probability of each
    token when it was committed, NaN for what never was; among all tokens but the mask, or among those that it was drawn
    from. By the measure "prob" it is 0 where float32 has 1.0; "log_odds" is finer. `static`: the static decode that
    `check_lossless` compared with.
    """

    sequences: torch.Tensor
    step_map: torch.Tensor
    forward_map: torch.Tensor
    num_forwards: int
    stats: DecodeStats
    static: DecodeOutput | None = None
    log_probs: torch.Tensor | None = None


def count_differences(out: DecodeOutput, static: DecodeOutput) -> Differences:
    """Between two decodes of the same prompts."""
    new = out.step_map.shape[1]
    tokens = int((out.sequences[:, -new:] != static.sequences[:, -new:]).sum())
    return Differences(tokens, int((out.step_map != static.step_map).sum()), out.step_map.numel())


def compare_with_static(out: DecodeOutput, static: DecodeOutput) -> None:
    """Raises `LosslessnessError` at the first difference in tokens or steps."""
    prompt_length = out.sequences.shape[1] - out.step_map.shape[1]
    tokens, expected = out.sequences[:, prompt_length:], static.sequences[:, prompt_length:]
    different = (tokens != expected) | (out.step_map != static.step_map)
    if not bool(different.any()):
        return
    row, first = different.nonzero()[0].tolist()
    reason = difference()
    raise LosslessnessError(
        f"{int((tokens != expected).sum())} of {tokens.numel()} tokens differ from static decoding; the first difference is "
        f"at generated position {first} of sequence {row}: token {int(tokens[row, first])} at step "
        f"{int(out.step_map[row, first])}, statically token {int(expected[row, first])} at step "
        f"{int(static.step_map[row, first])}" + ("" if reason is None else f". {reason}"),
        out,
        static,
    )
