"""Whether the bits of a row in a matrix product depend on the number of rows beside it.

Lossless decoding in float32 on a CPU rests on this: a draft is some rows among many, static decoding computes few. MKL
promises it in its strict mode only (without, an Intel Sapphire Rapids rounds otherwise with less than 16 rows). It reads
MKL_CBWR with the first product of the process, and `import freedave` sets that variable where it is not set. Where that came
too late, where the user asks for another mode, and where the library is not MKL, there is no promise; so products of the
model's shapes are tried before its first forward.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.nn.functional as F

from freedave.mkl_mode import MKL_MODE
from freedave_kernels import TOKENS_PER_STATE

# Products of each of FEW rows are compared with one of MANY. The decoder's products have multiples of four rows
# (`ROWS_TOGETHER`).
FEW, MANY = (4, 8, 12, 16, 24, 48), 128

# Results by the weight's shape, whether it is multiplied in slices, and the number of threads.
_tried: dict[tuple[int, int, bool, int], bool] = {}
_difference: str | None = None


def difference() -> str | None:
    """What was found so far that keeps float32 from being lossless, in a sentence."""
    return _difference


def try_products(model: torch.nn.Module, sliced: torch.nn.Module | None = None) -> None:
    """Tries the float32 products of a model's linear layers, as far as their shapes are new; warns at the first difference.

    `sliced`: the layer that is multiplied with a slice of its weights at a time, of how many depends on the rows.
    """
    global _difference
    if torch.is_autocast_enabled("cpu"):
        return
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or type(module.weight) is not torch.nn.Parameter:
            continue
        weight = module.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            continue
        key = (*weight.shape, module is sliced, torch.get_num_threads())
        if key in _tried or not weight.isfinite().all():  # a NaN equals nothing, and decoding reports it
            continue
        count = _first_difference(weight, module is sliced)
        _tried[key] = count is None
        if count is not None and _difference is None:
            _difference = _describe(weight, count)
            warnings.warn(_difference, RuntimeWarning, stacklevel=2)


def _first_difference(weight: torch.Tensor, sliced: bool) -> int | None:
    """How few rows it takes for other bits than among many; None: there is no difference."""
    rows = torch.randn(MANY, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    few, many = weight, weight
    if sliced:
        few, many = weight[: 2 * TOKENS_PER_STATE], weight[:TOKENS_PER_STATE]
    products = F.linear(rows, many)
    for count in FEW:
        if not torch.equal(F.linear(rows[:count], few)[:, : len(many)], products[:count]):
            return count
    return None


def _describe(weight: torch.Tensor, count: int) -> str:
    shape = f"{weight.shape[1]} features to {weight.shape[0]}"
    found = (
        f"float32 is not lossless here: in matrix products ({shape}) {count} rows have other bits than the same rows among "
        f"{MANY}, so a decode with drafts can differ from static decoding where predictions almost tie"
    )
    if not torch.backends.mkl.is_available():
        return found
    mode = os.environ.get("MKL_CBWR")
    chosen = "" if mode == MKL_MODE else f" (MKL_CBWR is {mode})"
    return f"{found}; start Python with MKL_CBWR={MKL_MODE}, or import freedave before anything multiplies matrices{chosen}"
