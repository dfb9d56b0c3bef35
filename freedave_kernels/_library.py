"""Loads the native ops library once, and keeps the reason when it cannot be loaded.

The library registers ``torch.ops.freedave.*`` and has no Python symbols, so it is loaded by torch rather than imported.
``FREEDAVE_LIBRARY=/path/to/libfreedave_ops.so`` loads another build of it (a sanitizer build, say).
"""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from freedave_kernels.contract import STATED_IN_CPP

PATH = Path(os.environ.get("FREEDAVE_LIBRARY") or Path(__file__).with_name("libfreedave_ops.so"))


def differences(stated: dict[str, Any]) -> list[str]:
    """The names of what C++ states otherwise than this package, or one of them alone."""
    return [name for name in {**STATED_IN_CPP, **stated} if stated.get(name) != STATED_IN_CPP.get(name)]


def _load() -> Exception | None:
    """Returns what keeps the library from being used; then none of its ops are registered."""
    try:
        _C = importlib.import_module("freedave_kernels._C")
        # A library of an older version says nothing of it.
        if different := differences(getattr(_C, "contract", {})):
            return ImportError(f"it and this package are not of one version: they differ in {', '.join(different)}")
        torch.ops.load_library(str(PATH))
    except (ImportError, OSError, RuntimeError) as error:
        return error
    return None


LOAD_ERROR = _load()

# Tests execute the CUDA kernels on CPU tensors, through a second library that registers ``torch.ops.freedave_emulated.*``.
EMULATED_PATH = os.environ.get("FREEDAVE_EMULATED_LIBRARY")
EMULATED_LOAD_ERROR: Exception | None = None
if EMULATED_PATH:
    try:
        torch.ops.load_library(EMULATED_PATH)
    except (OSError, RuntimeError) as error:
        EMULATED_LOAD_ERROR = error

try:
    VERSION = metadata.version("freedave-kernels")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    VERSION = "0+uninstalled"
