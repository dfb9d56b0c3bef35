"""`generate`: decodes prompts with the step API of `decoder.py`, and checks the result where asked.

One loop serves static decoding and FreeDave: static decoding is `draft_steps=1`, and defines what FreeDave must reproduce
token for token and step for step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from freedave.decode.decoder import Decoder
from freedave.decode.options import OPTION_NAMES
from freedave.decode.output import (
    Commit,
    DecodeOutput,
    DecodeStats,
    NonFiniteLogitsError,
    compare_with_static,
    count_differences,
)
from freedave.decode.settings import Settings, check_prompts, resolve_settings
from freedave.forward.shards import check_alike

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM


def generate(
    lm: DiffusionLM,
    input_ids: torch.Tensor,
    max_new_tokens: int = 256,
    draft_steps: int | Literal["auto"] = "auto",
    block_length: int | None = None,
    tokens_per_step: int = 1,
    order: str = "confidence",
    threshold: float | None = None,
    drafting: str = "pooled",
    cache: str = "auto",
    eos_token_id: int | Sequence[int] | None = None,
    lookahead_steps: int | None = None,
    on_step: Callable[[Commit], None] | None = None,
    check_lossless: bool = False,
    measure_own_static: bool = False,
    attention_mask: torch.Tensor | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    prefill_chunk: int | None = 512,
    executor: str = "auto",
    compile: bool | None = None,
    measure: str | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    log_probs: bool = False,
    rule: str = "threshold",
) -> DecodeOutput:
    """Decodes prompts block by block, committing what static decoding commits, in fewer forwards.

    Args:
        lm: the model (`load_model`, `DiffusionLM`). input_ids: `[B, P]` int64, the prompts.
        max_new_tokens: positions to generate. Block-causal models decode whole blocks, and the result is cut there.
        draft_steps, block_length, tokens_per_step, order, threshold, rule, drafting, cache, lookahead_steps, executor,
        compile, measure, temperature, seed, top_k, top_p, min_p: how to decode, as `decode.options.DecodingOptions` says.
        eos_token_id: one id or several; a finished block that contains one of them among its generated tokens ends the
            sequence, and the answer ends with the first one. None: the model's own; an empty list: none.
        on_step: called with a `Commit` after each forward. check_lossless: decode statically as well and compare; with
            the graph executor in the same shapes, as in 16 bits a product rounds otherwise with other numbers of rows.
        measure_own_static: decode statically in the shapes of one draft as well; `stats.own_static` says how much differs.
        attention_mask: `[B, P]`, 0 at padding, on the left or on the right, which the model never sees. None: there is none.
        stop_sequences: lists of token ids; a sequence ends with the finished block by which its answer contains one. The
            answer ends with the first one's last token: a caller who wants it gone cuts it off.
        prefill_chunk: how many tokens of prompts a forward stores at most, in whole blocks; other sequences go on beside it.
            It changes no token. None: a prompt is computed at once, as it is where forwards compute whole sequences.
        log_probs: whether the output, and each `Commit`, has each token's log-probability. It takes "prob" or "log_odds".

    Returns:
        `DecodeOutput`.

    Raises:
        TypeError, ValueError: a bad argument, before anything runs.
        NonFiniteLogitsError: the model produced NaN or infinite logits; raised when all others are decoded, with `output`.
        LosslessnessError: `check_lossless` found a difference.

    Source: FreeDave (free draft-and-verification); the window and every drafting but "nested" are this project's own.
    """
    options = {name: value for name, value in locals().items() if name in OPTION_NAMES}
    prompts = check_prompts(lm, input_ids, attention_mask)
    settings = resolve_settings(
        lm,
        max(map(len, prompts)),
        max_new_tokens,
        eos_token_id=eos_token_id,
        stop_sequences=stop_sequences,
        prefill_chunk=prefill_chunk,
        log_probs=log_probs,
        **options,
    )
    check_alike(lm.ranks, (prompts, settings), lm.device)
    out = _decode(lm, input_ids, prompts, settings, on_step)
    if measure_own_static:
        own = _decode(lm, input_ids, prompts, settings.static(own_shapes=True), None)
        out.stats.own_static = count_differences(out, own)
    if check_lossless:
        out.static = _decode(lm, input_ids, prompts, settings.static(), None)
        compare_with_static(out, out.static)
    return out


def _decode(
    lm: DiffusionLM,
    input_ids: torch.Tensor,
    prompts: list[list[int]],
    settings: Settings,
    on_step: Callable[[Commit], None] | None,
) -> DecodeOutput:
    began = time.perf_counter()
    stats = DecodeStats()
    capacity = max(settings.sequence_length(len(prompt)) for prompt in prompts)
    decoder = Decoder(lm, settings, slots=len(prompts), capacity=capacity)
    sequences = [decoder.add(prompt) for prompt in prompts]
    while decoder.sequences:
        decoder.launch()
        commits = decoder.poll()
        stats.accepted_lengths.append(sum(commit.steps for commit in commits))
        if on_step is not None:
            paused = time.perf_counter()
            for commit in commits:
                on_step(commit.describe())
            began += time.perf_counter() - paused
    rows = zip(input_ids.tolist(), sequences, strict=True)
    out = DecodeOutput(
        sequences=torch.tensor([row + s.generated(s.tokens) for row, s in rows], device=lm.device),
        step_map=torch.tensor([s.generated(s.step_map) for s in sequences], device=lm.device),
        forward_map=torch.tensor([s.generated(s.forward_map) for s in sequences], device=lm.device),
        num_forwards=decoder.forwards,
        stats=stats,
    )
    if settings.log_probs:
        out.log_probs = torch.tensor([s.generated(s.log_probs) for s in sequences], device=lm.device)
    stats.accepted_by_sequence = [sequence.accepted_lengths for sequence in sequences]
    stats.tokens = int((out.step_map >= 0).sum())
    stats.positions_computed = decoder.positions_computed
    stats.forward_seconds = decoder.forward_seconds
    stats.cache_bytes = decoder.cache_bytes
    stats.shapes = decoder.shapes
    stats.drafts_chosen = decoder.drafts_chosen
    stats.drafts_reason = decoder.drafts_reason
    decoder.close()
    stats.total_seconds = time.perf_counter() - began
    broken = [sequence for sequence in sequences if sequence.error is not None]
    if broken:
        others = ", ".join(str(sequence.index) for sequence in broken[1:])
        message = f"{broken[0].error}" + (f"; the same happened to {others}" if others else "")
        raise NonFiniteLogitsError(message, [sequence.index for sequence in broken], out)
    return out
