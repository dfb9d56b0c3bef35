"""DiffusionLM: a masked-diffusion language model as the decoder sees it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from freedave.forward.attention import attend
from freedave.forward.explicit_mask import ExplicitKeyValues, additive_mask, explicit_logits, honoured_mask_dtype
from freedave.forward.packed_forward import ROWS_TOGETHER, PackedForward
from freedave.forward.reproducible_products import try_products
from freedave.forward.shards import Ranks, ShardedHead, agreed
from freedave.forward.window_attention import WindowAttention
from freedave.integers import as_int, as_token_id, as_token_ids
from freedave.models.adapters import without_wrapper
from freedave.models.attention_interface import DraftAttention, check_attention, use_bidirectional_attention
from freedave.models.experts import use_experts_in_fours

ATTENTIONS = ("block_causal", "full")

# Classes whose logits are exactly lm_head(backbone output), so that the head can run on a few rows only.
_PLAIN_HEADS = frozenset(
    {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM", "Glm4MoeForCausalLM"}
)


def _is_hooked(module: torch.nn.Module) -> bool:
    """Whether calling it calls more than its `forward`: its own hooks, or those of all modules."""
    everywhere = torch.nn.modules.module._global_forward_pre_hooks or torch.nn.modules.module._global_forward_hooks
    return bool(everywhere or module._forward_pre_hooks or module._forward_hooks)


class DiffusionLM:
    """A masked-diffusion language model.

    Args:
        model: any module called as transformers causal language models are. A transformers model is put into evaluation
            mode and switched to bidirectional attention (on a CPU, to padded experts as well, see `experts.py`). Any other
            module gets a 4-D `attention_mask`, bool (True is visible) or additive (0, and -inf for what is hidden): the one
            that it honours, which is tried before its first forward. Of a `peft.PeftModel` with adapters inside of layers,
            such as LoRA, it is the transformers model with these.
        mask_token_id: the id of the mask token; must lie inside the model's input vocabulary.
        attention: "block_causal" (SDAR, TraDo, LLaDA2: positions see their own block and earlier ones) or "full" (LLaDA,
            Dream).
        block_length: tokens a block, aligned at position 0. Needed for "block_causal"; for "full", the default of
            `generate` (None: the whole answer is one block).
        logits_shift: the logits of position i stand in row i-1 (Dream, Fast-dLLM v2).
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
        if attention == "block_causal" and block_length is None:
            raise ValueError("block_length is needed for block-causal attention (SDAR and TraDo were trained with 4)")
        model = without_wrapper(model)
        check_attention(model)
        self.model = model.eval()
        self.mask_token_id = mask_token_id = as_token_id(mask_token_id)
        self.attention = attention
        self.block_length = block_length
        self.logits_shift = logits_shift
        self.eos_token_ids = as_token_ids(eos_token_id)
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
        self._needs_mask = not use_bidirectional_attention(model)
        if isinstance(model, PreTrainedModel):
            use_experts_in_fours(model)
        self._mask_dtype: torch.dtype | None = None
        # What decoding on a GPU keeps between two calls is freed with the model (idle_executors.py, compiled_layers.py).
        self.idle_executor: object = None
        self.compiled_layers: object = None
        self._threads_tried: int | None = None

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-sequence token."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @eos_token_id.setter
    def eos_token_id(self, token_ids: int | Sequence[int] | None) -> None:
        self.eos_token_ids = as_token_ids(token_ids)

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
        if self._needs_mask:
            if attention_mask is None:
                length = input_ids.shape[1]
                attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device)
            return self._masked_logits(input_ids, position_ids, attention_mask, None).flatten(0, 1)[rows]
        return self.project(self._features(rows, input_ids, position_ids, attention_mask=attention_mask))

    def features_of_drafts(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, attention: DraftAttention
    ) -> torch.Tensor:
        """What `project` makes logits of, `[R, *]`, at flattened positions `rows [R]`; attention layers call `attention`."""
        self._try_products()
        calls = 0

        def counted(layer: int, *tensors: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return attention(layer, *tensors)

        problem = (
            f"{type(self.model).__name__} hands no keyword arguments to its attention layers, so drafts would see each "
            "other; wrap it in a torch.nn.Module that takes 4-D attention masks"
        )
        try:
            features = self._features(rows, input_ids, position_ids, draft_attention=counted)
        except TypeError as error:
            if "draft_attention" in str(error):  # the model's forward takes no such argument
                raise TypeError(problem) from error
            raise
        if not calls:
            raise TypeError(problem)
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
        if self._needs_mask:
            return explicit_logits(self._masked_logits, forward, rows)
        input_ids, position_ids = forward.input_ids, forward.position_ids
        missing = -input_ids.shape[1] % ROWS_TOGETHER
        if missing:
            input_ids, position_ids = (F.pad(ids, (0, missing)) for ids in (input_ids, position_ids))
        return self.features_of_drafts(input_ids, position_ids, rows, functools.partial(attend, forward))

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are `project` of the backbone's output and nothing else, so that some rows' need no others.

        Where calling the model does more (hooks, a replaced `forward`), it is called.
        """
        model: Any = self.model
        name = type(model).__name__
        if self._needs_mask or name not in _PLAIN_HEADS or "forward" in vars(model):
            return False
        # The globals of `forward` tell in which module it was written. The names do not: another class may have this name,
        # and a decorated function says it is of the module of the function that it decorates.
        own_forward = getattr(type(model).forward, "__globals__", {}).get("__name__", "").startswith("transformers.")
        return own_forward and not _is_hooked(model)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The logits `[R, V]` of features, of any of the rows."""
        model: Any = self.model
        return model.get_output_embeddings()(features) if self.has_plain_head else features

    @property
    def projection(self) -> torch.nn.Linear | None:
        """What `project` multiplies features with, where that is all it does; None where there may be more to it (hooks,
        adapters, quantised or otherwise distributed weights), or where logits come with the features.
        """
        if not self.has_plain_head:
            return None
        model: Any = self.model
        head = model.get_output_embeddings()
        plain = type(head) in (torch.nn.Linear, ShardedHead) and type(head.weight) is torch.nn.Parameter
        plain = plain and "forward" not in vars(head)
        return head if plain and not _is_hooked(head) else None

    @property
    def ranks(self) -> Ranks | None:
        """This process, where it holds one of several shards of the model (`load_model(tensor_parallel=True)`)."""
        return getattr(self.model, "freedave_ranks", None)

    def agreed(self, numbers: Sequence[int]) -> list[int]:
        """What all processes of a model in shards go on with: those numbers that the first one has."""
        ranks = self.ranks
        return list(numbers) if ranks is None else agreed(ranks, numbers, self.device)

    def _try_products(self) -> None:
        threads = torch.get_num_threads()  # how a product is divided among them may change its bits
        if self._threads_tried != threads:
            try_products(self.model, self.projection)
            self._threads_tried = threads

    def _features(
        self, rows: torch.Tensor | None, input_ids: torch.Tensor, position_ids: torch.Tensor | None, **arguments: Any
    ) -> torch.Tensor:
        arguments |= {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        model: Any = self.model
        if self.has_plain_head:  # the vocabulary projection runs on the rows that are read, not on every position
            features = model.base_model(**arguments).last_hidden_state.flatten(0, 1)
        else:
            features = model(**arguments).logits.flatten(0, 1)
        return features if rows is None else features[rows]

    def _masked_logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        visible: torch.Tensor,
        past_key_values: ExplicitKeyValues | None,
    ) -> torch.Tensor:
        """The logits `[N, L, V]` of a module that does its own attention, under a mask of visible keys."""
        self._try_products()
        if self._mask_dtype is None:
            other = 0 if self.mask_token_id else 1
            dtype = next((parameter.dtype for parameter in self.model.parameters()), torch.get_default_dtype())
            self._mask_dtype = honoured_mask_dtype(self._call, (self.mask_token_id, other), dtype, input_ids.device)
        mask = visible if self._mask_dtype == torch.bool else additive_mask(visible, self._mask_dtype)
        return self._call(input_ids, position_ids, mask, past_key_values)

    def _call(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor,
        past_key_values: ExplicitKeyValues | None,
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).logits
