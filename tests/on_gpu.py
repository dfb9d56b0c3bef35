"""The op tests hold CPU tensors. On a GPU machine, calls of a GPU backend get copies on the device, laid out the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import freedave_kernels as fk
from freedave_kernels.backends import OPS


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on `device` with the strides and the offset of the original: `.to` would close the gaps."""
    storage = tensor.untyped_storage().clone().to(device=device)
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def through(op: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`op` on tensors of `device`, for arguments and results on the CPU."""

    def there(value: Any) -> Any:
        return moved(value, device) if isinstance(value, torch.Tensor) and value.is_cpu else value

    def run(*arguments: Any, **named: Any) -> Any:
        result = op(*map(there, arguments), **{name: there(value) for name, value in named.items()})
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

    return run


@contextlib.contextmanager
def on_device(device: torch.device | str) -> Iterator[None]:
    """Every op of `freedave_kernels` inside the block computes on `device`."""
    with pytest.MonkeyPatch.context() as patch:
        for op in OPS:
            patch.setattr(fk, op, through(getattr(fk, op), device))
        yield
