"""How predict_tokens uses a GPU, by architecture and dtype of the logits.

The table is short and fixed: choosing by trial at run time, for every new batch size, would stall decoding, and a choice
that depended on the batch would break batch invariance. `python -m benchmarks tune` measures an architecture's entries.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tunables.json")


@dataclass(frozen=True)
class Tunables:
    num_warps: int
    """Warps of the program that owns a chunk: 16384 logits over 32 (NVIDIA) or 64 (AMD) times as many threads."""
    max_registers: int
    """A thread's registers at most, so that more programs fit a multiprocessor; 0: as many as the compiler likes."""


@functools.cache
def tunables(device: torch.device, dtype: torch.dtype) -> Tunables:
    """The entry of the architecture of `device`, else the default."""
    table = json.loads(TABLE.read_text())
    entries = table.get(architecture(device), table["default"])
    return Tunables(**entries[str(dtype).removeprefix("torch.")])


def architecture(device: torch.device) -> str:
    """As compilers name it: "sm_90", "gfx942"; "cpu" for the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
