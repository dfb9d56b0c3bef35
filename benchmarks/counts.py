"""What one call makes torch do: operators, allocations, and reads by the host, which on a GPU wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host has to know: a value, a truth, or how many elements there are.
READS = {"aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}


@dataclass
class Counts:
    """`operators`: dispatched from Python, views included. `allocations` and `bytes`: of tensors on the device."""

    operators: int = 0
    synchronisations: int = 0
    allocations: int = 0
    bytes: int = 0


def counted(call: Callable[[], object]) -> Counts:
    call()  # what is built or cached on the first call is not part of one
    operators = _Operators()
    with operators:
        call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Counts(operators.counts.operators, operators.counts.synchronisations, len(sizes), sum(sizes))


@dataclass
class _Operators(TorchDispatchMode):
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{function.namespace}.{function._schema.name.split('::')[1]}"
        self.counts.operators += 1
        self.counts.synchronisations += name in READS or (name in INDEXING and _by_mask(args[1]))
        return function(*args, **(kwargs or {}))


def _by_mask(indices: Any) -> bool:
    """A boolean index: how much it selects, the host must know."""
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
