"""CUDA graphs for processors: what is captured is the operations and the tensors that they were given, as on a GPU.

Capturing leaves all memory as it was, and replaying runs the same operations on the same memory, whatever Python would have
done by then. What would fail in a capture on a GPU fails here: a result that is read back. Graphs of one pool share memory,
so that a replay may overwrite what another one has left: here it always does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal")


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.replays = 0
        self._whole: set[Any] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        RecordedGraph.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self._whole:  # in inference mode, what is made of other operations arrives as one
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self._whole.add(function)
        if function.overloadpacket.__name__ in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        for argument in function._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(kwargs[argument.name])
        out = function(*args, **kwargs)
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        new = [tensor if storage(tensor) not in given else None for tensor in tensors(out)]
        self.calls.append((function, args, kwargs, new))
        return out

    def _remember(self, written: Any) -> None:
        for tensor in tensors(written):
            memory = tensor.untyped_storage()
            self._before.setdefault(memory.data_ptr(), (memory, memory.clone()))

    def forget_the_run(self) -> None:
        """Leaves memory as it was: a capture runs nothing."""
        for memory, before in self._before.values():
            memory.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for other in RecordedGraph.made:
            if other is not self:
                other.overwrite()
        for function, args, kwargs, new in self.calls:
            for kept, result in zip(new, tensors(function(*args, **kwargs)), strict=True):
                if kept is not None:
                    kept.copy_(result)

    def overwrite(self) -> None:
        """Garbage in the place of every result."""
        for *_, new in self.calls:
            for kept in new:
                if kept is not None:
                    kept.fill_(113)


@contextmanager
def capturing(graph: RecordedGraph, pool: Any) -> Iterator[None]:
    assert pool == "pool"
    with graph:
        yield
    graph.forget_the_run()


def use_recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """In place of CUDA's; the graphs that are made from now on."""
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return RecordedGraph.made
