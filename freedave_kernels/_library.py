"""Loads the native ops library once, and keeps the reason when it cannot be loaded.

The library registers ``torch.ops.freedave.*`` and has no Python symbols, so it is loaded by torch rather than imported.
``FREEDAVE_LIBRARY=/path/to/libfreedave_ops.so`` loads another build of it (a sanitizer build, say).
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import torch

PATH = Path(os.environ.get("FREEDAVE_LIBRARY") or Path(__file__).with_name("libfreedave_ops.so"))

LOAD_ERROR: Exception | None = None
try:
    torch.ops.load_library(str(PATH))
except (OSError, RuntimeError) as error:
    LOAD_ERROR = error

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
