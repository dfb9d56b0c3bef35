"""The op tests hold CPU tensors. On a GPU machine, calls of a GPU backend get copies on the device, laid out the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import freedave_kernels as fk
from freedave_kernels.contract import OPS


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on `device` with the strides and the offset of the original: `.to` would close the gaps."""
    storage = tensor.untyped_storage().clone().to(device=device)
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def through(op: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`op` on tensors of `device`, for arguments and results on the CPU."""

    def run(*arguments: Any, **named: Any) -> Any:
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def there(value: Any) -> Any:
            if isinstance(value, fk.DraftPool):
                return fk.DraftPool(there(value.memory), value.num_states, value.length)
            if not isinstance(value, torch.Tensor) or not value.is_cpu:
                return value
            copies.append((value, moved(value, device)))
            return copies[-1][1]

        result = op(*map(there, arguments), **{name: there(value) for name, value in named.items()})
        if OPS[op.__name__].written or isinstance(named.get("pool"), fk.DraftPool):
            for original, copy in copies:
                original.copy_(copy)
        if isinstance(result, fk.DraftStep):
            return fk.DraftStep(result.record.cpu(), result.draft_steps)
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

    return run


def elsewhere(name: str, first: str) -> str:
    """What an op says, on whichever device it computes, of an argument on another one than `first`: for `match=`."""
    return rf"{name} must be on (\S+) like {first}, got (?!\1\b)\S+"


@contextlib.contextmanager
def on_device(device: torch.device | str) -> Iterator[None]:
    """Every op of `freedave_kernels` inside the block computes on `device`."""
    with pytest.MonkeyPatch.context() as patch:
        for op in (op for op, rooms in OPS.items() if rooms.called_by is None):
            patch.setattr(fk, op, through(getattr(fk, op), device))
        yield
