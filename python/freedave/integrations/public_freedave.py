"""The public FreeDave: its `DLMGeneration`, with the arguments of the published methods, over our loop.

    from freedave.integrations.public_freedave import DLMGeneration

    out = DLMGeneration().block_decode_with_block_attention_FreeDave(
        lm, input_ids, block_length=4, max_gen_length=256, draft_steps=8, mask_token_id=151669
    )

Tokens and the steps at which they are committed are those of the published static methods, but for these differences:

- The `_FreeDave` methods return what static decoding returns, its steps included, for all settings, `confidence_threshold`
  and `temperature` among them; published, steps count forwards, and full attention accepts drafts that static decoding does
  not reach.
- The mask is never predicted, and is no part of the softmax. Confidences are float32 whatever the model's dtype, and equal
  ones go to the lowest position, where `torch.topk` takes any.
- What is drawn comes from the same softmax, but a position's noise is the same in all steps; published, it is drawn anew.
- With Dream's shifted logits, the first step of a block commits what `confidence_threshold` and `token_per_step` say, its
  first position among it; published, that position alone.
- Sequences of a batch do not wait for each other, and `early_exit` ends each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from freedave.decode.decoder import Decoder
from freedave.decode.sequence import Sequence
from freedave.decode.settings import check_prompts, resolve_settings
from freedave.integers import as_int
from freedave.integrations.step_schedule import as_torch_compares
from freedave.models.diffusion_lm import DiffusionLM

# Whose logits are shifted, as published.
SHIFTED = ("DreamModel", "DreamBaseModel")
DRAFT_MODES = ("batch_expanding", "tree_attention", "debug")


@dataclass
class DLMGenerationOutput:
    """`sequences [B, T]` int64, `trajectory_step_map [B, T - P]` int64: the static step that committed each position, -1 for
    what `early_exit` has filled. `num_forwards`: of the batch, prompts included; published, tokens are counted instead.
    """

    sequences: torch.Tensor
    trajectory_step_map: torch.Tensor
    num_forwards: int


@dataclass
class DLMGeneration:
    """The published class. `token_per_step`: positions that a static step commits. `seed`: of what is drawn (None: another
    one with each call). `sdpa_additive_attention_mask` and `device` are taken and not needed: masks are as the model wants
    them, tensors where it is.
    """

    sdpa_additive_attention_mask: bool = False
    seed: int | None = None
    device: torch.device | None = None
    token_per_step: int = field(default=1, kw_only=True)

    def block_decode_with_full_attention(
        self,
        model: DiffusionLM | torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float | None = None,
        block_length: int | None = 32,
        max_gen_length: int = 128,
        decoding_steps: int = 128,
        use_cache: bool = False,
        dual_cache: bool = False,
        mask_token_id: int = 151666,
        eos_token_id: int = 151645,
        pad_token_id: int = 151643,
        pad_target_penalty: float = 1.0,
        confidence_threshold: float | None = None,
        early_exit: bool = False,
    ) -> DLMGenerationOutput:
        """Static decoding with full attention: each block begins with a forward of the whole sequence, whose keys and values
        its other steps reuse, those of what stands before it or, with `dual_cache`, around it.

        Args:
            model: what `freedave.load_model` returns, or any module that `DiffusionLM` takes. The logits of classes named as
                Dream's are shifted.
            input_ids: `[B, P]` int64. attention_mask: `[B, P]`, 0 at padding, which may stand on the left or on the right.
            temperature, top_p, top_k: what is drawn from, as published; a temperature of 0: the likeliest token is taken.
            alg_temp: None or 0 commits the most confident positions first, -1 goes from left to right.
            block_length, max_gen_length: as published. decoding_steps: at least as many as the answer needs.
            use_cache, pad_target_penalty: taken, and without effect.
            confidence_threshold: a step commits every position at least this confident, or else the first ones.
            early_exit: a block of nothing but `eos_token_id`, or but `pad_token_id`, is the last one; the rest is filled
                with that token.

        Raises:
            TypeError, ValueError: naming the argument, before anything runs.
            NonFiniteLogitsError: the model produced NaN or infinite logits.
        """
        caller = "block_decode_with_full_attention"
        lm, block_length = _full_attention(caller, model, mask_token_id, block_length, max_gen_length)
        blocks = max_gen_length // block_length
        decoding_steps = as_int(caller, "decoding_steps", decoding_steps, minimum=1)
        needed = blocks * -(-block_length // self.token_per_step)
        if decoding_steps < needed or decoding_steps % blocks:
            raise ValueError(
                f"{caller}: with decoding_steps={decoding_steps}, masks may be left: take {needed}, or as many more a block"
            )
        return self._decode(
            caller, lm, input_ids, attention_mask, max_gen_length, 1, block_length, "dual" if dual_cache else "prefix",
            (temperature, top_p, top_k, alg_temp, confidence_threshold), (eos_token_id, pad_token_id) if early_exit else (),
        )  # fmt: skip

    def block_decode_with_full_attention_FreeDave(
        self,
        model: DiffusionLM | torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float | None = None,
        block_length: int | None = 32,
        max_gen_length: int = 128,
        decoding_steps: int = 128,
        draft_steps: int = 1,
        eager_acceptance_mode: bool = False,
        draft_mode: str = "tree_attention",
        use_cache: bool = False,
        dual_cache: bool = False,
        mask_token_id: int = 151666,
        eos_token_id: int = 151645,
        pad_token_id: int = 151643,
        pad_target_penalty: float = 1.0,
        confidence_threshold: float | None = None,
        early_exit: bool = False,
    ) -> DLMGenerationOutput:
        """The same tokens and steps, with `draft_steps` drafts a forward. `eager_acceptance_mode`, `draft_mode` and
        `decoding_steps`, which say how the published method gets there, are without effect.
        """
        caller = "block_decode_with_full_attention_FreeDave"
        _check_draft_mode(caller, draft_mode)
        lm, block_length = _full_attention(caller, model, mask_token_id, block_length, max_gen_length)
        return self._decode(
            caller, lm, input_ids, attention_mask, max_gen_length, draft_steps, block_length,
            "dual" if dual_cache else "prefix", (temperature, top_p, top_k, alg_temp, confidence_threshold),
            (eos_token_id, pad_token_id) if early_exit else (),
        )  # fmt: skip

    def block_decode_with_block_attention(
        self,
        model: DiffusionLM | torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float | None = None,
        block_length: int = 32,
        max_gen_length: int = 128,
        decoding_steps: int = 128,
        use_cache: bool = True,
        mask_token_id: int = 151669,
        eos_token_id: int = 151643,
        pad_token_id: int = 151643,
        pad_target_penalty: float = 1.0,
        confidence_threshold: float | None = None,
        early_exit: bool = False,
    ) -> DLMGenerationOutput:
        """Static decoding with block-causal attention (SDAR, TraDo), to the end of the block that the answer ends in.

        Arguments as above, but for these: `decoding_steps` is without effect, as published, and `early_exit` looks for
        `eos_token_id` alone.
        """
        caller = "block_decode_with_block_attention"
        lm, new = _block_attention(caller, model, mask_token_id, block_length, input_ids, max_gen_length)
        return self._decode(
            caller, lm, input_ids, attention_mask, new, 1, block_length, "auto",
            (temperature, top_p, top_k, alg_temp, confidence_threshold), (eos_token_id,) if early_exit else (),
        )  # fmt: skip

    def block_decode_with_block_attention_FreeDave(
        self,
        model: DiffusionLM | torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        alg_temp: float | None = None,
        block_length: int = 32,
        max_gen_length: int = 128,
        decoding_steps: int = 128,
        draft_steps: int = 1,
        eager_acceptance_mode: bool = False,
        draft_mode: str = "tree_attention",
        use_cache: bool = False,
        mask_token_id: int = 151669,
        eos_token_id: int = 151643,
        pad_token_id: int = 151643,
        pad_target_penalty: float = 1.0,
        confidence_threshold: float | None = None,
        early_exit: bool = False,
    ) -> DLMGenerationOutput:
        """The same tokens and steps, with `draft_steps` drafts a forward. `eager_acceptance_mode` and `draft_mode`, which say
        how the published method gets there, are without effect.
        """
        caller = "block_decode_with_block_attention_FreeDave"
        _check_draft_mode(caller, draft_mode)
        lm, new = _block_attention(caller, model, mask_token_id, block_length, input_ids, max_gen_length)
        return self._decode(
            caller, lm, input_ids, attention_mask, new, draft_steps, block_length, "auto",
            (temperature, top_p, top_k, alg_temp, confidence_threshold), (eos_token_id,) if early_exit else (),
        )  # fmt: skip

    def _decode(
        self,
        caller: str,
        lm: DiffusionLM,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        new: int,
        draft_steps: int,
        block_length: int,
        cache: str,
        rule: tuple[Any, ...],
        ends: tuple[int, ...],
    ) -> DLMGenerationOutput:
        """`rule`: temperature, top_p, top_k, alg_temp, confidence_threshold. `ends`: a block of one alone is the last."""
        temperature, top_p, top_k, alg_temp, threshold = rule
        if temperature == 0:  # as published, where nothing is drawn
            top_p = top_k = None
        if alg_temp not in (None, 0, -1):
            raise ValueError(f"{caller}: alg_temp must be None, 0 or -1, got {alg_temp!r}")
        prompts = check_prompts(lm, input_ids, attention_mask)
        settings = resolve_settings(
            lm,
            max(map(len, prompts)),
            new,
            eos_token_id=(),
            draft_steps=draft_steps,
            block_length=block_length,
            tokens_per_step=self.token_per_step,
            order="left_to_right" if alg_temp == -1 else "confidence",
            threshold=as_torch_compares(threshold),
            measure="prob",
            cache=cache,
            temperature=temperature,
            seed=self.seed,
            top_k=top_k or None,
            top_p=None if top_p == 1 else top_p,
        )
        capacity = max(settings.sequence_length(len(prompt)) for prompt in prompts)
        decoder = Decoder(lm, settings, slots=len(prompts), capacity=capacity)
        sequences = [decoder.add(prompt) for prompt in prompts]
        filled: dict[int, tuple[int, int]] = {}
        while decoder.sequences:
            decoder.launch()
            for sequence in (commit.sequence for commit in decoder.poll()):
                if sequence.error is not None:
                    raise sequence.error
                end = _end(sequence, settings.first_block(sequence.prompt_length), block_length, ends, lm.mask_token_id)
                if end is not None:
                    filled[sequence.index] = end
                    if not sequence.finished:
                        decoder.drop(sequence)
        decoder.close()
        tokens = torch.tensor([sequence.generated(sequence.tokens) for sequence in sequences])
        steps = torch.tensor([sequence.generated(sequence.step_map) for sequence in sequences])
        for b, (begin, token_id) in filled.items():
            tokens[b, begin:], steps[b, begin:] = token_id, -1
        tokens, steps = tokens.to(lm.device), steps.to(lm.device)
        return DLMGenerationOutput(torch.cat([input_ids.to(lm.device), tokens], 1), steps, decoder.forwards)


def _end(sequence: Sequence, begin: int, block: int, ends: tuple[int, ...], mask: int) -> tuple[int, int] | None:
    """How many positions of the answer there are to the end of the first block that is one of `ends` alone, and which."""
    for start in range(begin, len(sequence.tokens), block):
        tokens = {*sequence.tokens[start : start + block]}
        if mask in tokens:
            return None
        if len(tokens) == 1 and tokens <= {*ends}:
            return start + block - sequence.prompt_length, tokens.pop()
    return None


def _full_attention(
    caller: str, model: DiffusionLM | torch.nn.Module, mask_token_id: int, block_length: int | None, max_gen_length: int
) -> tuple[DiffusionLM, int]:
    """The model, and the length of a block."""
    lm = model
    if not isinstance(lm, DiffusionLM):
        lm = DiffusionLM(lm, mask_token_id, attention="full", logits_shift=type(lm).__name__ in SHIFTED)
    if lm.attention != "full":
        raise ValueError(f"{caller}: {lm.name} has block-causal attention")
    max_gen_length = as_int(caller, "max_gen_length", max_gen_length, minimum=1)
    size = as_int(caller, "block_length", max_gen_length if block_length is None else block_length, minimum=1)
    if max_gen_length % size:
        raise ValueError(f"{caller}: max_gen_length ({max_gen_length}) must be a multiple of block_length ({size})")
    return lm, size


def _block_attention(
    caller: str,
    model: DiffusionLM | torch.nn.Module,
    mask_token_id: int,
    block_length: int,
    input_ids: torch.Tensor,
    max_gen_length: int,
) -> tuple[DiffusionLM, int]:
    """The model, and how many positions are decoded: whole blocks."""
    block_length = as_int(caller, "block_length", block_length, minimum=1)
    length = input_ids.shape[-1] + as_int(caller, "max_gen_length", max_gen_length, minimum=1)
    lm = model if isinstance(model, DiffusionLM) else DiffusionLM(model, mask_token_id, block_length=block_length)
    if lm.attention != "block_causal":
        raise ValueError(f"{caller}: {lm.name} has full attention")
    return lm, length + -length % block_length - input_ids.shape[-1]


def _check_draft_mode(caller: str, draft_mode: str) -> None:
    if draft_mode not in DRAFT_MODES:
        raise ValueError(f"{caller}: draft_mode must be one of {', '.join(DRAFT_MODES)}, got {draft_mode!r}")
