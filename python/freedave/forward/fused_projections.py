"""Linear layers that are multiplied with the same input as one product: query, key and value; gate and up.

A product of few rows spends its time reading weights, and the small ones (key and value, with few heads) read them at a third
of a GPU's bandwidth. The weights are copied once into one tensor, and the layers' own weights become views of it: this takes
no more memory, and the model computes what it did. The layers themselves are replaced only while `fused` runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# By attribute name, in the order in which a transformers layer calls them.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product:
    """The result of one product, between the calls of its parts."""

    def __init__(self) -> None:
        self.out: torch.Tensor | None = None


class _Part(torch.nn.Module):
    """One of several layers: the first multiplies for all, the last forgets the result."""

    def __init__(self, product: _Product, linears: list[torch.nn.Linear], index: int) -> None:
        super().__init__()
        sizes = [linear.out_features for linear in linears]
        self.product = product
        self.first, self.last = index == 0, index == len(linears) - 1
        self.begin, self.end = sum(sizes[:index]), sum(sizes[: index + 1])
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if self.first:
            self.weight, self.bias = _joined(linears)
        self.storage = linears[index].weight.untyped_storage().data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            self.product.out = F.linear(x, self.weight, self.bias)
        out = self.product.out
        assert out is not None
        if self.last:
            self.product.out = None
        return out[..., self.begin : self.end]


def _joined(linears: list[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights, and biases where there are any, one behind the other; the layers' own become views."""
    weight = _one_behind_the_other([linear.get_parameter("weight") for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, _one_behind_the_other([linear.get_parameter("bias") for linear in linears])


def _one_behind_the_other(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, whole.split([len(each) for each in parameters]), strict=True):
        parameter.data = view
    return whole


def _fusible(layers: list[object]) -> list[torch.nn.Linear]:
    """The layers, if multiplying is all that they do, and alike; else none."""
    linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear) and _only_multiplies(layer)]
    kinds = {(layer.weight.dtype, layer.weight.device, layer.in_features, layer.bias is None) for layer in linears}
    return linears if len(linears) == len(layers) and len(kinds) == 1 else []


def _only_multiplies(linear: torch.nn.Linear) -> bool:
    plain = type(linear) is torch.nn.Linear and type(linear.weight) is torch.nn.Parameter
    return plain and "forward" not in vars(linear) and not linear._forward_hooks and not linear._forward_pre_hooks


class FusedProjections:
    """A model's groups of layers, fused; copies one group's weights at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._replaced: list[tuple[torch.nn.Module, str, torch.nn.Linear, _Part]] = []
        for module in list(model.modules()):
            for names in GROUPS:
                linears = _fusible([getattr(module, name, None) for name in names])
                if linears:
                    product = _Product()
                    parts = [_Part(product, linears, index) for index in range(len(names))]
                    self._replaced += zip([module] * len(names), names, linears, parts, strict=True)

    @property
    def holds(self) -> bool:
        """Whether the layers still are what was fused: moving or converting a model gives them other weights, and adapters
        are put around them, or take their place."""
        return all(
            getattr(module, name, None) is linear and linear.weight.untyped_storage().data_ptr() == part.storage
            for module, name, linear, part in self._replaced
        )

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Calls of the model multiply once a group."""
        try:
            for module, name, _, part in self._replaced:
                setattr(module, name, part)
            yield
        finally:
            for module, name, linear, _ in self._replaced:
                setattr(module, name, linear)
