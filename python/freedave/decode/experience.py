"""What the decodes of a model leave to the next ones, where the number of drafts is chosen: it lives as long as the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from freedave.decode.acceptance import Chain
from freedave.decode.draft_choice import AHEAD, LEVELS, DraftChooser, Experience
from freedave.decode.sequence import ACCEPTED, STEPS
from freedave.decode.settings import Settings

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

_experience: WeakKeyDictionary[torch.nn.Module, Experience] = WeakKeyDictionary()


def chooser_for(lm: DiffusionLM, settings: Settings, levels: Sequence[int] = LEVELS) -> DraftChooser:
    """Chooses one of `levels` as the number of drafts, for a decode with these settings."""
    machine = settings.executor, settings.compile, settings.cache, str(lm.device), torch.get_num_threads()
    # Whatever changes what static decoding commits next changes how well that is foretold.
    drafting = (
        settings.drafting,
        settings.cache,
        settings.block_length,
        settings.tokens_per_step,
        settings.threshold,
        settings.rule,
        settings.order,
        settings.measure,
        _step_of_temperature(settings.temperature),
        settings.top_k,
        settings.top_p,
        settings.min_p,
    )
    experience = _experience.setdefault(lm.model, Experience())
    if settings.executor == "graph":
        lookaheads: tuple[int, ...] = (0,)  # as far as the shape goes
    elif settings.pooled:  # what the pool knows says what lies ahead, so that looking there again finds no more drafts
        lookaheads = (1,)
    else:
        lookaheads = tuple(ahead for ahead in AHEAD if ahead <= settings.lookahead_steps)
    levels = [level for level in levels if level <= settings.draft_steps]
    return DraftChooser(experience, machine, drafting, levels, lookaheads)


def _step_of_temperature(temperature: float) -> float:
    """In steps, so that a server whose requests have temperatures of their own learns from all of them."""
    return max(round(5 * temperature) / 5, 0.1) if temperature > 0 else 0.0


def chain_of(drafts: int, record: Sequence[int], *, pooled: bool, ended: bool) -> Chain:
    """What the counters of `draft_step` say of a sequence's drafts. Where it has ended, the others were not wrong."""
    steps = record[STEPS]
    right = max(min(record[ACCEPTED] + 1 if pooled else steps, drafts, steps), 1)
    return Chain(right if ended else drafts, right, steps)
