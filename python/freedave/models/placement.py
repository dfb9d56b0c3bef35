"""Where weights go and what they are stored as, named by people."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def named_dtype(name: str) -> torch.dtype:
    """ "float32", "bfloat16" or "float16" as torch's dtype; raises `ValueError` for another name."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def usable_device(name: str) -> torch.device:
    """A device that exists here; raises `ValueError` with what is there instead."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:1, ..., got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = (
                f"torch sees {count} CUDA devices" if count else "torch sees no CUDA device (`freedave info` says more)"
            )
            raise ValueError(f"device {name}: {found}")
    elif device.type != "cpu":
        raise ValueError(f"device {name}: decoding is tried on cpu and cuda only")
    return device
