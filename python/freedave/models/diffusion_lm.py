"""DiffusionLM: a masked-diffusion language model as the decoder sees it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from freedave.attention import DraftAttention, attend, use_bidirectional_attention
from freedave.explicit_mask import ExplicitKeyValues, dense_mask
from freedave.integers import as_int, as_token_ids
from freedave.packed_forward import ROWS_TOGETHER, PackedForward
from freedave.window_attention import WindowAttention

ATTENTIONS = ("block_causal", "full")

# Classes whose logits are exactly lm_head(backbone output), so that the head can run on a few rows only.
_PLAIN_HEADS = frozenset({"Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "Glm4MoeForCausalLM"})


class DiffusionLM:
    """A masked-diffusion language model.

    Args:
        model: any module called as transformers causal language models are. A transformers model is put into evaluation
            mode and switched to bidirectional attention.
        mask_token_id: the id of the mask token; must lie inside the model's input vocabulary.
        attention: "block_causal" (SDAR, TraDo, LLaDA2: positions see their own block and earlier ones) or "full" (LLaDA,
            Dream).
        block_length: tokens a block, aligned at position 0. Needed for "block_causal"; for "full", the default of
            `generate` (None: the whole answer is one block).
        logits_shift: the logits of position i stand in row i-1 (Dream). Full attention only.
        eos_token_id: one id or several; a finished block with one of them ends the sequence. `lm.eos_token_ids` holds all,
            `lm.eos_token_id` the first, which fills the rest of a sequence that has ended.
        tokenizer: a transformers tokenizer, or None.
        name: shown to people.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask_token_id: int,
        *,
        attention: str = "block_causal",
        block_length: int | None = None,
        logits_shift: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: Any = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if block_length is not None:
            block_length = as_int("DiffusionLM", "block_length", block_length, minimum=1)
        mask_token_id = as_int("DiffusionLM", "mask_token_id", mask_token_id)
        if attention == "block_causal" and block_length is None:
            raise ValueError("block_length is needed for block-causal attention (SDAR and TraDo were trained with 4)")
        if attention == "block_causal" and logits_shift:
            raise ValueError(
                "logits_shift needs full attention: a window's first row would belong to the cached prefix"
            )

        self.model = model.eval()
        self.mask_token_id = mask_token_id
        self.attention = attention
        self.block_length = block_length
        self.logits_shift = logits_shift
        self.eos_token_ids = as_token_ids("eos_token_id", eos_token_id)
        self.tokenizer = tokenizer
        self.name = name or type(model).__name__

        config = getattr(model, "config", None)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        if mask_token_id < 0 or (self.vocab_size is not None and mask_token_id >= self.vocab_size):
            raise ValueError(
                f"mask_token_id {mask_token_id} is outside the model's vocabulary of {self.vocab_size} tokens: "
                "this checkpoint and this mask token do not belong together"
            )
        self.has_plain_head = type(model).__name__ in _PLAIN_HEADS
        self._needs_mask = not use_bidirectional_attention(model)

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-sequence token."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @eos_token_id.setter
    def eos_token_id(self, token_ids: int | Sequence[int] | None) -> None:
        self.eos_token_ids = as_token_ids("eos_token_id", token_ids)

    @property
    def takes_draft_attention(self) -> bool:
        """Whether its attention layers are ours to define; other modules get explicit masks."""
        return not self._needs_mask

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def logits(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One forward of `input_ids [J, T]`; the logits `[R, V]` of its flattened positions `rows [R]`.

        `position_ids [1, T]` (None: from 0), `attention_mask [1, 1, T, T]` bool (None: everything is visible).
        """
        if attention_mask is None and self._needs_mask:
            length = input_ids.shape[1]
            attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device)
        return self.project(
            self._features(rows, input_ids, position_ids, attention_mask=attention_mask, past_key_values=None)
        )

    def features_of_drafts(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, attention: DraftAttention
    ) -> torch.Tensor:
        """What `project` makes logits of, `[R, *]`, at flattened positions `rows [R]`; attention layers call `attention`."""
        calls = 0

        def counted(layer: int, *tensors: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return attention(layer, *tensors)

        features = self._features(rows, input_ids, position_ids, draft_attention=counted)
        if not calls:
            raise TypeError(
                f"{type(self.model).__name__} hands no keyword arguments to its attention layers, so drafts would see each "
                "other; wrap it in a torch.nn.Module that takes 4-D attention masks"
            )
        return features

    def window_features(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rows: torch.Tensor | None,
        attention: WindowAttention,
    ) -> torch.Tensor:
        """What `project` makes logits of, `[n, *]`, at flattened positions `rows [n]` (None: all) of the windows `[R K, F]`
        of drafts, whose attention modules have been lent their buffers (`window_attention.layer_buffers`).
        """
        return self._features(rows, input_ids, position_ids, window_attention=attention)

    def key_layout(self) -> tuple[int, int, int, torch.dtype]:
        """How many layers attend, with how many key-value heads G of how many numbers D, of what type."""
        layouts: list[tuple[int, int, torch.dtype]] = []

        def attention(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
        ) -> torch.Tensor:
            layouts.append((key.shape[1], key.shape[3], key.dtype))
            return query.transpose(1, 2).contiguous()

        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.features_of_drafts(ids, ids, ids[0], attention)
        if len(set(layouts)) > 1:
            raise ValueError(
                f"the layers of {self.name} differ in their key-value heads: {sorted(set(map(str, layouts)))}"
            )
        return len(layouts), *layouts[0]

    def packed_features(self, forward: PackedForward, rows: torch.Tensor) -> torch.Tensor:
        """What `project` makes logits of, `[R, *]`, at tokens `rows [R]` of a packed forward; updates its cache."""
        input_ids, position_ids = forward.input_ids, forward.position_ids
        if not self._needs_mask:
            missing = -input_ids.shape[1] % ROWS_TOGETHER
            if missing:
                input_ids, position_ids = (F.pad(ids, (0, missing)) for ids in (input_ids, position_ids))
            return self.features_of_drafts(input_ids, position_ids, rows, functools.partial(attend, forward))
        if forward.is_rectangle:  # the module knows batches: no need to mask drafts from each other
            window = forward.windows[0]
            input_ids, position_ids = input_ids.view(window.count, -1), position_ids[:, : window.length]
        cached = None if forward.cache is None else ExplicitKeyValues(forward)
        return self._features(rows, input_ids, position_ids, attention_mask=dense_mask(forward), past_key_values=cached)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The logits `[R, V]` of features, of any of the rows."""
        model: Any = self.model
        return model.get_output_embeddings()(features) if self.has_plain_head else features

    @property
    def projection(self) -> torch.nn.Linear | None:
        """What `project` multiplies features with, where that is all it does; None where there may be more to it (hooks,
        adapters, quantised or distributed weights), or where logits come with the features.
        """
        if not self.has_plain_head:
            return None
        model: Any = self.model
        head = model.get_output_embeddings()
        plain = (
            type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter and "forward" not in vars(head)
        )
        return head if plain and not head._forward_pre_hooks and not head._forward_hooks else None

    def _features(
        self, rows: torch.Tensor | None, input_ids: torch.Tensor, position_ids: torch.Tensor | None, **arguments: Any
    ) -> torch.Tensor:
        arguments |= {"input_ids": input_ids, "position_ids": position_ids}
        arguments["use_cache"] = arguments.get("past_key_values") is not None
        model: Any = self.model
        if self.has_plain_head:  # the vocabulary projection runs on the rows that are read, not on every position
            features = model.base_model(**arguments).last_hidden_state.flatten(0, 1)
        else:
            features = model(**arguments).logits.flatten(0, 1)
        return features if rows is None else features[rows]
