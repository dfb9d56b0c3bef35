"""What calls make torch do: operators, allocations, and reads by the host, which on a GPU wait for the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host has to know: a value, a truth, or how many elements there are.
READS = {"aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}
OURS = "freedave."


@dataclass
class Counts:
    """`operators`: dispatched from Python, views included. `operations`: what a device would be asked for, so without views,
    and operators that are made of others taken apart. `allocations` and `bytes`: of tensors on the device.
    """

    operators: int = 0
    operations: int = 0
    synchronisations: int = 0
    allocations: int = 0
    bytes: int = 0


def counted(call: Callable[[], object]) -> Counts:
    call()  # what is built or cached on the first call is not part of one
    operators = Operators()
    with operators:
        call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Counts(operators.operators, operators.operations.total(), operators.synchronisations, len(sizes), sum(sizes))


class Operators(TorchDispatchMode):
    """Counts what is dispatched within the context, while `paused` is False. `our_seconds`: what our own ops took."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.operations: Counter[str] = Counter()
        self.synchronisations = 0
        self.our_seconds = 0.0
        self.paused = False
        self._parts = 0
        self._whole: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return function(*args, **kwargs)
        self.operators += not self._parts
        if function not in self._whole:  # in inference mode, an operator that is made of others arrives as one
            self._parts += 1
            try:
                with self:
                    result = function.decompose(*args, **kwargs)
            finally:
                self._parts -= 1
            if result is not NotImplemented:
                return result
            self._whole.add(function)
        name = f"{function.namespace}.{function._schema.name.split('::')[1]}"
        began = time.perf_counter()
        result = function(*args, **kwargs)
        self.our_seconds += (time.perf_counter() - began) * name.startswith(OURS)
        self.operations[name] += not _is_view(function)
        self.synchronisations += name in READS or (name in INDEXING and _by_mask(args[1]))
        return result


def _is_view(function: Any) -> bool:
    """Whether an operator only says otherwise what lies where."""
    if function is torch.ops.aten._unsafe_view.default:
        return True
    schema = function._schema
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    return not writes and any(result.alias_info is not None for result in schema.returns)


def _by_mask(indices: Any) -> bool:
    """A boolean index: how much it selects, the host must know."""
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
