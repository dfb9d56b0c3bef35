"""Prompts of different lengths through `freedave.generate`, one result a prompt.

What calls this library from outside thinks in lists of requests, and in sequences that stop at their first end of
sequence. The only place here that knows how many sequences one call of `generate` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import freedave


@dataclass(frozen=True)
class Answer:
    """One prompt's decode. `token_ids`, `step_map` and `forward_map` have `max_new_tokens` entries, as `DecodeOutput` has.

    `difference` is what `check_lossless` found, None where the decodes were identical or not compared.
    """

    token_ids: list[int]
    step_map: list[int]
    forward_map: list[int]
    num_forwards: int
    tokens: int
    seconds: float
    difference: freedave.LosslessnessError | None = None

    def length(self, ends: Collection[int]) -> int:
        """How many tokens there are up to the first end of sequence, which is counted."""
        return next((i + 1 for i, token_id in enumerate(self.token_ids) if token_id in ends), len(self.token_ids))

    def before_end(self, ends: Collection[int]) -> list[int]:
        """The tokens before the first end of sequence."""
        kept = self.token_ids[: self.length(ends)]
        return kept[:-1] if kept and kept[-1] in ends else kept


def answer_prompts(
    lm: freedave.DiffusionLM,
    prompts: Sequence[Sequence[int]],
    *,
    on_step: Callable[[freedave.Commit], None] | None = None,
    **settings: Any,
) -> list[Answer]:
    """Decodes every prompt; `settings` are `freedave.generate`'s.

    Raises what `freedave.generate` raises, but for `LosslessnessError`: an answer carries its own.
    """
    answers = []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)], dtype=torch.int64)
        difference = None
        try:
            output = freedave.generate(lm, input_ids, on_step=on_step, **settings)
        except freedave.LosslessnessError as error:
            output, difference = error.output, error
        answers.append(
            Answer(
                token_ids=output.sequences[0, len(prompt) :].tolist(),
                step_map=output.step_map[0].tolist(),
                forward_map=output.forward_map[0].tolist(),
                num_forwards=output.num_forwards,
                tokens=output.stats.tokens,
                seconds=output.stats.total_seconds,
                difference=difference,
            )
        )
    return answers


def end_tokens(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """Ends of sequence as a list, however a model or a configuration writes them."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else [int(token_id) for token_id in eos_token_id]
