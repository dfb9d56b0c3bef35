"""What `generate` was asked for, checked against the model before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from freedave.decode.acceptance import MOST_DRAFTS
from freedave.decode.options import DecodingOptions, Temperature, Threshold
from freedave.integers import as_int, as_token_ids
from freedave_kernels.contract import DRAWN_MEASURES, MAX_POOL_STATES, POOLED_DRAFTINGS

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# Windows of pooled drafts show what 2 K static steps can reach, and so many more blocks. A walk goes over what it knows, and
# pipelining enters later blocks early; with fewer blocks, both find fewer drafts (measured with the embedded model).
MORE_BLOCKS = {"pooled": 1, "pipelined": 4}

# What positions are ranked by where nobody says: the order of float64 probabilities, of which many are 1.0 in float32.
MEASURE = "log_odds"
# The rules of a threshold that is no probability to reach or to exceed, and what confidences are for each.
NEEDED_MEASURE = {"factor": "prob", "entropy_bound": "neg_entropy"}


@dataclass(frozen=True)
class Settings:
    """A decode's settings, resolved: nothing is None that the model or the prompt decides."""

    max_new_tokens: int
    draft_steps: int
    """K; the most that a forward may have where drafts are chosen."""
    lookahead_steps: int
    """The same of the lookahead."""
    block_length: int
    tokens_per_step: int
    order: str
    threshold: float | None
    """A probability, or the number of `rule`."""
    drafting: str
    """As asked for, but "pooled" where "pipelined" would be that, and "nested" where static decoding is asked for."""
    cache: str
    """ "exact", "none", "prefix" or "dual"."""
    eos_token_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...]
    aligned_at_zero: bool
    """Whether blocks are aligned at position 0 (block-causal attention) or at the end of the prompt."""
    max_positions: int | None = None
    """What the model has; a block that would reach beyond is cut short there. None: there is no limit."""
    prefill_chunk: int | None = None
    """Prompt tokens that a forward stores at most, where it need not store all. None: there is no limit."""
    executor: str = "planned"
    """ "planned" or "graph"."""
    compile: bool | None = None
    """Whether the graph executor's layers go through torch.compile; None: on a GPU."""
    active_drafts: int | None = None
    """How many of the graph executor's drafts count; None: all."""
    rule: str = "threshold"
    """What the threshold bounds."""
    measure: str = MEASURE
    """Of confidences, as `predict_tokens` has it."""
    temperature: float = 0.0
    """0, or what logits are divided by where tokens are drawn."""
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    log_probs: bool = False
    """Whether each token's log-probability is kept, as it was when it was committed."""
    choose_drafts: bool = False
    """Whether each forward has as many drafts, and as long a lookahead, as is expected to be fastest (`draft_choice.py`)."""

    def static(self, *, own_shapes: bool = False) -> Settings:
        """The same decode, one step a forward.

        The graph executor computes the same shapes, with one draft that counts: in 16 bits a product rounds otherwise with
        other numbers of rows. `own_shapes`: those of one draft.
        """
        if self.executor == "graph" and not own_shapes:
            return dataclasses.replace(self, active_drafts=1, choose_drafts=False)
        return dataclasses.replace(self, draft_steps=1, lookahead_steps=1, drafting="nested", choose_drafts=False)

    @property
    def least_confidence(self) -> float | None:
        """The threshold as `step_rule` compares confidences with it."""
        if self.threshold is None or self.rule in NEEDED_MEASURE:
            return self.threshold
        least = math.nextafter(self.threshold, math.inf) if self.rule == "strict" else self.threshold
        return least if self.measure == "prob" else least_log_odds(least)

    @property
    def step_rule(self) -> str:
        """The rule as `draft_step` has it: what must exceed a threshold reaches the next float64."""
        return "threshold" if self.rule == "strict" else self.rule

    @property
    def draws(self) -> bool:
        """Whether tokens may be drawn."""
        return self.temperature > 0

    @property
    def truncation(self) -> dict[str, float]:
        """What tokens are drawn from, as `logit_floor` takes it; nothing: from all."""
        given = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def pooled(self) -> bool:
        """Whether what was forwarded is kept, so that no state is forwarded twice."""
        return self.drafting in POOLED_DRAFTINGS

    @property
    def pooled_end(self) -> int | None:
        """The end token behind which pooled drafts do not go on."""
        return next(iter(self.eos_token_ids), None)

    @property
    def pool_states(self) -> int:
        """How many states a sequence's pool holds. With fewer, forwards are taken that could be spared; on the embedded model
        nothing is gained beyond what kernels take (forwards with 64 and 96 states differ by 0.4 % at most)."""
        states = max(48, 6 * self.draft_steps) if self.drafting == "pipelined" else max(16, 3 * self.draft_steps)
        return min(states, MAX_POOL_STATES)

    def drafted_length(self, draft_steps: int) -> int:
        """How far so many drafts may go, counted from the first block that is not complete, where they are pooled."""
        steps = 2 * draft_steps * self.tokens_per_step
        return (math.ceil(steps / self.block_length) + MORE_BLOCKS[self.drafting]) * self.block_length

    def pool_length(self, capacity: int) -> int:
        """The longest window of a sequence of at most `capacity` positions, where drafts are pooled, in whole blocks.

        It may begin with complete blocks, but no more than drafts go over.
        """
        return (
            math.ceil(min(2 * self.drafted_length(self.draft_steps), capacity) / self.block_length) * self.block_length
        )

    @property
    def one_block(self) -> bool:
        """Whether a window is one block, and the cache is refreshed for each."""
        return self.cache in ("prefix", "dual")

    @property
    def blocks_per_chunk(self) -> int | None:
        """How many blocks of a prompt a forward stores at most, one at least; None: there is no limit."""
        return None if self.prefill_chunk is None else max(self.prefill_chunk // self.block_length, 1)

    def first_block(self, prompt_length: int) -> int:
        """Where the block with the first generated position begins."""
        return prompt_length // self.block_length * self.block_length if self.aligned_at_zero else prompt_length

    def sequence_length(self, prompt_length: int) -> int:
        """Prompt and generated positions, up to the end of the last block, or of the model's positions within it."""
        length = prompt_length + self.max_new_tokens
        if not self.aligned_at_zero:
            return length
        whole = math.ceil(length / self.block_length) * self.block_length
        return whole if self.max_positions is None else max(length, min(whole, self.max_positions))


@dataclass(frozen=True)
class SequenceSettings:
    """What a sequence of a `Decoder` may have of its own, as `generate` takes it. None: what the decoder's settings say."""

    max_new_tokens: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    """What ends it; (): nothing."""
    stop_sequences: Sequence[Sequence[int]] | None = None
    threshold: float | None = None
    """Of the settings' rule; above 1 for none where that is a probability."""
    temperature: float | None = None
    """Where the decoder's settings have one above 0; 0: this sequence's tokens are not drawn."""


def least_log_odds(threshold: float) -> float:
    """The log-odds from which on a probability is at least `threshold`, in float64: 1 where its softmax is."""
    if threshold <= 0:
        return -math.inf
    if threshold >= 1:
        return 53 * math.log(2) if threshold == 1 else math.inf
    return math.log(threshold) - math.log1p(-threshold)


def check_prompts(lm: DiffusionLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts' token ids, without padding."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
        kind = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 tensor, got {kind}")
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must have shape [B, prompt] with B at least 1, got {tuple(input_ids.shape)}")
    rows = input_ids.tolist()
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
            raise ValueError(f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {shape}")
        rows = [_unpadded(b, *pair) for b, pair in enumerate(zip(rows, (attention_mask != 0).tolist(), strict=True))]
    return [check_prompt(lm, row, "the prompt" if len(rows) == 1 else f"prompt {b}") for b, row in enumerate(rows)]


def check_prompt(lm: DiffusionLM, prompt: Sequence[int] | torch.Tensor, which: str = "the prompt") -> list[int]:
    """One prompt's token ids; raises TypeError or ValueError naming it by `which`."""
    try:
        token_ids = list(as_token_ids(prompt))
    except TypeError as error:
        raise TypeError(f"{which}: {error}") from None
    if not token_ids:
        raise ValueError(f"{which} is empty: give at least one token")
    if lm.mask_token_id in token_ids:
        position = token_ids.index(lm.mask_token_id)
        raise ValueError(f"{which} holds the mask token (id {lm.mask_token_id}) at position {position}; remove it")
    if min(token_ids) < 0 or (lm.vocab_size is not None and max(token_ids) >= lm.vocab_size):
        raise ValueError(
            f"{which} holds token ids from {min(token_ids)} to {max(token_ids)}, but the model's vocabulary has "
            f"{lm.vocab_size} tokens; was it tokenized for another model?"
        )
    return token_ids


def check_length(lm: DiffusionLM, settings: Settings, prompt_length: int) -> int:
    """Positions that a prompt and its answer need; raises ValueError where the model has fewer."""
    length = settings.sequence_length(prompt_length)
    if lm.max_positions is not None and length > lm.max_positions:
        raise ValueError(
            f"the prompt ({prompt_length} tokens) and max_new_tokens ({settings.max_new_tokens}) need {length} positions, "
            f"but the model has {lm.max_positions}; shorten one of them"
        )
    return length


def _unpadded(index: int, tokens: list[int], visible: list[bool]) -> list[int]:
    """The one run of visible tokens; padding stands on its left or on its right."""
    count = sum(visible)
    begin = visible.index(True) if count else 0
    if not all(visible[begin : begin + count]):
        raise ValueError(f"attention_mask of prompt {index} has a hole: padding may stand on the left and right only")
    return tokens[begin : begin + count]


def resolve_settings(
    lm: DiffusionLM,
    prompt_length: int,
    max_new_tokens: int,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    prefill_chunk: int | None = 512,
    log_probs: bool = False,
    **options: Any,
) -> Settings:
    """What `generate` does when it is asked for this.

    Args:
        prompt_length: that of the longest prompt, which has to fit into the model's positions with its answer.
        max_new_tokens, eos_token_id, stop_sequences, prefill_chunk, log_probs: as in `generate`.
        options: those of `DecodingOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    chosen = DecodingOptions(**options)
    max_new_tokens = as_int("generate", "max_new_tokens", max_new_tokens, minimum=1)
    if prefill_chunk is not None:
        prefill_chunk = as_int("generate", "prefill_chunk", prefill_chunk, minimum=1)
    executor = _executor(lm, chosen.executor, chosen.compile)
    draft_steps = chosen.draft_steps
    if draft_steps == "auto":
        draft_steps = MOST_DRAFTS
    settings = Settings(
        max_new_tokens=max_new_tokens,
        draft_steps=draft_steps,
        lookahead_steps=min(chosen.lookahead_steps or draft_steps, draft_steps),
        block_length=chosen.block_length or lm.block_length or max_new_tokens,
        tokens_per_step=chosen.tokens_per_step,
        order=chosen.order,
        threshold=chosen.threshold,
        rule=chosen.rule,
        measure=chosen.measure or NEEDED_MEASURE.get(chosen.rule, MEASURE),
        drafting=chosen.drafting,
        cache=_cache(lm, chosen.cache),
        eos_token_ids=lm.eos_token_ids if eos_token_id is None else as_token_ids(eos_token_id),
        stop_sequences=tuple(as_token_ids(stop) for stop in stop_sequences),
        aligned_at_zero=lm.attention == "block_causal",
        max_positions=lm.max_positions,
        prefill_chunk=prefill_chunk,
        executor=executor,
        compile=chosen.compile,
        temperature=chosen.temperature,
        seed=_seed(lm, chosen),
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        log_probs=log_probs,
        choose_drafts=chosen.draft_steps == "auto",
    )
    if settings.temperature > 0 and settings.measure not in DRAWN_MEASURES:
        raise ValueError(f"a temperature needs measure='prob' or 'log_odds', got measure={settings.measure!r}")
    if settings.temperature == 0 and settings.truncation:
        raise ValueError(
            f"{', '.join(settings.truncation)}: these say what is drawn from, but nothing is drawn; set a temperature above 0"
        )
    _check_threshold(settings)
    if settings.log_probs and settings.measure not in ("prob", "log_odds"):
        raise ValueError(f"log_probs needs measure='prob' or 'log_odds', got measure={settings.measure!r}")
    if settings.draft_steps == 1:  # nothing is drafted, so there is nothing to keep
        settings = dataclasses.replace(settings, drafting="nested")
    if settings.one_block and settings.drafting == "pipelined":  # no draft may come from behind a refresh
        settings = dataclasses.replace(settings, drafting="pooled")
    _check_ends(lm, settings)
    check_length(lm, settings, prompt_length)
    return settings


def with_own(lm: DiffusionLM, settings: Settings, own: SequenceSettings) -> Settings:
    """The settings of a sequence; raises TypeError or ValueError naming what is wrong."""
    changed: dict[str, Any] = {}
    if own.max_new_tokens is not None:
        changed["max_new_tokens"] = as_int("Decoder.add", "max_new_tokens", own.max_new_tokens, minimum=1)
    if own.eos_token_id is not None:
        changed["eos_token_ids"] = as_token_ids(own.eos_token_id)
    if own.stop_sequences is not None:
        changed["stop_sequences"] = tuple(as_token_ids(stop) for stop in own.stop_sequences)
    if own.threshold is not None:
        changed["threshold"] = Threshold().checked("threshold", own.threshold)
    if own.temperature is not None:
        changed["temperature"] = Temperature().checked("temperature", own.temperature)
        if changed["temperature"] > 0 and not settings.draws:
            raise ValueError(
                "temperature: the decoder draws no tokens; resolve its settings with a temperature above 0, which sequences "
                "may then have of their own"
            )
    settings = dataclasses.replace(settings, **changed)
    _check_threshold(settings)
    _check_ends(lm, settings)
    return settings


def _check_threshold(settings: Settings) -> None:
    needed = NEEDED_MEASURE.get(settings.rule)
    if settings.rule != "threshold" and settings.threshold is None:
        raise ValueError(f"rule={settings.rule!r} needs a threshold, its number; got None")
    if needed is not None and settings.measure != needed:
        raise ValueError(f"rule={settings.rule!r} needs measure={needed!r}, got measure={settings.measure!r}")
    if needed is None and settings.threshold is not None and settings.measure not in ("prob", "log_odds"):
        raise ValueError(
            f"threshold is a probability: it needs measure='prob' or 'log_odds', got measure={settings.measure!r}"
        )


def _check_ends(lm: DiffusionLM, settings: Settings) -> None:
    if () in settings.stop_sequences:
        raise ValueError("a stop sequence is empty: every text contains it")
    stops = (("stop_sequences:", stop) for stop in settings.stop_sequences)
    for name, token_ids in (("eos_token_id", settings.eos_token_ids), *stops):
        for token_id in token_ids:
            if token_id < 0 or (lm.vocab_size is not None and token_id >= lm.vocab_size):
                raise ValueError(f"{name} {token_id} is outside the model's vocabulary of {lm.vocab_size} tokens")


def _cache(lm: DiffusionLM, cache: str) -> str:
    """The policy that is meant."""
    if cache in ("prefix", "dual") and lm.attention == "block_causal":
        raise ValueError(
            f"cache={cache!r} is an approximation for full attention; a block-causal model has an exact cache: use 'auto'"
        )
    if cache == "auto":
        return "exact" if lm.attention == "block_causal" else "none"
    return cache


def _seed(lm: DiffusionLM, chosen: DecodingOptions) -> int:
    """The seed that was given, or one that chance gives; for all shards of a model, the first one's."""
    drawn = chosen.temperature > 0 and chosen.seed is None
    return lm.agreed([int(torch.randint(2**63 - 1, ())) if drawn else chosen.seed or 0])[0]


def _executor(lm: DiffusionLM, executor: str, compile: bool | None) -> str:
    """ "planned" or "graph", whichever is meant and can be."""
    if executor == "graph" and not lm.takes_draft_attention:
        raise ValueError(
            f"executor='graph' needs a transformers model, whose attention can be replaced; {lm.name} is a "
            f"{type(lm.model).__name__}: use executor='planned'"
        )
    if executor == "auto":
        executor = "graph" if lm.device.type == "cuda" and lm.takes_draft_attention else "planned"
    if compile and executor == "planned":
        raise ValueError(
            "compile=True is for executor='graph': the planned executor has no fixed shapes to compile for"
        )
    return executor
