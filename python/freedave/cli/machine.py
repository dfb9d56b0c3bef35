"""What the machine is, in a few words; shared by the demo's report and `freedave info`."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import torch

from freedave.forward import reproducible_products


def processor() -> str:
    """The processor's name, as its maker writes it where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def machine() -> str:
    """Processor, threads and torch: what a time measured here depends on."""
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} {'thread' if threads == 1 else 'threads'}, torch {torch.__version__}"


def float32_products() -> str:
    """Whether float32 is lossless here, which rests on the processor's matrix products; tried with usual sizes."""
    sizes = ((256, 256), (1024, 1024), (1024, 3072), (3072, 1024))
    layers = [torch.nn.Linear(*size, bias=False) for size in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is returned
        reproducible_products.try_products(torch.nn.ModuleList(layers))
    return reproducible_products.difference() or "lossless"
