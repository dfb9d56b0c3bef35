"""What a picture shows, whatever its format: traces of decodes, and their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from freedave.decode.output import DecodeOutput
    from freedave.models.diffusion_lm import DiffusionLM

END_OF_SEQUENCE = "∎"
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"})
DISCREET = frozenset("␣↵␍⇥" + END_OF_SEQUENCE)
LEGEND = f"number and colour: forward that committed the token · {END_OF_SEQUENCE} end of sequence"


@dataclass(frozen=True)
class Trace:
    """One decode as a picture shows it: when each token was committed, and what the whole cost.

    `tokens`, `steps` and `forwards` have one entry for each generated position; steps and forwards count from 0 and are
    -1 where nothing was committed (after the end of the sequence). `accepted` has one entry for each forward.
    """

    name: str
    tokens: tuple[str, ...]
    steps: tuple[int, ...]
    forwards: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, name: str, lm: DiffusionLM, output: DecodeOutput) -> Trace:
        """The trace of `output`, a decode of one sequence by `lm`."""
        steps = output.step_map[0].tolist()
        token_ids = output.sequences[0, -len(steps) :].tolist()
        return cls(
            name=name,
            tokens=token_texts(lm, token_ids),
            steps=tuple(steps),
            forwards=tuple(output.forward_map[0].tolist()),
            accepted=tuple(output.stats.accepted_lengths),
            seconds=output.stats.total_seconds,
        )

    @property
    def num_forwards(self) -> int:
        """How many model forwards the decode took."""
        return len(self.accepted)

    @property
    def num_committed(self) -> int:
        """How many positions were committed."""
        return sum(step >= 0 for step in self.steps)

    def same_as(self, other: Trace) -> bool:
        """Whether both committed the same tokens at the same static steps."""
        return self.tokens == other.tokens and self.steps == other.steps


@dataclass(frozen=True)
class Picture:
    """What is drawn, whatever the format."""

    traces: tuple[Trace, ...]
    prompt_tokens: tuple[str, ...]
    first_block: int
    block_length: int
    title: str

    @property
    def about(self) -> str:
        prompt = shorten("".join(self.prompt_tokens).translate(VISIBLE), 100)
        title = f"{self.title} · " if self.title else ""
        return f"{title}prompt {prompt} · block length {self.block_length}"

    @property
    def last_forward(self) -> int:
        """The end of the colour scale: the last forward of the longest decode, from 0."""
        return max(trace.num_forwards for trace in self.traces) - 1

    @property
    def most_accepted(self) -> int:
        return max(max(trace.accepted, default=1) for trace in self.traces)

    def blocks(self) -> list[range]:
        """The blocks to draw as ranges of generated positions; negative ones are the end of the prompt.

        Up to the last block in which something was committed: after the end of a sequence there is nothing to see.
        """
        total = len(self.traces[0].steps)
        last = max((i for trace in self.traces for i, step in enumerate(trace.steps) if step >= 0), default=0)
        starts = range(self.first_block - len(self.prompt_tokens), last + 1, self.block_length)
        return [range(start, min(start + self.block_length, total)) for start in starts]

    def token(self, trace: Trace, position: int) -> str:
        """The token at a generated position, or of the prompt where the position is negative."""
        return trace.tokens[position] if position >= 0 else self.prompt_tokens[position]


def first_block_of(lm: DiffusionLM, prompt_length: int, block_length: int) -> int:
    """Where the block of the first generated token begins.

    Block-causal models count blocks from position 0, full attention counts them from the end of the prompt.
    """
    return prompt_length // block_length * block_length if lm.attention == "block_causal" else prompt_length


def token_texts(lm: DiffusionLM, token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token alone (its number where there is no tokenizer)."""

    def text(token_id: int) -> str:
        if token_id in lm.eos_token_ids:
            return END_OF_SEQUENCE
        return f"#{token_id}" if lm.tokenizer is None else lm.tokenizer.decode([token_id])

    return tuple(map(text, token_ids))


def headline(traces: Sequence[Trace]) -> str:
    """The result in one line: the last trace compared with the first."""
    first, last = traces[0], traces[-1]
    if first is last:
        return f"{first.num_committed} tokens in {first.num_forwards} forwards, {first.seconds:.2f} s"
    same = "The same" if last.same_as(first) else "NOT the same:"
    return (
        f"{same} {first.num_committed} tokens in {last.num_forwards} forwards instead of {first.num_forwards} "
        f"({first.num_forwards / last.num_forwards:.1f}x fewer), {last.seconds:.2f} s instead of {first.seconds:.2f} s "
        f"({speed_up(first.seconds, last.seconds)})"
    )


def speed_up(before: float, after: float) -> str:
    """The ratio of two times in words; drafts can cost more than they save."""
    return f"{before / after:.1f}x faster" if after <= before else f"{after / before:.1f}x slower"


def cost(trace: Trace) -> str:
    """What one decode took, in a few words."""
    per_forward = trace.num_committed / max(trace.num_forwards, 1)
    return f"{trace.num_forwards} forwards · {trace.seconds:.2f} s · {per_forward:.1f} tokens per forward"


def label(token: str) -> str:
    """A token as a cell shows it: white space made visible, control characters replaced."""
    return "".join(c if c.isprintable() else "�" for c in token.translate(VISIBLE)) or "�"


def spoken(token: str) -> str:
    """A token in words where a symbol would not be read aloud."""
    return "end of sequence" if token == END_OF_SEQUENCE else repr(token)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
