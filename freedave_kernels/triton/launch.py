"""Launches a Triton kernel without Triton's per-call inspection of its arguments.

A `kernel[grid](...)` call looks at every argument again to find the binary that fits it, and compiles another one when a
size happens to be 1 or divisible by 16. Here a kernel is compiled once for each key that its launcher spells out (dtypes,
constants); sizes and strides are never looked at, so that a batch that grows does not stall a decoder.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import driver

# What decides is how `triton.jit` wrapped the kernels, when they were imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
ROCM: bool = torch.version.hip is not None


def kernel(aligned: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a Triton function that programs are launched of.

    Triton specialises on a pointer's alignment only for the arguments in `aligned`, on no other argument at all.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        parameters = inspect.signature(function).parameters.values()
        runtime = [parameter.name for parameter in parameters if "constexpr" not in str(parameter.annotation)]
        return Kernel(triton.jit(function, do_not_specialize=[name for name in runtime if name not in aligned]))

    return decorate


def short_range(tensor: torch.Tensor) -> bool:
    """Whether Triton for ROCm compiles 32-bit offsets into a tensor that a kernel is specialised on."""
    return ROCM and tensor.untyped_storage().nbytes() < 2**31


@functools.cache
def architecture(device: int) -> int:
    """Of a device, as 90 for sm_90; 0 for what is not NVIDIA's, and where kernels are interpreted."""
    if INTERPRETED:
        return 0
    with torch.cuda.device(device):  # of the current one; nothing changes where `device` is negative
        target = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


class Kernel:
    """A jitted function whose runtime arguments come first and whose constants come last."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        others: tuple[Any, ...] = (),
        num_warps: int = 4,
        max_registers: int = 0,
        num_stages: int = 0,
    ) -> None:
        """Runs on the device of `arguments[0]`, on its current stream. A grid without programs launches nothing.

        `others` is what else a binary depends on: dtypes that do not follow from `constants`, and, of arguments that the
        kernel is specialised on, whatever `constants` do not decide.
        """
        if 0 in grid:
            return
        if INTERPRETED:
            self.function[grid](*arguments, *constants)
            return
        device = arguments[0].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(grid, arguments, constants, others, num_warps, max_registers, num_stages)
            return
        key = (device, constants, others, num_warps, max_registers, num_stages)
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
            return
        chosen = options(num_warps, max_registers, num_stages, ROCM)
        self.compiled[key] = self.function[grid](*arguments, *constants, **chosen)


def options(num_warps: int, max_registers: int = 0, num_stages: int = 0, rocm: bool = False) -> dict[str, Any]:
    """Compiler options; the same ahead of time. A fused multiply-add stands where the source says so, nowhere else."""
    chosen: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    if max_registers and not rocm:
        chosen["maxnreg"] = max_registers
    if num_stages:  # of the loops that multiply matrices; 0: as many as Triton likes
        chosen["num_stages"] = num_stages
    return chosen


def each_or(other: torch.Tensor, *given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """`other`, which a kernel does not look at, where a tensor was not given: a kernel takes no None."""
    return tuple(other if tensor is None else tensor for tensor in given)


def power_of_two(number: int) -> int:
    """The least one that is not below `number`. (Triton's own takes as long as a launch.)"""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def outer_stride(tensor: torch.Tensor, inner_dims: int) -> int | None:
    """The one stride that walks all dimensions but the last `inner_dims`, or None where none does; 0 for a single step."""
    dims = tensor.dim() - inner_dims
    if dims > 0 and tensor.is_contiguous():
        return tensor.stride(dims - 1)
    stride, steps = 0, 1
    for dim in range(dims - 1, -1, -1):
        size = tensor.shape[dim]
        if size == 1:
            continue
        if steps > 1 and tensor.stride(dim) != stride * steps:
            return None
        if steps == 1:
            stride = tensor.stride(dim)
        steps *= size
    return stride


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A `[*, L]` tensor as `[N, L]`: a view wherever one stride walks the leading dimensions, else a copy (L is small)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
