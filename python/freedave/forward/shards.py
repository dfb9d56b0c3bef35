"""Layers of which every process holds a part: tensor parallelism.

What the processes exchange is gathered, and summed in the order of their ranks. An all-reduce may sum an element in another
order wherever it stands in a tensor (gloo's does), so that with more than two processes a draft's bits would depend on how
many drafts there are. All processes compute the same bits of what they all hold, and go on with the same tokens.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from freedave_kernels import TOKENS_PER_STATE
from freedave_kernels.contract import STATE_FIELDS

# Noise is drawn for so many neighbouring tokens at a time, so that no fewer are divided.
_DRAWN_TOGETHER = 4
# A state of `partial_predictions` that tells of no logits.
_NOTHING = (-math.inf, -math.inf, -1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of the `count` processes of torch.distributed's default group."""

    rank: int
    count: int

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[count, *]` of a tensor `[*]` that each process has in the same shape."""
        gathered = tensor.new_empty(self.count, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, the same bits in each of them and at any place in a tensor."""
        first, *others = self.gather(tensor).unbind()
        for other in others:
            first = first + other
        return first

    def share(self, size: int) -> slice:
        """This process's part of what is divided evenly."""
        each = size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)


def vocabulary_bounds(vocab_size: int, count: int) -> list[int]:
    """Where the parts of a vocabulary begin, and its end.

    Whole states of `partial_predictions`, if there are enough of them: then predictions are the same bits as those of the
    whole vocabulary.
    """
    unit = TOKENS_PER_STATE if vocab_size >= count * TOKENS_PER_STATE else _DRAWN_TOGETHER
    units = math.ceil(vocab_size / unit)
    return [min(units * rank // count * unit, vocab_size) for rank in range(count + 1)]


class SummedLinear(torch.nn.Linear):
    """A linear layer of which each process holds the columns for its part of the input; all of them get the whole output."""

    def __init__(self, whole: torch.nn.Linear, ranks: Ranks) -> None:
        weight = whole.weight
        super().__init__(
            whole.in_features // ranks.count,
            whole.out_features,
            bias=whole.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.ranks = ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = self.ranks.sum(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


class ShardedEmbedding(torch.nn.Embedding):
    """An embedding of which each process holds the rows of its part of the vocabulary; all of them get the whole result."""

    def __init__(self, whole: torch.nn.Embedding, ranks: Ranks) -> None:
        bounds = vocabulary_bounds(whole.num_embeddings, ranks.count)
        self.first, end = bounds[ranks.rank], bounds[ranks.rank + 1]
        weight = whole.weight
        super().__init__(end - self.first, whole.embedding_dim, device=weight.device, dtype=weight.dtype)
        self.ranks = ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own = input - self.first
        elsewhere = (own < 0) | (own >= self.num_embeddings)
        found = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.sum(found.masked_fill(elsewhere[..., None], 0))


class ShardedHead(torch.nn.Linear):
    """A vocabulary projection of which each process holds the rows of its part of the vocabulary, from token `first` on.

    Called, it returns all logits in every process. `all_states` is what predictions need, and is a thousandth of that.
    """

    def __init__(self, whole: torch.nn.Linear, ranks: Ranks) -> None:
        self.bounds = vocabulary_bounds(whole.out_features, ranks.count)
        self.first, end = self.bounds[ranks.rank], self.bounds[ranks.rank + 1]
        weight, bias = whole.weight, whole.bias is not None
        super().__init__(whole.in_features, end - self.first, bias=bias, device=weight.device, dtype=weight.dtype)
        self.ranks = ranks

    @property
    def _sizes(self) -> list[int]:
        return [end - first for first, end in itertools.pairwise(self.bounds)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input)
        padded = F.pad(logits, (0, max(self._sizes) - logits.shape[-1]))
        parts = self.ranks.gather(padded).unbind()
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], -1)

    def all_states(self, states: torch.Tensor) -> torch.Tensor:
        """The states `[R, C, 6]` of the whole vocabulary, of those `[R, *, 6]` of `partial_predictions` of this part."""
        most = math.ceil(max(self._sizes) / TOKENS_PER_STATE)
        missing = most - states.shape[-2]
        if missing:
            nothing = states.new_tensor(_NOTHING).expand(*states.shape[:-2], missing, STATE_FIELDS)
            states = torch.cat([states, nothing], -2)
        return torch.cat(self.ranks.gather(states).unbind(), -2)


def agreed(ranks: Ranks, numbers: Sequence[int], device: torch.device) -> list[int]:
    """The first process's numbers: what the clock or chance decides, all do alike."""
    first: list[int] = ranks.gather(torch.tensor(numbers, dtype=torch.int64, device=device))[0].tolist()
    return first


def check_alike(ranks: Ranks | None, given: object, device: torch.device) -> None:
    """Raises ValueError, in all processes, where some were not given what the first one was."""
    if ranks is None:
        return
    mine = zlib.crc32(repr(given).encode())
    codes = ranks.gather(torch.tensor(mine, device=device)).tolist()
    others = [str(rank) for rank, code in enumerate(codes) if code != codes[0]]
    if others:
        raise ValueError(
            "the processes of a model in shards decode together, with the same prompts and settings; not those of process 0 "
            f"has {', '.join(others)}"
        )
