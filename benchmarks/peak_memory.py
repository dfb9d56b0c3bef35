"""How much memory a piece of work needs beyond what is there before it, on CUDA and on the CPU."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory:
    """The most that tensors took at a time within the context, beyond what was there: `.peak` bytes, known on leaving it.

    On CUDA this is the allocator's own count. A CPU has none, so every operation's results are followed until they are
    freed; what a kernel allocates for itself is not seen there.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self._device = device
        self._before = 0
        self._results = _Results()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._results.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._results.__exit__(kind, error, trace)
            self.peak = self._results.peak


class _Results(TorchDispatchMode):
    """Follows the storages that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}
        self._outside: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs or {}))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            # A view of what was there before is not a result.
            if key not in self._known and key not in given and storage.nbytes():
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                self._known[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._now -= size
        del self._known[key]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
