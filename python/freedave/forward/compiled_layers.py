"""A transformers model's layers through torch.compile, for as long as a step of fixed shapes runs.

Layers are compiled one by one, not the model at once: all of a model's run the same code on other tensors, so that one of
them is compiled (in seconds) and serves the others. The model itself stays as it is for whoever else calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from freedave.forward.fused_projections import FusedProjections

if TYPE_CHECKING:
    from freedave.models.diffusion_lm import DiffusionLM

# The backend of torch.compile.
BACKEND = "inductor"

# For how many shapes the layers of one class may be compiled in a process; torch's own limit is 8.
_SHAPES = 256


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformers model, and the norm behind them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    norm = getattr(getattr(model, "base_model", model), "norm", None)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    return layers if norm is None else [*layers, norm]


class CompiledLayers:
    """What a model's layers are replaced with while a step of fixed shapes runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = layers_of(model)
        self._fused = FusedProjections(model)

    @property
    def holds(self) -> bool:
        """Whether the model's weights still are those that it was made for."""
        return self._fused.holds

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Calls of the model's layers run compiled, each shape as a whole: no graph break, no dynamic shapes."""
        import torch._dynamo

        before: list[tuple[Any, Any]] = []
        limits = torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=4 * _SHAPES)
        with limits, self._fused.fused():
            try:
                for layer in self._layers:
                    before.append((layer, layer._compiled_call_impl))
                    layer.compile(fullgraph=True, dynamic=False, backend=BACKEND)
                yield
            finally:
                for layer, call in before:
                    layer._compiled_call_impl = call


def compiled_layers(lm: DiffusionLM) -> CompiledLayers:
    """Those of a model, which all of its executors share."""
    found = lm.compiled_layers
    if not isinstance(found, CompiledLayers) or not found.holds:
        found = lm.compiled_layers = CompiledLayers(lm.model)
    return found


def is_compile_error(error: BaseException) -> bool:
    """Whether the compiler, not the model, raised `error`."""
    import torch._dynamo.exc

    return isinstance(error, torch._dynamo.exc.TorchDynamoException)
