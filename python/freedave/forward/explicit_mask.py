"""A packed forward for modules that do their own attention: everything stored and everything new, under one dense mask.

transformers models attend as `attention.py` says. Any other module is called as a transformers causal language model is,
with a 4-D mask and a cache object, and computes the full [tokens, stored + tokens] attention. The tests compare
`attention.py` with this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from freedave.forward.attention import block_causal_mask
from freedave.forward.cache import Pair
from freedave.forward.packed_forward import PackedForward

# From `input_ids` and `position_ids [N, L]`, a mask of visible keys (bool), and past keys and values: logits `[N, L, V]`.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "ExplicitKeyValues | None"], torch.Tensor]


class ExplicitKeyValues:
    """Passed to a module as `past_key_values`: stores a layer's new keys and values, returns all that the mask covers.

    A mask does not hide NaN: the weight of a hidden key is 0, and 0 * NaN is NaN. So keys and values that are not finite are
    returned as zeros, and `broken` says which tokens had such in any layer.
    """

    def __init__(self, forward: PackedForward) -> None:
        self.broken: torch.Tensor | None = None
        self._forward = forward

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys before the new ones (asked by transformers)."""
        return _stored(self._forward)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        forward = self._forward
        assert forward.cache is not None
        forward.cache.store(layer_idx, key, value, forward.writes, forward.retain)
        if forward.contexts:
            keys, values = forward.cache.all(layer_idx)
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        broken = ~(key.isfinite().all(-1) & value.isfinite().all(-1)).all(1)[0]
        self.broken = broken if self.broken is None else self.broken | broken
        hidden = broken[:, None]
        return key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)


def explicit_logits(call: Call, forward: PackedForward, rows: torch.Tensor) -> torch.Tensor:
    """The logits `[R, V]` at tokens `rows [R]` of a packed forward, NaN for tokens that see a broken one."""
    if forward.cache is None:
        return torch.cat(_rectangles(call, forward))[rows]
    visible, cached = dense_mask(forward), ExplicitKeyValues(forward)
    logits = call(forward.input_ids, forward.position_ids, visible, cached)[0, rows]
    if cached.broken is not None:
        logits = logits.masked_fill((visible[0, 0, rows] & cached.broken).any(-1, keepdim=True), float("nan"))
    return logits


def _rectangles(call: Call, forward: PackedForward) -> list[torch.Tensor]:
    """The logits of runs that see themselves alone: runs of one length are the rows of a batch, which need no mask."""
    logits = []
    for (length, block_length), alike in itertools.groupby(forward.groups, lambda g: (g.length, g.block_length)):
        groups = list(alike)
        tokens = slice(groups[0].begin, groups[-1].end)
        input_ids, position_ids = (ids[0, tokens].view(-1, length) for ids in (forward.input_ids, forward.position_ids))
        visible = _within_run(length, block_length, input_ids.device)
        logits.append(call(input_ids, position_ids, visible, None).flatten(0, 1))
    return logits


def honoured_mask_dtype(
    call: Call, token_ids: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The kind of 4-D mask that a module honours: bool (True is visible), or `dtype` (0 is visible, -inf is added to hide).

    torch's attention takes both. transformers' eager attention adds whatever comes, and True is 1; other modules may take
    bool only. So it is tried: with two tokens that do not see each other, neither may matter to the other one.

    Raises:
        TypeError: the module honours neither.
    """
    first, second = token_ids
    positions = torch.arange(2, device=device)[None]

    def effect(mask: torch.Tensor) -> float:
        logits = [
            call(torch.tensor([ids], device=device), positions, mask, None)[0]
            for ids in ((first, second), (second, second), (first, first))
        ]
        on_second, on_first = logits[1][1] - logits[0][1], logits[2][0] - logits[0][0]
        return float(torch.cat([on_second, on_first]).abs().max())

    alone = torch.eye(2, dtype=torch.bool, device=device)[None, None]
    kinds = {torch.bool: alone, dtype: additive_mask(alone, dtype)}
    effects: dict[torch.dtype, float] = {}
    for kind, mask in kinds.items():
        effects[kind] = effect(mask)
        if effects[kind] == 0:
            return kind
        if math.isnan(effects[kind]):  # the model's weights are broken, which says nothing about masks
            return dtype
    best = min(effects, key=effects.__getitem__)
    if effects[best] > 0.1 * effect(torch.ones_like(alone)):  # less may be rounding
        raise TypeError(
            "the module ignores its 4-D attention_mask: a token's logits change with a token that it does not see; a wrapped "
            "module has to honour the mask, bool (True is visible) or additive (-inf hides)"
        )
    return best


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of visible keys as numbers to add to scores: 0, and -inf for what is hidden."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def dense_mask(forward: PackedForward) -> torch.Tensor:
    """Which keys each token sees: `[1, 1, T, stored + T]` bool; stored keys are those of all slots, in order."""
    device = forward.input_ids.device
    tokens, stored = forward.input_ids.shape[1], _stored(forward)
    mask = torch.zeros(tokens, stored + tokens, dtype=torch.bool, device=device)
    for group in forward.groups:
        own = torch.arange(group.begin, group.end, device=device)
        keys = (own if group.keys is None else group.keys).view(group.count, -1)
        within = _within_run(group.length, group.block_length, device)[0, 0]
        for run, run_keys in zip(own.view(group.count, -1), keys, strict=True):
            mask[run[:, None], stored + run_keys] = within if group.keys is None else torch.ones_like(within[:1, :1])
    for context in forward.contexts:
        assert forward.cache is not None
        first = context.slot * forward.cache.capacity
        for begin, end in context.ranges:
            mask[context.begin : context.end, first + begin : first + end] = True
    return mask[None, None]


def _within_run(length: int, block_length: int | None, device: torch.device) -> torch.Tensor:
    mask = block_causal_mask(length, block_length or length, device)
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if mask is None else mask


def _stored(forward: PackedForward) -> int:
    return forward.cache.slots * forward.cache.capacity if forward.cache is not None and forward.contexts else 0
