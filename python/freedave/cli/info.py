"""`freedave info`: what is installed and built, what can run here, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib import metadata
from typing import Any

import torch

import freedave_kernels
from freedave.cli.machine import float32_products, processor
from freedave.cli.reporting import write, write_json

# Imported here, where Ctrl-C is seen to, and not needed: a plain `pip install` brings the ops and torch alone.
DECODER_ERROR: ImportError | None = None
try:
    import freedave.models.checkpoint
except ImportError as error:
    DECODER_ERROR = error

PACKAGES = (
    "freedave-kernels",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "tqdm",
    "matplotlib",
    "lm_eval",
)


def run(arguments: argparse.Namespace) -> int:
    """Print what there is; the exit code is 0 whatever is missing."""
    information = collect()
    if arguments.json:
        write_json(information)
    else:
        write(report(information))
    return 0


def collect() -> dict[str, Any]:
    """Everything `freedave info` knows. What could not be found out has an "error" in its place."""
    information: dict[str, Any] = {
        # torch's own words tell a CPU build from a CUDA build; those of its package do not.
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES}
        | {"torch": torch.__version__},
        "build": build(),
        "backends": freedave_kernels.available_backends(),
        "forced_backend": os.environ.get("FREEDAVE_BACKEND") or None,
        "devices": devices(),
        "embedded_model": embedded_model(),
    }
    information["missing"] = missing(information)
    return information


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build() -> dict[str, Any]:
    """What the native code was built from and for, as the bindings module recorded it."""
    try:
        module = importlib.import_module("freedave_kernels._C")
    except ImportError as error:
        return {"error": f"{error}; build it with `make setup` or `pip install .`"}
    try:
        cpu_isa = module.cpu_isa()
    except RuntimeError as error:  # FREEDAVE_CPU_ISA names one that cannot run here
        cpu_isa = str(error)
    return {**module.build, "usable_cpu_isas": module.usable_cpu_isas(), "cpu_isa": cpu_isa}


def devices() -> dict[str, Any]:
    """The processor, and the GPUs that torch sees."""
    found: dict[str, Any] = {
        "cpu": {
            "name": processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "float32": float32_products(),
        },
        "cuda": [],
        "executor": executor(),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        found["cuda"].append({"name": properties.name, "capability": capability, "memory_gib": memory})
    return found


def executor() -> str:
    """How models decode here where nothing else is asked for."""
    if torch.cuda.is_available():
        return "graph: steps of fixed shapes in CUDA graphs, each compiled and captured where it is first used"
    return "planned: each forward computes as little as possible"


def embedded_model() -> dict[str, Any]:
    """The model that `freedave demo` decodes with."""
    if DECODER_ERROR is not None:
        return {"error": f"{DECODER_ERROR}; get what decodes with pip install 'freedave-kernels[decode]'"}
    try:
        lm = freedave.load_model("demo")
    except ValueError as error:
        return {"error": str(error)}
    return {
        "name": lm.name,
        "family": type(lm.model).__name__,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "attention": lm.attention,
        "block_length": lm.block_length,
        "max_positions": lm.max_positions,
    }


def missing(information: dict[str, Any]) -> list[str]:
    """One line for each thing that is not there, with the remedy."""
    lines = [f"backend {name}: {reason}" for name, reason in information["backends"].items() if reason is not None]
    for part in ("build", "embedded_model"):
        if "error" in information[part]:
            lines.append(f"{part.replace('_', ' ')}: {information[part]['error']}")
    if information["versions"]["matplotlib"] is None:
        lines.append("matplotlib, for .png pictures: pip install 'freedave-kernels[decode]'")
    if information["versions"]["lm_eval"] is None:
        lines.append("lm_eval, for `freedave evaluate`: pip install 'freedave-kernels[lm-eval]'")
    return lines


def report(information: dict[str, Any]) -> str:
    """The same for people."""
    sections = {
        "versions": described(information["versions"]),
        "build": described(information["build"]),
        "backends": [
            f"{name:<18} {'usable' if reason is None else 'not usable'}"
            for name, reason in information["backends"].items()
        ],
        "devices": [
            *described(information["devices"]["cpu"]),
            *described({"executor": information["devices"]["executor"]}),
        ],
        "embedded model": described(information["embedded_model"]),
        "missing": information["missing"] or ["nothing"],
    }
    if information["forced_backend"]:
        sections["backends"].append(f"FREEDAVE_BACKEND forces {information['forced_backend']}")
    gpus = [f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB" for gpu in information["devices"]["cuda"]]
    sections["devices"] += [f"{'cuda':<18} {gpu}" for gpu in gpus or ["none that torch sees"]]
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def described(part: dict[str, Any]) -> list[str]:
    """A dictionary as aligned lines."""
    if "error" in part:
        return ["missing, see below"]
    lines = []
    for name, value in part.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"{name.replace('_', ' '):<18} {'-' if shown in ('', None) else shown}")
    return lines
