"""Prompts of different lengths through `freedave.generate`, one result a prompt.

What calls this library from outside thinks in lists of requests, and in sequences that stop at their first end of
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from freedave.decode.generate import generate
from freedave.decode.output import Commit, LosslessnessError
from freedave.models.diffusion_lm import DiffusionLM


@dataclass(frozen=True)
class Answer:
    """One prompt's decode. `token_ids`, `step_map` and `forward_map` have `max_new_tokens` entries, as `DecodeOutput` has;
    `num_forwards` are those that it took part in, `seconds` its share of its batch's.

    `difference` is what `check_lossless` found, None where the decodes were identical or not compared.
    """

    token_ids: list[int]
    step_map: list[int]
    forward_map: list[int]
    num_forwards: int
    tokens: int
    seconds: float
    difference: LosslessnessError | None = None

    def length(self, ends: Collection[int]) -> int:
        """How many tokens there are up to the first end of sequence, which is counted.

        A decode that a stop sequence ended has none: then those that were committed.
        """
        ended = next((i + 1 for i, token_id in enumerate(self.token_ids) if token_id in ends), len(self.token_ids))
        committed = next((i for i, step in enumerate(self.step_map) if step < 0), len(self.step_map))
        return min(ended, committed)

    def before_end(self, ends: Collection[int]) -> list[int]:
        """The tokens before the first end of sequence."""
        kept = self.token_ids[: self.length(ends)]
        return kept[:-1] if kept and kept[-1] in ends else kept


def answer_prompts(
    lm: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    *,
    on_step: Callable[[Commit], None] | None = None,
    **settings: Any,
) -> list[Answer]:
    """Decodes the prompts as one batch; `settings` are `freedave.generate`'s.

    Raises what `freedave.generate` raises, but for `LosslessnessError`: an answer carries its own.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give at least one token")
    width = max(map(len, prompts))
    filler = prompts[0][0]  # never seen: any token will do
    input_ids = torch.tensor([[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    difference = None
    try:
        output = generate(lm, input_ids, attention_mask=attention_mask, on_step=on_step, **settings)
    except LosslessnessError as error:
        output, difference = error.output, error
    forwards = output.stats.forwards_by_sequence
    tokens = (output.step_map >= 0).sum(dim=1).tolist()
    return [
        Answer(
            token_ids=output.sequences[row, width:].tolist(),
            step_map=output.step_map[row].tolist(),
            forward_map=output.forward_map[row].tolist(),
            num_forwards=forwards[row],
            tokens=tokens[row],
            seconds=output.stats.total_seconds / len(prompts),
            difference=difference if difference is not None and _differs(difference, row) else None,
        )
        for row in range(len(prompts))
    ]


def _differs(difference: LosslessnessError, row: int) -> bool:
    output, static = difference.output, difference.static
    same_tokens = torch.equal(output.sequences[row], static.sequences[row])
    return not (same_tokens and torch.equal(output.step_map[row], static.step_map[row]))
