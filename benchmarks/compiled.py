"""torch.compile as a provider: never a silent fallback to eager."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        compiled(_probe, "inductor", True)(torch.zeros(8))
    except Exception as error:  # whatever it is (no C++ compiler, no Triton), it becomes the reason that people read
        return f"torch.compile fails here: {str(error).strip().splitlines()[0]}"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


@functools.cache
def compiled(function: Function, compiler: str, dynamic: bool) -> Function:
    """`dynamic`: compiled once for all sizes, which saves minutes on a CPU and costs it little; False: once a size.

    Beyond its limit of recompilations torch would go on uncompiled, and be timed so; here it raises.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = 512
    config.accumulated_recompile_limit = 4096
    config.fail_on_recompile_limit_hit = True
    return torch.compile(function, backend=compiler, dynamic=dynamic)
